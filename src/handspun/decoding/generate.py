"""Answers to prompts: processors -> choose -> step -> loop.

`generate` and `stream` make a job of what they are given; `_decode` is the loop of greedy decoding and
sampling, and `beam_search` the other one.
"""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from handspun.config import GenerationOptions
from handspun.decoding.answer import Answer, Job, prefill
from handspun.decoding.beam import beam_search
from handspun.decoding.detokenize import vocabulary
from handspun.decoding.engine import Engine
from handspun.decoding.options import ResolvedOptions, resolve
from handspun.decoding.processors import process
from handspun.decoding.prompts import Prompt, as_prompts, context_length, encode_prompts
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.decoding.sampling import choose, stream_of
from handspun.errors import ConfigError
from handspun.models.load import ChatModel


def _print_notice(text: str) -> None:
    print(text, file=sys.stderr)


def generate(
    model: ChatModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    chat: bool = True,
    system_prompt: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    logprobs: bool = False,
    batch_size: int = 8,
    notice: Callable[[str], None] = _print_notice,
    should_stop: Callable[[], bool] | None = None,
    **given: Any,
) -> list[GenerationResult]:
    """Answers to the prompts: a flat list, prompt by prompt, num_return_sequences each.

    prompts: one or several; a string is a user message, a list of messages a conversation. With chat=False,
        a string is plain text.
    options: GenerationOptions; single ones can also be given by their names (`temperature=0.7`).
    logprobs: also give each token's log-probability in the model's own distribution.
    batch_size: most answers (or beams) that are decoded at a time; it does not change them.
    notice: told what was taken over from the model.
    should_stop: asked before every step; once it says yes, what there is is returned as "cancelled".

    Raises ConfigError, DataError, TemplateError.
    """
    job = _job(
        model, prompts, options, given, chat=chat, system_prompt=system_prompt, tools=tools,
        logprobs=logprobs, batch_size=batch_size, notice=notice, should_stop=should_stop,
    )  # fmt: skip
    return answer_all(job)


def stream(
    model: ChatModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    chat: bool = True,
    system_prompt: str | None = None,
    tools: list[dict[str, Any]] | None = None,
    logprobs: bool = False,
    batch_size: int = 8,
    notice: Callable[[str], None] = _print_notice,
    should_stop: Callable[[], bool] | None = None,
    **given: Any,
) -> Iterator[GenerationChunk]:
    """As `generate`, but gives every answer's text as it grows; the last chunk of each holds its result.

    Raises ConfigError for a beam search, besides generate's errors, at once and not at the first chunk.
    """
    job = _job(
        model, prompts, options, given, chat=chat, system_prompt=system_prompt, tools=tools,
        logprobs=logprobs, batch_size=batch_size, notice=notice, should_stop=should_stop,
    )  # fmt: skip
    if job.options.num_beams > 1:
        raise ConfigError(
            f"--num-beams {job.options.num_beams} cannot be streamed: which beam wins is known only at the "
            "end. Use generate without streaming, or --num-beams 1."
        )
    return _decode_all(job)


def _job(
    model: ChatModel,
    prompts: Prompt | Sequence[Prompt],
    options: GenerationOptions | None,
    given: dict[str, Any],
    *,
    chat: bool,
    system_prompt: str | None,
    tools: list[dict[str, Any]] | None,
    logprobs: bool,
    batch_size: int,
    notice: Callable[[str], None],
    should_stop: Callable[[], bool] | None,
) -> Job:
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: expected at least 1.")
    resolved, notices = resolve(_with_given(options, given), model, chat=chat)
    several = as_prompts(prompts)
    _check_seeds(resolved, len(several))
    encoded = encode_prompts(model, several, chat=chat, system_prompt=system_prompt, tools=tools)
    limits = _limits(model, encoded, resolved.max_new_tokens, notices)
    for text in notices:
        notice(text)
    return Job(
        model=model,
        options=resolved,
        vocabulary=vocabulary(model.tokenizer),
        prompts=encoded,
        limits=limits,
        logprobs=logprobs,
        with_tools=bool(tools),
        batch_size=batch_size,
        should_stop=should_stop or (lambda: False),
    )


def _with_given(options: GenerationOptions | None, given: dict[str, Any]) -> GenerationOptions:
    """The options with the single ones on top. Raises ConfigError for a name that there is not."""
    names = [field.name for field in fields(GenerationOptions)]
    problems = []
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(names)}."
            problems.append(f"there is no option {name}. {hint}")
    if problems:
        raise ConfigError(problems)
    return replace(options or GenerationOptions(), **given)


def _check_seeds(options: ResolvedOptions, prompts: int) -> None:
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


def answer_all(job: Job) -> list[GenerationResult]:
    """Answers to the job's prompts: prompt by prompt, num_return_sequences each."""
    if job.options.num_beams > 1:
        results = [result for batch in _beam_batches(job) for result in beam_search(batch, job)]
    else:
        results = [chunk.result for chunk in _decode_all(job) if chunk.result is not None]
    return sorted(results, key=lambda result: (result.prompt_index, result.return_index))


def _by_length(job: Job) -> list[int]:
    """Prompt indices, similar lengths together, so that there is little padding."""
    return sorted(range(len(job.prompts)), key=lambda i: len(job.prompts[i]))


def _beam_batches(job: Job) -> Iterator[list[int]]:
    """Prompt indices for one beam search at a time."""
    order, size = _by_length(job), max(1, job.batch_size // job.options.num_beams)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _decode_all(job: Job) -> Iterator[GenerationChunk]:
    """All answers, a batch after another."""
    returned = range(job.options.num_return_sequences)
    names = [(prompt, back) for prompt in _by_length(job) for back in returned]
    for start in range(0, len(names), job.batch_size):
        yield from _decode([Answer.start(job, *name) for name in names[start : start + job.batch_size]], job)


def _decode(answers: list[Answer], job: Job) -> Iterator[GenerationChunk]:
    """One batch of answers, token by token; those that have ended leave the batch."""
    engine = Engine(job.model.model)
    tokens: Tensor | None = None
    for step in count():
        if job.should_stop():
            yield from [answer.finish("cancelled") for answer in answers]
            return
        logits = prefill(engine, answers, job) if tokens is None else engine.step(tokens)
        tokens, logprobs = _next_tokens(logits, answers, step, job)
        yield from [
            answer.add(token, logprob)
            for answer, token, logprob in zip(answers, tokens.tolist(), logprobs, strict=True)
        ]
        going = [i for i, answer in enumerate(answers) if answer.finish_reason is None]
        if not going:
            return
        if len(going) < len(answers):
            rows = torch.tensor(going, device=tokens.device)
            engine.reorder(rows)
            tokens, answers = tokens[rows], [answers[i] for i in going]


def _next_tokens(
    logits: Tensor, answers: list[Answer], step: int, job: Job
) -> tuple[Tensor, Sequence[float | None]]:
    """(rows, vocab) -> the next token of each answer, (rows,), and their log-probabilities if wanted."""
    filtered = process(logits, answers, job.processors)
    tokens = choose(filtered, streams=_streams(answers, job.options), step=step)
    if not job.logprobs:
        return tokens, [None] * len(answers)
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()


def _streams(answers: list[Answer], options: ResolvedOptions) -> list[tuple[int, int, int]] | None:
    if not options.do_sample:
        return None
    return [stream_of(options.seed, answer.prompt_index, answer.return_index) for answer in answers]


__all__ = ["answer_all", "generate", "stream"]
