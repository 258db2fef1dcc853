"""The decode loop for greedy decoding and sampling: admit answers, step, sample, retire the finished ones.

An answer gets one token per step, or several if its draft tokens are accepted (`prompt_lookup.py`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handspun.decoding.engines.base import Engine, ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.explain import explain
from handspun.decoding.processors import check_some_left, process
from handspun.decoding.prompt_lookup import draft
from handspun.decoding.request import Completion, Request, check_finite
from handspun.decoding.results import GenerationChunk
from handspun.decoding.sampling import gumbel_noise, select_tokens, stream_of

_PROMPT_TOKENS = 2048
"""Maximum number of prompt tokens in one forward pass. A longer prompt is prefilled in chunks."""
_SECONDS_BETWEEN_NOTICES = 10.0


@dataclass(frozen=True)
class ActiveSequence:
    """An unfinished answer and its row in the engine."""

    answer: Completion
    row: int
    place: int
    """Index into the last step's logits: the position of its newest token."""
    draft: Sequence[int] = ()
    """Draft tokens fed after the newest token. Each has logits too, at the following indices."""


@torch.inference_mode()
def decode(job: Request) -> Iterator[GenerationChunk]:
    """Yield the chunks of all answers, token by token. An answer's text does not depend on the others."""
    engine = make_engine(job.model)
    waiting = deque(Completion.start(job, *name) for name in _answer_ids(job))
    running: list[ActiveSequence] = []
    while waiting or running:
        if job.should_stop():
            yield from [answer.finish("cancelled") for answer in (*(one.answer for one in running), *waiting)]
            return
        logits, running = _step(engine, running, _admit(waiting, running, job))
        yield from _sample_step(logits, running, job)
        running = list(_retire_finished(engine, running))


def feed_prompt(
    engine: Engine,
    prompt_token_ids: Sequence[int],
    on_prompt: Callable[[int, int], None] | None = None,
) -> ModelInput:
    """Add a row, prefill all but the last chunk of its prompt, and return the input for that last chunk.

    on_prompt: called after each prefilled chunk, as `Request.on_prompt`.
    """
    row, start = engine.add(), 0
    while len(prompt_token_ids) - start > _PROMPT_TOKENS:
        engine.forward([ModelInput(row, prompt_token_ids[start : start + _PROMPT_TOKENS])])
        start += _PROMPT_TOKENS
        if on_prompt is not None:
            on_prompt(start, len(prompt_token_ids))
    return ModelInput(row, prompt_token_ids[start:])


def prompt_progress(
    notice: Callable[[str], None], clock: Callable[[], float] = time.monotonic
) -> Callable[[int, int], None]:
    """Return a `Request.on_prompt` that reports progress on a long prompt every ten seconds."""
    said_at = clock()

    def on_prompt(done: int, total: int) -> None:
        nonlocal said_at
        if clock() - said_at >= _SECONDS_BETWEEN_NOTICES:
            said_at = clock()
            notice(f"prefill: {done:,} of {total:,} prompt tokens")

    return on_prompt


def _answer_ids(job: Request) -> list[tuple[int, int]]:
    """Return (prompt index, return index) of all answers, sorted by prompt length."""
    order = sorted(range(len(job.prompts)), key=lambda i: len(job.prompts[i]))
    return [(prompt, back) for prompt in order for back in range(job.options.num_return_sequences)]


def _admit(waiting: deque[Completion], running: Sequence[ActiveSequence], job: Request) -> list[Completion]:
    """Pop as many waiting answers as fit into the batch; at least one if nothing is running."""
    joining: list[Completion] = []
    held, prompts = sum(one.answer.max_total_tokens for one in running), 0
    while waiting and len(running) + len(joining) < job.batch_size:
        answer = waiting[0]
        held += answer.max_total_tokens
        if not (joining and joining[-1].prompt_index == answer.prompt_index):
            prompts += len(answer.prompt_token_ids)
        is_too_much = held > job.max_batch_tokens and (running or joining)
        if is_too_much or (joining and prompts > _PROMPT_TOKENS):
            break
        joining.append(waiting.popleft())
    return joining


