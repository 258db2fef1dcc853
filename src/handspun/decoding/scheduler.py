"""The decode loop: admit requests, feed their prompts, choose tokens, retire what has ended.

`Scheduler.step` is one forward pass over the newest token of each answer (and its draft tokens, see
`prompt_lookup.py`), the beams of each search (`beam.py`), and the next pieces of the prompts that are being read.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handspun.decoding.beam import Beams, BeamState, CopyingBeamCache, TreeBeamCache, advance
from handspun.decoding.engines.base import ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.explain import explain
from handspun.decoding.processors import check_some_left, process
from handspun.decoding.prompt_lookup import draft
from handspun.decoding.request import Completion, Request, check_finite
from handspun.decoding.results import GenerationChunk
from handspun.decoding.sampling import gumbel_noise, select_tokens, stream_of
from handspun.models.load import ChatModel

_PROMPT_TOKENS = 2048
"""Maximum number of prompt tokens in one step. A longer prompt is prefilled in pieces of this size."""


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How much is decoded at a time. A request that exceeds the limits is decoded alone."""

    rows: int = 32
    """Maximum number of answers and beams."""
    tokens: int = 32768
    """Maximum number of tokens of their prompts and answers at full length."""


DEFAULT_LIMITS = BatchLimits()


@dataclass(eq=False)
class Prefill:
    """A prompt that is being read, and the answers or the search that begin after it."""

    pieces: deque[ModelInput]
    """Those that have not been fed."""
    members: list[Completion | BeamState]
    index: int = 0
    """Index of the last fed piece in the step's logits."""

    @property
    def request(self) -> Request:
        """The request that the prompt belongs to."""
        return self.members[0].request


@dataclass(eq=False)
class ActiveSequence:
    """An unfinished answer and its row in the engine."""

    answer: Completion
    row: int
    index: int
    """Index into the last step's logits: the position of its newest token."""
    draft: Sequence[int] = ()
    """Draft tokens fed after the newest token. Each has logits too, at the following indices."""


def prompt_pieces(row: int, token_ids: Sequence[int]) -> deque[ModelInput]:
    """Return the inputs that feed a prompt to an empty row, one per step."""
    # Cut at multiples of one size, whatever else the step holds: where attention is cut decides how it rounds.
    starts = range(0, len(token_ids), _PROMPT_TOKENS)
    return deque(ModelInput(row, token_ids[start : start + _PROMPT_TOKENS]) for start in starts)


