"""The arguments of `generate` and `stream`, as an editor and the type checker see them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

from handspun.config import GenerationOptions, TemplateArgs, wrong_argument
from handspun.config.names import unknown_option
from handspun.config.typed import short
from handspun.decoding.processors import Function
from handspun.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What one call decides besides its `GenerationOptions`."""

    chat: bool = True
    """Put the prompts into the chat template."""
    system_prompt: str | None = None
    """System message of every prompt. None leaves the template's default."""
    tools: list[dict[str, Any]] | None = None
    """Tool definitions (JSON schemas) for the chat template."""
    template_args: TemplateArgs | None = None
    """Values for the chat template's variables, such as {"enable_thinking": False}."""
    continue_final_message: bool = False
    """Continue each conversation's last message, which must be an assistant's. The answer holds only the
    continuation."""
    processors: Sequence[Function] = ()
    """Custom logits processors, (logits, token_ids) -> logits. Each gets one row's logits, (vocab,), and the ids
    of its prompt and output so far. They run after the penalties, and before the constraint and the sampling
    filters."""
    logprobs: bool = False
    """Also return each token's log-probability in the model's own distribution."""
    explain: bool = False
    """Also return how each token was chosen: each processor's effect, the tokens left, the draw. Not available for
    beam search."""
    show_tree: bool = False
    """Also return the tree that a beam search explored, with each prompt's best answer."""
    batch_size: int = 32
    """Maximum number of answers (or beams) decoded at a time. It does not change the answers. A finished answer
    makes room for the next."""
    max_batch_tokens: int = 32768
    """Maximum number of prompt and answer tokens in a batch, which bounds its memory. A longer answer is decoded
    alone."""
    should_stop: Callable[[], bool] | None = None
    """Called before every step. Once it returns True, unfinished answers end as "cancelled"."""


class GenerateArguments(TypedDict, total=False):
    """The fields of `CallOptions` and `GenerationOptions`, any of which can be given by name."""

    chat: bool
    system_prompt: str | None
    tools: list[dict[str, Any]] | None
    template_args: TemplateArgs | None
    continue_final_message: bool
    processors: Sequence[Function]
    logprobs: bool
    explain: bool
    show_tree: bool
    batch_size: int
    max_batch_tokens: int
    should_stop: Callable[[], bool] | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    do_sample: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    repetition_penalty_exempt: Literal["none", "template"] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    no_repeat_ngram_size: int | None
    logit_bias: dict[str, float] | None
    sequence_bias: dict[str, float] | None
    bad_words: tuple[str, ...] | None
    bad_words_ids: tuple[tuple[int, ...], ...] | None
    suppress_tokens: tuple[int, ...] | None
    begin_suppress_tokens: tuple[int, ...] | None
    json_schema: str | dict[str, Any] | None
    regex: str | None
    choice: tuple[str, ...] | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    num_return_sequences: int | None
    prompt_lookup_num_tokens: int | None
    max_matching_ngram_size: int | None
    stop_strings: tuple[str, ...] | None
    seed: int | tuple[int, ...] | None


_OF_CALLS = {field.name: field for field in fields(CallOptions)}
_AT_LEAST_ONE = ("batch_size", "max_batch_tokens")
_FLAGS = ("chat", "logprobs", "explain", "show_tree", "continue_final_message")


def read_arguments(
    options: GenerationOptions | None, arguments: GenerateArguments
) -> tuple[CallOptions, GenerationOptions]:
    """Split the arguments of a call. Single options override `options`. Raises ConfigError."""
    if options is not None and not isinstance(options, GenerationOptions):
        raise ConfigError(f"options is {short(options)}: expected a handspun.GenerationOptions instance.")
    of_call: dict[str, Any] = {name: value for name, value in arguments.items() if name in _OF_CALLS}
    single: dict[str, Any] = {name: value for name, value in arguments.items() if name not in _OF_CALLS}
    # Without template_args, a misplaced variable is answered in Python's words, not in the command line's.
    known = {*_OF_CALLS, *(field.name for field in fields(GenerationOptions))} - {"template_args"}
    problems = [unknown_option(name, known, str) for name in single if name not in known]
    call = CallOptions(**of_call)
    problems += [text for name in _AT_LEAST_ONE for text in wrong_argument(name, getattr(call, name), int, 1)]
    problems += [text for name in _FLAGS for text in wrong_argument(name, getattr(call, name), bool)]
    problems += wrong_argument("system_prompt", call.system_prompt, str | None)
    if problems:
        raise ConfigError(problems)
    return call, replace(options or GenerationOptions(), **single)
