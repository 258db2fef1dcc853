"""Answers to prompts: processors -> choose -> step -> loop.

`generate` and `stream` make a job of what they are given; `decode` is the loop of greedy decoding and
sampling, and `beam_search` the other one.
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
    """Answers to the prompts: a flat list, prompt by prompt, num_return_sequences each.

    prompts: one or several; a string is a user message, a list of messages a conversation. With chat=False,
        a string is plain text.
    options: GenerationOptions; single ones can also be given by their names (`temperature=0.7`).
    template_args: values for the chat template's variables, such as {"enable_thinking": False}.
    continue_final_message: go on with each conversation's last message, an assistant's; the answer comes after it.
    processors: functions of your own, (logits, token_ids) -> logits: of one row, (vocab,), with the ids of its
        prompt and output so far. They come behind the penalties, before the constraint and what sampling has.
    logprobs: also give each token's log-probability in the model's own distribution.
    explain: also say how each token came to be: what the processors did, what was left, the draw; not of beams.
    show_tree: also give what a beam search looked at, with each prompt's best answer.
    batch_size: most answers (or beams) that are decoded at a time; it does not change them. One that has ended
        makes room for the next.
    max_batch_tokens: most tokens of prompts and answers (or beams) in a batch, which bounds its memory; a longer
        one is decoded alone.
    notice: told what was taken over from the model, and every ten seconds where a long prompt is.
    should_stop: asked before every step; once it says yes, what there is is returned as "cancelled".

    Raises ConfigError, DataError, TemplateError.
    """
    job = _job(
        model, prompts, options, given, chat=chat, system_prompt=system_prompt, tools=tools,
        template_args=template_args, continue_final_message=continue_final_message,
        processors=processors, logprobs=logprobs, explain=explain, show_tree=show_tree, batch_size=batch_size,
        max_batch_tokens=max_batch_tokens, notice=notice, should_stop=should_stop,
    )  # fmt: skip
    answers = answer_all(job)
    if job.options.prompt_lookup_num_tokens:
        notice(_drafted(answers))
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
    """As `generate`, but gives every answer's text as it grows; the last chunk of each holds its result.

    Of a beam search, what all answers that it may still return begin with is given as soon as it is known: as a
    chunk of each of a prompt's num_return_sequences answers, and the rest of each at the end. Where tokens are
    excluded (by a constraint, say) a search may find fewer answers; then only the best is streamed before the end.

    Raises generate's errors, at once and not at the first chunk.
    """
    job = _job(
        model, prompts, options, given, chat=chat, system_prompt=system_prompt, tools=tools,
        template_args=template_args, continue_final_message=continue_final_message,
        processors=processors, logprobs=logprobs, explain=explain, show_tree=False, batch_size=batch_size,
        max_batch_tokens=max_batch_tokens, notice=notice, should_stop=should_stop,
    )  # fmt: skip
    return _chunks(job)


def _job(
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
    resolved, notices = resolve(_with_given(options, given), model, chat=chat)
    if explain and resolved.num_beams > 1:
        raise ConfigError(
            f"--explain tells how one token after another was chosen, and --num-beams {resolved.num_beams} "
            "chooses among whole answers. Leave one of them out."
        )
    if show_tree and resolved.num_beams == 1:
        raise ConfigError("--show-tree shows what a beam search looks at: give --num-beams 2 or more with it.")
    if resolved.prompt_lookup_num_tokens and (reason := drafting_unsupported_reason(model)):
        raise ConfigError(
            f"--prompt-lookup-num-tokens takes wrong drafts back, and that cannot be done here: {reason}. Leave "
            "it out."
        )
    several = as_prompts(prompts)
    _check_seeds(resolved, len(several))
    encoded = encode_prompts(
        model, several, chat=chat, system_prompt=system_prompt, tools=tools,
        continue_final_message=continue_final_message,
    )  # fmt: skip
    notices += unencodable_notice(model, several, encoded, system_prompt=system_prompt)
    notices += rendered_already(model, several, chat=chat)
    limits = _limits(model, encoded, resolved.max_new_tokens, notices)
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
            several,
            system_prompt=system_prompt,
            tools=tools,
            continue_final_message=continue_final_message,
        )
        if spares
        else None,
    )
    _ = job.processors  # a constraint that cannot be met is said before anything is decoded
    if reason := fused_decoding_unsupported_reason(model):
        notices.append(f"decoded through transformers' own forward, which is slower: {reason}")
    for text in notices:
        notice(text)
    return job


def _with_template_args(model: ChatModel, given: TemplateArgs | None) -> ChatModel:
    """The model with these values for its template's variables, beside its own. Raises ConfigError."""
    args, problems = read_template_args(given)
    if problems:
        raise ConfigError(problems)
    return replace(model, template_args={**model.template_args, **args}) if args else model


def _drafted(answers: Sequence[GenerationResult]) -> str:
    drafted = sum(answer.drafted_tokens for answer in answers)
    accepted = sum(answer.accepted_tokens for answer in answers)
    tokens = sum(len(answer.token_ids) for answer in answers)
    return (
        f"prompt lookup: {accepted:,} of {drafted:,} drafted tokens were accepted, and {tokens:,} were generated"
    )


def _with_given(options: GenerationOptions | None, given: dict[str, Any]) -> GenerationOptions:
    """The options with the single ones on top. Raises ConfigError for a name that there is not."""
    if options is not None and not isinstance(options, GenerationOptions):
        raise ConfigError(f"options is {short(options)}: expected a handspun.GenerationOptions.")
    if problems := wrong_names(GenerationOptions, given):
        raise ConfigError(problems)
    return replace(options or GenerationOptions(), **given)


def _check_seeds(options: SamplingParams, prompts: int) -> None:
    if isinstance(options.seed, tuple) and len(options.seed) != prompts:
        raise ConfigError(
            f"--seed has {len(options.seed)} seeds for {prompts} prompts: give one, or one for each prompt."
        )


def _limits(model: ChatModel, prompts: list[list[int]], max_new_tokens: int, notices: list[str]) -> list[int]:
    """Most new tokens for each prompt. Adds a notice where that is less than max_new_tokens."""
    context = context_length(model)
    if context is None:
        return [max_new_tokens] * len(prompts)
    limits = [min(max_new_tokens, context - len(ids)) for ids in prompts]
    if limits and min(limits) < max_new_tokens:
        notices.append(
            f"max_new_tokens {max_new_tokens} is cut to {min(limits)} where prompt and answer together fill the "
            f"model's context of {context} tokens"
        )
    return limits


def answer_all(job: Request) -> list[GenerationResult]:
    """Answers to the job's prompts: prompt by prompt, num_return_sequences each."""
    results = [chunk.result for chunk in _chunks(job) if chunk.result is not None]
    return sorted(results, key=lambda result: (result.prompt_index, result.return_index))


def _chunks(job: Request) -> Iterator[GenerationChunk]:
    return beam_search(job) if job.options.num_beams > 1 else decode(job)