class Scheduler:
    """Requests that share one engine. They join and leave between steps; none changes another's answer.

    model: the model that answers. limits: how much is decoded at a time. make_beams: `TreeBeamCache` or
    `CopyingBeamCache`; by default the tree if the engine is a FusedEngine.
    """

    def __init__(
        self,
        model: ChatModel,
        limits: BatchLimits = DEFAULT_LIMITS,
        make_beams: Callable[..., Beams] | None = None,
    ) -> None:
        self._model, self._limits = model, limits
        self._engine = make_engine(model)
        fastest: Callable[..., Beams] = (
            TreeBeamCache if isinstance(self._engine, FusedEngine) else CopyingBeamCache
        )
        self._make_beams = make_beams or fastest
        self._waiting: deque[Completion | BeamState] = deque()
        self._prompts: list[Prefill] = []
        self._sequences: list[ActiveSequence] = []
        self._searches: list[BeamState] = []

    @property
    def is_idle(self) -> bool:
        """True if there is nothing to do."""
        return not (self._waiting or self._prompts or self._sequences or self._searches)

    def submit(self, request: Request) -> None:
        """Add a request. Its answers begin in one of the next steps."""
        if request.options.num_beams > 1:
            self._waiting.append(BeamState.start(request, self._model.model.config.get_text_config().vocab_size))
        else:
            numbers = range(request.options.num_return_sequences)
            self._waiting += [Completion.start(request, number) for number in numbers]

    @torch.inference_mode()
    def step(self) -> list[tuple[Request, GenerationChunk]]:
        """Run the model once, and return what it added to the answers."""
        self._admit()
        logits = self._forward()
        chunks = self._sample(logits) + self._search(logits)
        self._retire()
        return chunks

    def cancel(self, request: Request) -> list[GenerationChunk]:
        """End a request's unfinished answers with what they have, as "cancelled". Free their rows."""
        cancelled: list[Completion | BeamState] = []
        for prompt in self._prompts:
            if prompt.request is request:
                self._engine.free(prompt.pieces[0].row)
                cancelled += prompt.members
        for one in self._sequences:
            if one.answer.request is request:
                self._engine.free(one.row)
                cancelled.append(one.answer)
        cancelled += [unit for unit in (*self._searches, *self._waiting) if unit.request is request]
        self._prompts = [prompt for prompt in self._prompts if prompt.request is not request]
        self._sequences = [one for one in self._sequences if one.answer.request is not request]
        self._searches = [search for search in self._searches if search.request is not request]
        self._waiting = deque(unit for unit in self._waiting if unit.request is not request)
        return [chunk for unit in cancelled for chunk in unit.cancel()]

    def _admit(self) -> None:
        """Begin with as many waiting answers and searches as fit; with at least one if there is nothing else."""
        members = [member for prompt in self._prompts for member in prompt.members]
        active = [*members, *(one.answer for one in self._sequences), *self._searches]
        rows, tokens = sum(one.rows for one in active), sum(one.max_total_tokens for one in active)
        while self._waiting:
            unit = self._waiting[0]
            rows, tokens = rows + unit.rows, tokens + unit.max_total_tokens
            if rows > unit.rows and (rows > self._limits.rows or tokens > self._limits.tokens):
                return
            self._waiting.popleft()
            if self._prompts and self._prompts[-1].request is unit.request:
                self._prompts[-1].members.append(unit)  # a prompt with several answers is read once
            else:
                pieces = prompt_pieces(self._engine.add(), unit.request.prompt_token_ids)
                self._prompts.append(Prefill(pieces, [unit]))

    def _forward(self) -> Tensor:
        """Run the model on what is decoded and on the next pieces of prompts. Return logits, (tokens, vocab)."""
        inputs: list[ModelInput] = []
        index = 0
        for one in self._sequences:
            one.index, one.draft = index, draft(one.answer)
            one.answer.drafted_tokens += len(one.draft)
            inputs.append(ModelInput(one.row, [one.answer.token_ids[-1], *one.draft], all_logits=True))
            index += 1 + len(one.draft)
        for search in self._searches:
            inputs += search.inputs
            search.indices = list(range(index, index + search.rows))
            index += search.rows
        pieces = self._next_pieces()
        for prompt in pieces:
            inputs.append(prompt.pieces[0])
            prompt.index = index
            index += 1
        logits = self._engine.forward(inputs)
        for prompt in pieces:
            self._advance_prompt(prompt)
        return logits

    def _next_pieces(self) -> list[Prefill]:
        """Return the prompts whose next piece is fed in this step: as many as it may hold, and at least one."""
        chosen, room = list[Prefill](), _PROMPT_TOKENS
        for prompt in self._prompts:
            room -= len(prompt.pieces[0].token_ids)
            if chosen and room < 0:
                break
            chosen.append(prompt)
        return chosen

    def _advance_prompt(self, prompt: Prefill) -> None:
        """Note that a piece has been fed. After the last one, begin with the answers or the search."""
        row, request = prompt.pieces.popleft().row, prompt.request
        if prompt.pieces:
            if request.on_prompt is not None:
                left = sum(len(piece.token_ids) for piece in prompt.pieces)
                request.on_prompt(len(request.prompt_token_ids) - left, len(request.prompt_token_ids))
            return
        self._prompts.remove(prompt)
        for number, member in enumerate(prompt.members):
            if isinstance(member, BeamState):
                member.cache = self._make_beams(self._engine, row, len(request.prompt_token_ids), member.rows)
                member.indices = [prompt.index] * member.rows
                self._searches.append(member)
            else:
                own = self._engine.fork(row) if number else row
                self._sequences.append(ActiveSequence(member, own, prompt.index))

    def _sample(self, logits: Tensor) -> list[tuple[Request, GenerationChunk]]:
        """Choose a token for each answer, and further tokens as long as they match its draft.

        logits: (tokens, vocab).
        """
        chunks = []
        active, depth = list(self._sequences), 0
        while active:
            for group in _grouped(active):
                answers = [one.answer for one in group]
                own = _select_rows(logits, [one.index + depth for one in group])
                tokens, logprobs = self._next_tokens(own, answers)
                for one, token, logprob in zip(group, tokens.tolist(), logprobs, strict=True):
                    one.answer.accepted_tokens += _is_drafted(one, depth, token)
                    chunks.append((one.answer.request, one.answer.add(token, logprob)))
            active = [one for one in active if _is_drafted(one, depth, one.answer.token_ids[-1])]
            active = [one for one in active if one.answer.finish_reason is None]
            depth += 1
        return chunks

    def _next_tokens(self, logits: Tensor, answers: Sequence[Completion]) -> tuple[Tensor, Sequence[float | None]]:
        """Return the next token of each answer, (answers,), and its log-probability if requested.

        logits: (answers, vocab). answers: those of one group.
        """
        processors = answers[0].request.processors
        check_finite(logits, answers, self._model)
        filtered = process(logits, answers, processors)
        check_some_left(filtered, answers, processors)
        tokens = select_tokens(filtered, draws=_random_streams(answers))
        _append_explanations(logits, answers, tokens)
        if not any(answer.request.logprobs for answer in answers):
            return tokens, [None] * len(answers)
        found = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0].tolist()
        return tokens, [p if a.request.logprobs else None for p, a in zip(found, answers, strict=True)]

    def _search(self, logits: Tensor) -> list[tuple[Request, GenerationChunk]]:
        """Advance the beam searches. logits: (tokens, vocab)."""
        groups: dict[object, list[BeamState]] = {}
        for search in self._searches:
            request = search.request
            width = (request.options.num_beams, len(request.options.eos_token_ids))
            groups.setdefault((request.processors, width), []).append(search)
        for group in groups.values():
            own = _select_rows(logits, [index for search in group for index in search.indices])
            check_finite(own, [beam for search in group for beam in search.beams], self._model)
            advance(group, own)
        return [(search.request, chunk) for search in self._searches for chunk in search.chunks()]

    def _retire(self) -> None:
        """Free the rows of finished answers, and truncate the rejected draft tokens of the others."""
        for one in self._sequences:
            answer = one.answer
            if answer.finish_reason is not None:
                self._engine.free(one.row)
            elif one.draft:
                # The newest token is fed in the next step.
                length = len(answer.request.prompt_token_ids) + len(answer.token_ids) - 1
                self._engine.truncate(one.row, length)
        self._sequences = [one for one in self._sequences if one.answer.finish_reason is None]
        self._searches = [search for search in self._searches if not search.done]


