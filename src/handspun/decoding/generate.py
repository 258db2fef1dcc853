"""Answer prompts: `generate` returns the answers, `stream` yields them as they grow.

Both check their arguments and make one `Request`. `scheduler.decode` is the loop for greedy decoding and sampling;
`beam.beam_search` is the loop for beams.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from handspun.config import GenerationOptions, TemplateArgs, read_template_args, wrong_argument, wrong_names
from handspun.config.typed import short
from handspun.decoding.beam import beam_search
from handspun.decoding.engines.choose import drafting_unsupported_reason, fused_decoding_unsupported_reason
from handspun.decoding.options import SamplingParams, resolve
from handspun.decoding.processors import Function
from handspun.decoding.prompts import (
    Prompt,
    as_prompts,
    context_length,
    encode_prompts,
    rendered_already,
    said_in,
    unencodable_notice,
)
from handspun.decoding.request import Request
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.decoding.scheduler import decode, prompt_progress
from handspun.decoding.text import vocabulary
from handspun.display import say
from handspun.errors import ConfigError
from handspun.models.load import ChatModel


def generate(
    model: ChatModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    chat: bool = True,
    system_prompt: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    template_args: TemplateArgs | None = None,
    continue_final_message: bool = False,
    processors: Sequence[Function] = (),
    logprobs: bool = False,
    explain: bool = False,
    show_tree: bool = False,
    batch_size: int = 32,
    max_batch_tokens: int = 32768,
    notice: Callable[[str], None] = say,
    should_stop: Callable[[], bool] | None = None,
    **given: Any,
) -> list[GenerationResult]:
    """Return the answers to the prompts: a flat list, prompt by prompt, num_return_sequences per prompt.

    Args:
        model: The model, from `handspun.load`.
        prompts: One or several. A string is a user message (plain text with chat=False); a list of messages is a
            conversation.
        options: GenerationOptions. Single options can also be given by name (`temperature=0.7`).
        chat: Put the prompts into the chat template.
        system_prompt: System message of every prompt. None leaves the template's default.
        tools: Tool definitions (JSON schemas) for the chat template.
        template_args: Values for the chat template's variables, such as {"enable_thinking": False}.
        continue_final_message: Continue each conversation's last message, which must be an assistant's. The answer
            holds only the continuation.
        processors: Custom logits processors, (logits, token_ids) -> logits. Each gets one row's logits, (vocab,),
            and the ids of its prompt and output so far. They run after the penalties, and before the constraint
            and the sampling filters.
        logprobs: Also return each token's log-probability in the model's own distribution.
        explain: Also return how each token was chosen: each processor's effect, the tokens left, the draw. Not
            available for beam search.
        show_tree: Also return the tree that a beam search explored, with each prompt's best answer.
        batch_size: Maximum number of answers (or beams) decoded at a time. It does not change the answers. A
            finished answer makes room for the next.
        max_batch_tokens: Maximum number of prompt and answer tokens in a batch, which bounds its memory. A longer
            answer is decoded alone.
        notice: Receives messages: which settings come from the model, and progress on long prompts every ten
            seconds.
        should_stop: Called before every step. Once it returns True, unfinished answers end as "cancelled".
        **given: Single options by name.

    Raises ConfigError, DataError, TemplateError.
    """
    job = _make_request(
        model, prompts, options, given, chat=chat, system_prompt=system_prompt, tools=tools,
        template_args=template_args, continue_final_message=continue_final_message,
        processors=processors, logprobs=logprobs, explain=explain, show_tree=show_tree, batch_size=batch_size,
        max_batch_tokens=max_batch_tokens, notice=notice, should_stop=should_stop,
    )  # fmt: skip
    answers = answer_all(job)
    if job.options.prompt_lookup_num_tokens:
        notice(_draft_summary(answers))
    return answers


def stream(
    model: ChatModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    chat: bool = True,
    system_prompt: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    template_args: TemplateArgs | None = None,
    continue_final_message: bool = False,
    processors: Sequence[Function] = (),
    logprobs: bool = False,
    explain: bool = False,
    batch_size: int = 32,
    max_batch_tokens: int = 32768,
    notice: Callable[[str], None] = say,
    should_stop: Callable[[], bool] | None = None,
    **given: Any,
) -> Iterator[GenerationChunk]:
    """Yield every answer's text as it grows. The last chunk of each answer holds its result.

    The arguments are those of `generate`, without show_tree.

    A beam search streams the prefix that all of its possible answers share, as soon as it is certain: one chunk
    for each of a prompt's num_return_sequences answers, and the rest of each at the end. If tokens are excluded
    (by a constraint, say), a search may find fewer answers; then only the best is streamed before the end.

    Raises the same errors as `generate`, when it is called rather than at the first chunk.
    """
    job = _make_request(
        model, prompts, options, given, chat=chat, system_prompt=system_prompt, tools=tools,
        template_args=template_args, continue_final_message=continue_final_message,
        processors=processors, logprobs=logprobs, explain=explain, show_tree=False, batch_size=batch_size,
        max_batch_tokens=max_batch_tokens, notice=notice, should_stop=should_stop,
    )  # fmt: skip
    return _chunks(job)


def _make_request(
    model: ChatModel,
    prompts: Prompt | Sequence[Prompt],
    options: GenerationOptions | None,
    given: dict[str, Any],
    *,
    chat: bool,
    system_prompt: str | None,
    tools: list[dict[str, Any]] | None,
    template_args: TemplateArgs | None,
    continue_final_message: bool,
    processors: Sequence[Function],
    logprobs: bool,
    explain: bool,
    show_tree: bool,
    batch_size: int,
    max_batch_tokens: int,
    notice: Callable[[str], None],
    should_stop: Callable[[], bool] | None,
) -> Request:
    counts, flags = {"batch_size": batch_size, "max_batch_tokens": max_batch_tokens}, {
        "chat": chat, "logprobs": logprobs, "explain": explain, "show_tree": show_tree,
        "continue_final_message": continue_final_message,
    }  # fmt: skip
    problems = [text for name, value in counts.items() for text in wrong_argument(name, value, int, 1)]
    problems += [text for name, value in flags.items() for text in wrong_argument(name, value, bool)]
    problems += wrong_argument("system_prompt", system_prompt, str | None)
    if problems:
        raise ConfigError(problems)
    model = _with_template_args(model, template_args)
    resolved, notices = resolve(_with_overrides(options, given), model, chat=chat)
    if explain and resolved.num_beams > 1:
        raise ConfigError(
            f"--explain shows how each token was chosen, but --num-beams {resolved.num_beams} chooses among whole "
            "answers. Remove one of the two options."
        )
    if show_tree and resolved.num_beams == 1:
        raise ConfigError("--show-tree needs a beam search: add --num-beams 2 or more.")
    if resolved.prompt_lookup_num_tokens and (reason := drafting_unsupported_reason(model)):
        raise ConfigError(
            f"--prompt-lookup-num-tokens must undo rejected draft tokens, which this model does not support: "
            f"{reason}. Remove the option."
        )
    prompt_list = as_prompts(prompts)
    _check_seeds(resolved, len(prompt_list))
    encoded = encode_prompts(
        model, prompt_list, chat=chat, system_prompt=system_prompt, tools=tools,
        continue_final_message=continue_final_message,
    )  # fmt: skip
    notices += unencodable_notice(model, prompt_list, encoded, system_prompt=system_prompt)
    notices += rendered_already(model, prompt_list, chat=chat)
    limits = _new_token_limits(model, encoded, resolved.max_new_tokens, notices)
    spares = chat and resolved.repetition_penalty_exempt == "template"
    job = Request(
        model=model,
        options=resolved,
        vocabulary=vocabulary(model.tokenizer),
        prompts=encoded,
        limits=limits,
        logprobs=logprobs,
        with_tools=bool(tools),
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        should_stop=should_stop or (lambda: False),
        functions=tuple(processors),
        explain=explain,
        show_tree=show_tree,
        on_prompt=prompt_progress(notice),
        penalized=said_in(
            model,
            prompt_list,
            system_prompt=system_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
        )
        if spares
        else None,
    )
    _ = job.processors  # raises before decoding starts if the constraint cannot be met
    if reason := fused_decoding_unsupported_reason(model):
        notices.append(f"decoding with transformers' forward, which is slower: {reason}")
    for text in notices:
        notice(text)
    return job


def _with_template_args(model: ChatModel, given: TemplateArgs | None) -> ChatModel:
    """Return the model with these template variables added to its own. Raises ConfigError."""
    args, problems = read_template_args(given)
    if problems:
        raise ConfigError(problems)
    return replace(model, template_args={**model.template_args, **args}) if args else model


def _draft_summary(answers: Sequence[GenerationResult]) -> str:
    drafted = sum(answer.drafted_tokens for answer in answers)
    accepted = sum(answer.accepted_tokens for answer in answers)
    tokens = sum(len(answer.token_ids) for answer in answers)
    return (
        f"prompt lookup: {accepted:,} of {drafted:,} draft tokens were accepted; {tokens:,} tokens were generated"
    )


def _with_overrides(options: GenerationOptions | None, given: dict[str, Any]) -> GenerationOptions:
    """Return the options, overridden by those given by name. Raises ConfigError for an unknown name."""
    if options is not None and not isinstance(options, GenerationOptions):
        raise ConfigError(f"options is {short(options)}: expected a handspun.GenerationOptions instance.")
    if problems := wrong_names(GenerationOptions, given):
        raise ConfigError(problems)
    return replace(options or GenerationOptions(), **given)


def _check_seeds(options: SamplingParams, prompts: int) -> None:
    if isinstance(options.seed, tuple) and len(options.seed) != prompts:
        raise ConfigError(
            f"--seed has {len(options.seed)} seeds for {prompts} prompts. Give one seed, or one per prompt."
        )


def _new_token_limits(
    model: ChatModel, prompts: list[list[int]], max_new_tokens: int, notices: list[str]
) -> list[int]:
    """Return the maximum number of new tokens per prompt. Adds a notice if the context limits it."""
    context = context_length(model)
    if context is None:
        return [max_new_tokens] * len(prompts)
    limits = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    if limits and min(limits) < max_new_tokens:
        notices.append(
            f"max_new_tokens {max_new_tokens} is reduced to {min(limits)}: prompt and answer must fit into the "
            f"model's context of {context} tokens"
        )
    return limits


def answer_all(job: Request) -> list[GenerationResult]:
    """Return the answers to the request's prompts: prompt by prompt, num_return_sequences per prompt."""
    results = [chunk.result for chunk in _chunks(job) if chunk.result is not None]
    return sorted(results, key=lambda result: (result.prompt_index, result.return_index))


def _chunks(job: Request) -> Iterator[GenerationChunk]:
    return beam_search(job) if job.options.num_beams > 1 else decode(job)