def _step(
    engine: Engine, running: Sequence[ActiveSequence], joining: Sequence[Completion]
) -> tuple[Tensor, list[ActiveSequence]]:
    """Run the model on each answer's newest token and draft, and on the prompts of joining answers.

    A prompt with several answers is fed once. Return logits, (tokens, vocab), and all active sequences.
    """
    feeds, place, now = list[ModelInput](), 0, list[ActiveSequence]()
    for one in running:
        drafted = draft(one.answer)
        one.answer.drafted_tokens += len(drafted)
        feeds.append(ModelInput(one.row, [one.answer.token_ids[-1], *drafted], all_logits=True))
        now.append(ActiveSequence(one.answer, one.row, place, drafted))
        place += 1 + len(drafted)
    places = dict[int, int]()
    for answer in joining:
        if answer.prompt_index not in places:
            feeds.append(feed_prompt(engine, answer.prompt_token_ids, answer.job.on_prompt))
            places[answer.prompt_index] = place
            place += 1
    logits = engine.forward(feeds)
    rows = dict(zip(places, (feed.row for feed in feeds[len(running) :]), strict=True))
    for number, answer in enumerate(joining):
        is_first = number == 0 or joining[number - 1].prompt_index != answer.prompt_index
        row = rows[answer.prompt_index]
        now.append(ActiveSequence(answer, row if is_first else engine.fork(row), places[answer.prompt_index]))
    return logits, now


def _sample_step(logits: Tensor, running: Sequence[ActiveSequence], job: Request) -> Iterator[GenerationChunk]:
    """Sample a token for each answer, and further tokens as long as they match its draft.

    logits: (tokens, vocab).
    """
    active, depth = list(running), 0
    while active:
        answers = [one.answer for one in active]
        own = _select_rows(logits, [one.place + depth for one in active])
        tokens, logprobs = _next_tokens(own, answers, job)
        accepted = []
        for one, token, logprob in zip(active, tokens.tolist(), logprobs, strict=True):
            is_right = depth < len(one.draft) and one.draft[depth] == token
            one.answer.accepted_tokens += is_right
            yield one.answer.add(token, logprob)
            if is_right and one.answer.finish_reason is None:
                accepted.append(one)
        active, depth = accepted, depth + 1


def _retire_finished(engine: Engine, running: Sequence[ActiveSequence]) -> Iterator[ActiveSequence]:
    """Free the rows of finished answers. Yield the others, with rejected draft tokens truncated."""
    for one in running:
        if one.answer.finish_reason is not None:
            engine.free(one.row)
            continue
        if one.draft:
            engine.truncate(one.row, len(one.answer.prompt_token_ids) + len(one.answer.token_ids) - 1)
        yield one


def _select_rows(logits: Tensor, places: list[int]) -> Tensor:
    """Select rows, (tokens, vocab) -> (places, vocab), without a copy if all are selected in order."""
    return logits if places == list(range(len(logits))) else logits[places]


def _next_tokens(
    logits: Tensor, answers: Sequence[Completion], job: Request
) -> tuple[Tensor, Sequence[float | None]]:
    """Return the next token of each answer, (answers,), and its log-probability if requested.

    logits: (answers, vocab).
    """
    check_finite(logits, answers, job.model)
    filtered = process(logits, answers, job.processors)
    check_some_left(filtered, answers, job.processors)
    tokens = select_tokens(filtered, draws=_random_streams(answers, job))
    if job.explain:
        _append_explanations(logits, answers, tokens, job)
    if not job.logprobs:
        return tokens, [None] * len(answers)
    return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()


def _append_explanations(logits: Tensor, answers: Sequence[Completion], tokens: Tensor, job: Request) -> None:
    """Append to each answer the explanation of its next token."""
    draws, noise = _random_streams(answers, job), None
    if draws is not None:
        noise = torch.stack([gumbel_noise(stream, step, logits.shape[-1]) for stream, step in draws])
    text_of = job.vocabulary.text_of
    explained = explain(logits, answers, job.processors, tokens=tokens, noise=noise, text_of=text_of)
    for answer, explanation in zip(answers, explained, strict=True):
        answer.explanation.append(explanation)


def _random_streams(answers: Sequence[Completion], job: Request) -> list[tuple[tuple[int, int, int], int]] | None:
    """Return each answer's random stream and step, or None for greedy decoding."""
    if not job.options.do_sample:
        return None
    seed = job.options.seed
    return [(stream_of(seed, a.prompt_index, a.return_index), len(a.token_ids)) for a in answers]