def run(
    model: ChatModel,
    requests: Sequence[Request],
    limits: BatchLimits = DEFAULT_LIMITS,
    *,
    should_stop: Callable[[], bool] | None = None,
    make_beams: Callable[..., Beams] | None = None,
) -> Iterator[GenerationChunk]:
    """Yield the chunks of all requests' answers.

    Args:
        model: The model that answers.
        requests: What to answer. Short prompts come first.
        limits: How much is decoded at a time.
        should_stop: Called before every step. Once it returns True, unfinished answers end as "cancelled".
        make_beams: As for `Scheduler`.
    """
    scheduler = Scheduler(model, limits, make_beams)
    ordered = sorted(requests, key=lambda request: len(request.prompt_token_ids))
    for request in ordered:
        scheduler.submit(request)
    while not scheduler.is_idle:
        if should_stop is not None and should_stop():
            for request in ordered:
                yield from scheduler.cancel(request)
            return
        for _, chunk in scheduler.step():
            yield chunk


def _grouped(active: Sequence[ActiveSequence]) -> list[list[ActiveSequence]]:
    """Return the sequences whose logits are processed in one call: those that share their processors."""
    groups: dict[object, list[ActiveSequence]] = {}
    for one in active:
        request = one.answer.request
        groups.setdefault((request.processors, request.options.do_sample), []).append(one)
    return list(groups.values())


def _is_drafted(one: ActiveSequence, depth: int, token: int) -> bool:
    return depth < len(one.draft) and one.draft[depth] == token


def _select_rows(logits: Tensor, indices: list[int]) -> Tensor:
    """Select rows, (tokens, vocab) -> (indices, vocab), without a copy if all are selected in order."""
    return logits if indices == list(range(len(logits))) else logits[indices]


def _append_explanations(logits: Tensor, answers: Sequence[Completion], tokens: Tensor) -> None:
    """Append the explanation of its next token to each answer that asks for one."""
    chosen = [i for i, answer in enumerate(answers) if answer.request.explain]
    if not chosen:
        return
    asking = [answers[i] for i in chosen]
    draws, noise = _random_streams(asking), None
    if draws is not None:
        noise = torch.stack([gumbel_noise(stream, step, logits.shape[-1]) for stream, step in draws])
    request = asking[0].request
    explained = explain(
        _select_rows(logits, chosen), asking, request.processors,
        tokens=tokens[chosen], noise=noise, text_of=request.vocabulary.text_of,
    )  # fmt: skip
    for answer, explanation in zip(asking, explained, strict=True):
        answer.explanation.append(explanation)


def _random_streams(answers: Sequence[Completion]) -> list[tuple[tuple[int, int, int], int]] | None:
    """Return each answer's random stream and step, or None for greedy decoding."""
    if not answers[0].request.options.do_sample:
        return None
    return [
        (stream_of(a.request.options.seed, a.request.prompt_index, a.return_index), len(a.token_ids))
        for a in answers
    ]
