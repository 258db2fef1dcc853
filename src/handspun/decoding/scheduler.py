"""The decode loop: admit requests, feed their prompts, choose tokens, retire what has ended.

`Scheduler.step` is one forward pass over the newest token of each answer (and its draft tokens, see
`prompt_lookup.py`), the beams of each search (`beam.py`), and the next pieces of the prompts that are being read.

A server's scheduler also bounds a step's time (`step_budget.py`), keeps the beginnings of prompts
(`prefix_cache.py`), and lets an error end the request that caused it alone (`Request.on_error`).
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from handspun.decoding.beam import Beams, BeamState, CopyingBeamCache, TreeBeamCache, advance
from handspun.decoding.engines.base import ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.next_tokens import next_tokens, score_prompt_tokens, select_rows
from handspun.decoding.prefix_cache import BLOCK, PrefixCache
from handspun.decoding.prompt_lookup import draft
from handspun.decoding.request import Completion, Request, check_finite
from handspun.decoding.results import GenerationChunk
from handspun.decoding.step_budget import StepBudget
from handspun.models.load import ChatModel

_PROMPT_TOKENS = 2048
"""Maximum number of prompt tokens in one step. A longer prompt is prefilled in pieces of this size."""
_SCORED_TOKENS = 128
"""Maximum number of prompt tokens in one step whose logits are needed: each is a row as wide as the vocabulary."""
_PATIENCE = 2.0
"""Seconds after which a prompt is read before shorter ones, within a step's budget."""


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """How much is decoded at a time. A request that exceeds the limits is decoded alone."""

    rows: int = 32
    """Maximum number of answers and beams."""
    tokens: int = 32768
    """Maximum number of tokens of their prompts and answers at full length."""
    step_seconds: float | None = None
    """Longest a step should take, by a cost model that learns. None: a step reads up to 2,048 prompt tokens."""
    kv_tokens: int | None = None
    """Fixed size of the KV cache, in which each answer reserves its full length. None: it grows as needed."""
    cache_bytes: int = 0
    """Maximum size of the keys and values kept of earlier prompts."""


DEFAULT_LIMITS = BatchLimits()


@dataclass(eq=False)
class Prefill:
    """A prompt that is being read, and the answers or the search that begin after it."""

    row: int
    token_ids: list[int]
    members: list[Completion | BeamState]
    reserved: list[int]
    """A row per further answer that holds its place until the prompt has been read."""
    since: float
    done: int | None = None
    """Number of its tokens that have been read. None: not begun."""
    index: int = 0
    """Index of the last piece's first logits among the step's."""

    @property
    def request(self) -> Request:
        """The request that the prompt belongs to."""
        return self.members[0].request

    @property
    def remaining(self) -> int:
        """Number of its tokens that have not been read."""
        return len(self.token_ids) - (self.done or 0)

    @property
    def unscored(self) -> int:
        """Number of its first tokens whose logits are not needed. The last token's always are."""
        request = self.request
        return request.scored_from - 1 if request.prompt_logprobs else len(self.token_ids)

    @property
    def is_scored(self) -> bool:
        """True if all logits of its next tokens are needed."""
        return (self.done or 0) >= self.unscored


@dataclass
class StepLoad:
    """What a step computed: tokens of answers (drafts and beams included), and of prompts."""

    answers: int = 0
    prompt_tokens: int = 0


@dataclass(eq=False)
class ActiveSequence:
    """An unfinished answer and its row in the engine."""

    answer: Completion
    row: int
    index: int
    """Index into the last step's logits: the position of its newest token."""
    draft: Sequence[int] = ()
    """Draft tokens fed after the newest token. Each has logits too, at the following indices."""


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
        self._engine = make_engine(model, limits.kv_tokens)
        self._budget = None
        self._prefixes = None
        if isinstance(self._engine, FusedEngine):  # others read prompts only whole, and cannot give out their keys
            self._budget = StepBudget(limits.step_seconds) if limits.step_seconds is not None else None
            self._prefixes = PrefixCache(limits.cache_bytes) if limits.cache_bytes else None
        fastest: Callable[..., Beams] = (
            TreeBeamCache if isinstance(self._engine, FusedEngine) else CopyingBeamCache
        )
        self._make_beams = make_beams or fastest
        self._waiting: deque[Completion | BeamState] = deque()
        self._prompts: list[Prefill] = []
        self._sequences: list[ActiveSequence] = []
        self._searches: list[BeamState] = []
        self.load = StepLoad()

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
        started = time.perf_counter()
        self._admit()
        logits = self._forward()
        chunks = self._finish_scored() + self._sample(logits) + self._search(logits)
        self._retire()
        if self._budget is not None:
            answers, prompt_tokens = self.load.answers, self.load.prompt_tokens
            self._budget.measured(
                answers=answers, prompt_tokens=prompt_tokens, seconds=time.perf_counter() - started
            )
        return chunks

    def waiting(self) -> set[Request]:
        """Return the requests of which nothing has begun."""
        return {unit.request for unit in self._waiting} - self._begun()

    def unfinished(self) -> set[Request]:
        """Return the requests of which an answer is not complete."""
        return {unit.request for unit in self._waiting} | self._begun()

    def _begun(self) -> set[Request]:
        begun = [member.request for prompt in self._prompts for member in prompt.members]
        begun += [one.answer.request for one in self._sequences] + [search.request for search in self._searches]
        return set(begun)

    def kv_tokens(self) -> tuple[int, int]:
        """Return (tokens reserved, tokens in all) of the KV cache; zeros if the engine does not count them."""
        if not isinstance(self._engine, FusedEngine):
            return 0, 0
        return self._engine.cache.used_tokens, self._engine.cache.tokens

    def cache_bytes(self) -> int:
        """Return the size of the keys and values kept of earlier prompts."""
        return 0 if self._prefixes is None else self._prefixes.bytes

    def cancel(self, request: Request) -> list[GenerationChunk]:
        """End a request's unfinished answers with what they have, as "cancelled". Free their rows."""
        cancelled: list[Completion | BeamState] = []
        for prompt in self._prompts:
            if prompt.request is request:
                for row in (prompt.row, *prompt.reserved):
                    self._engine.free(row)
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

    def _fail(self, request: Request, error: BaseException) -> None:
        """End a request with an error, or raise it if the request does not take errors."""
        if request.on_error is None or isinstance(error, KeyboardInterrupt | SystemExit):
            raise error
        with suppress(Exception):  # its answers may be damaged, but its rows must go
            self.cancel(request)
        request.on_error(error)

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
            if rows > unit.rows and not self._has_room(unit):
                return
            self._waiting.popleft()
            try:
                self._begin(unit)
            except MemoryError as error:
                self._fail(unit.request, error)

    def _has_room(self, unit: Completion | BeamState) -> bool:
        engine = self._engine
        return not isinstance(engine, FusedEngine) or engine.cache.has_room(unit.reserved_tokens)

    def _begin(self, unit: Completion | BeamState) -> None:
        """Add a row for an answer or a search, whose prompt is read from the next step on."""
        if self._prompts and self._prompts[-1].request is unit.request and not self._prompts[-1].done:
            if self._reserved(unit):
                self._prompts[-1].reserved.append(self._engine.add(self._reserved(unit)))
            self._prompts[-1].members.append(unit)  # a prompt with several answers is read once
        else:
            row = self._engine.add(self._reserved(unit))
            self._prompts.append(Prefill(row, unit.request.read_token_ids, [unit], [], time.monotonic()))

    def _reserved(self, unit: Completion | BeamState) -> int:
        """Return the room in the KV cache that is reserved for an answer or a search: none if the cache grows."""
        return 0 if self._limits.kv_tokens is None else unit.reserved_tokens

    def _forward(self) -> Tensor:
        """Run the model on what is decoded and on the next pieces of prompts. Return logits, (tokens, vocab)."""
        inputs: list[ModelInput] = []
        owners: list[Request] = []
        index = 0
        for one in self._sequences:
            one.index, one.draft = index, draft(one.answer)
            one.answer.drafted_tokens += len(one.draft)
            inputs.append(ModelInput(one.row, [one.answer.token_ids[-1], *one.draft], all_logits=True))
            owners.append(one.answer.request)
            index += 1 + len(one.draft)
        for search in self._searches:
            inputs += search.inputs
            owners += [search.request] * len(search.inputs)
            search.indices = list(range(index, index + search.rows))
            index += search.rows
        self.load = StepLoad(index, 0)
        pieces = self._next_pieces()
        for prompt, count in pieces:
            done, is_scored = prompt.done or 0, prompt.is_scored
            inputs.append(ModelInput(prompt.row, prompt.token_ids[done : done + count], all_logits=is_scored))
            owners.append(prompt.request)
            prompt.index = index
            index += count if is_scored else 1
            self.load.prompt_tokens += count
        logits = self._run(inputs, owners)
        for prompt, count in pieces:
            if prompt in self._prompts:  # else it failed
                self._advance_prompt(prompt, count, logits)
        return logits

    def _run(self, inputs: Sequence[ModelInput], owners: Sequence[Request]) -> Tensor:
        """Run the model. If that fails, run each request's inputs alone, and end those that fail again."""
        engine = self._engine
        if not inputs:  # what was to begin had no room
            return torch.empty(0, 0)
        if not isinstance(engine, FusedEngine):  # its rows cannot go back to where they were
            return self._run_or_fail(inputs, dict.fromkeys(owners))
        before = [engine.length(one.row) for one in inputs]
        try:
            return engine.forward(inputs)
        except BaseException:
            if any(owner.on_error is None for owner in owners):
                raise
        for one, length in zip(inputs, before, strict=True):
            engine.truncate(one.row, length)
        found: list[Tensor] = [torch.empty(0)] * len(inputs)
        for request in dict.fromkeys(owners):
            own = [i for i, owner in enumerate(owners) if owner is request]
            logits = self._run_or_fail([inputs[i] for i in own], [request])
            counts = [len(inputs[i].token_ids) if inputs[i].all_logits else 1 for i in own]
            for i, part in zip(own, logits.split(counts), strict=True):
                found[i] = part
        return torch.cat(found)

    def _run_or_fail(self, inputs: Sequence[ModelInput], requests: Iterable[Request]) -> Tensor:
        """Run the model. If that fails, end the requests, and return zeros that nobody reads."""
        try:
            return self._engine.forward(inputs)
        except BaseException as error:
            for request in requests:
                self._fail(request, error)
            count = sum(len(one.token_ids) if one.all_logits else 1 for one in inputs)
            return torch.zeros(count, self._model.model.config.get_text_config().vocab_size)

    def _next_pieces(self) -> list[tuple[Prefill, int]]:
        """Return the prompts that are read in this step and how many of their tokens; at least one prompt's."""
        room, order = _PROMPT_TOKENS, self._prompts
        if self._budget is not None:
            room = self._budget.prompt_tokens(are_answers_waiting=self.load.answers > 0)
            late = time.monotonic() - _PATIENCE
            order = sorted(self._prompts, key=lambda prompt: (prompt.since > late, prompt.remaining))
        chosen: list[tuple[Prefill, int]] = []
        for prompt in order:
            if prompt.done is None:
                if self._is_known_soon(prompt, chosen):
                    continue
                self._begin_prompt(prompt)
            done = prompt.done or 0
            piece = _SCORED_TOKENS if prompt.is_scored else min(_PROMPT_TOKENS, prompt.unscored - done)
            piece = min(prompt.remaining, piece)
            if self._budget is not None:
                piece = min(piece, room)
            if piece > room or not piece:
                break
            chosen.append((prompt, piece))
            room -= piece
        return chosen

    def _is_known_soon(self, prompt: Prefill, chosen: Sequence[tuple[Prefill, int]]) -> bool:
        """Return whether a prompt of this step begins with the same block, which can be copied afterwards."""
        if self._prefixes is None or prompt.request.cache_namespace is None or prompt.remaining <= BLOCK:
            return False
        space, first = prompt.request.cache_namespace, prompt.token_ids[:BLOCK]
        return any(
            other.request.cache_namespace == space and other.token_ids[:BLOCK] == first for other, _ in chosen
        )

    def _begin_prompt(self, prompt: Prefill) -> None:
        """Copy what is known of a prompt's keys and values. Scored tokens need their logits."""
        request, prompt.done = prompt.request, 0
        if self._prefixes is not None and request.cache_namespace is not None:
            assert isinstance(self._engine, FusedEngine)
            unscored = prompt.token_ids[: prompt.unscored + 1]
            for block in self._prefixes.find(request.cache_namespace, unscored):
                self._engine.cache.append(prompt.row, block.keys_values)
                prompt.done += BLOCK
        for member in prompt.members:
            _first(member).cached_tokens = prompt.done
        if request.on_start is not None:
            request.on_start(prompt.done)

    def _advance_prompt(self, prompt: Prefill, count: int, logits: Tensor) -> None:
        """Note that a piece has been read. After the last one, begin with the answers or the search."""
        assert prompt.done is not None
        request, row, is_scored = prompt.request, prompt.row, prompt.is_scored
        if is_scored:
            self._score_prompt(prompt, count, logits)
        prompt.done += count
        if prompt.remaining:
            if request.on_prompt is not None:
                request.on_prompt(prompt.done, len(prompt.token_ids))
            return
        self._remember(row, request, prompt.token_ids)
        last = prompt.index + (count - 1 if is_scored else 0)
        for number, member in enumerate(prompt.members):
            if isinstance(member, BeamState):
                member.cache = self._make_beams(self._engine, row, len(prompt.token_ids), member.rows)
                member.indices = [last] * member.rows
                self._searches.append(member)
            else:
                own = self._fork(prompt, member) if number else row
                self._sequences.append(ActiveSequence(member, own, last))
        self._prompts.remove(prompt)

    def _fork(self, prompt: Prefill, member: Completion) -> int:
        """Return a row with a copy of the prompt, in the place that was reserved for it."""
        if prompt.reserved:
            self._engine.free(prompt.reserved.pop())
        return self._engine.fork(prompt.row, self._reserved(member))

    def _remember(self, row: int, request: Request, token_ids: Sequence[int]) -> None:
        """Keep the row's keys and values for later requests of the same namespace."""
        if self._prefixes is not None and request.cache_namespace is not None:
            assert isinstance(self._engine, FusedEngine)
            cache = self._engine.cache
            self._prefixes.add(
                request.cache_namespace, token_ids, lambda start, stop: cache.copy_of(row, start, stop)
            )

    def _score_prompt(self, prompt: Prefill, count: int, logits: Tensor) -> None:
        """Add the scores of the prompt's tokens that the piece's logits predict."""
        assert prompt.done is not None
        following = prompt.token_ids[prompt.done + 1 : prompt.done + 1 + count]
        # Not those of the answer.
        following = following[: max(0, len(prompt.request.prompt_token_ids) - 1 - prompt.done)]
        if following:
            own = logits[prompt.index : prompt.index + len(following)]
            scores = score_prompt_tokens(own, following, prompt.request.top_logprobs)
            for member in prompt.members:
                _first(member).prompt_scores += scores

    def _finish_scored(self) -> list[tuple[Request, GenerationChunk]]:
        """End the answers of no tokens, whose prompts were scored."""
        ended = [one for one in self._sequences if one.answer.request.max_new_tokens == 0]
        return [(one.answer.request, one.answer.finish("length")) for one in ended]

    def _sample(self, logits: Tensor) -> list[tuple[Request, GenerationChunk]]:
        """Choose a token for each answer, and further tokens as long as they match its draft.

        logits: (tokens, vocab).
        """
        chunks: list[tuple[Request, GenerationChunk]] = []
        active, depth = [one for one in self._sequences if one.answer.finish_reason is None], 0
        while active:
            for group in _grouped(active):
                chunks += self._sample_group(logits, group, depth)
            active = [one for one in active if one in self._sequences and one.answer.finish_reason is None]
            active = [one for one in active if _is_drafted(one, depth, one.answer.token_ids[-1])]
            depth += 1
        return chunks

    def _sample_group(
        self, logits: Tensor, group: Sequence[ActiveSequence], depth: int
    ) -> list[tuple[Request, GenerationChunk]]:
        """Choose a token for each answer of a group. If that fails, for each alone; end those that fail again."""
        answers = [one.answer for one in group]
        try:
            tokens, scores = next_tokens(
                select_rows(logits, [one.index + depth for one in group]), answers, self._model
            )
        except BaseException as error:
            if len(group) > 1 and all(answer.request.on_error is not None for answer in answers):
                alone = [one for one in group if one in self._sequences]
                return [chunk for one in alone for chunk in self._sample_group(logits, [one], depth)]
            self._fail(answers[0].request, error)
            return []
        chunks = []
        for one, token, score in zip(group, tokens.tolist(), scores, strict=True):
            one.answer.accepted_tokens += _is_drafted(one, depth, token)
            chunks.append((one.answer.request, one.answer.add(token, score)))
        return chunks

    def _search(self, logits: Tensor) -> list[tuple[Request, GenerationChunk]]:
        """Advance the beam searches. logits: (tokens, vocab)."""
        groups: dict[object, list[BeamState]] = {}
        for search in self._searches:
            request = search.request
            width = (request.options.num_beams, len(request.options.eos_token_ids))
            groups.setdefault((request.processors, width), []).append(search)
        for group in groups.values():
            # A search that fails is damaged, so those that take errors are advanced alone.
            if all(search.request.on_error is not None for search in group):
                for search in group:
                    self._advance_searches([search], logits)
            else:
                self._advance_searches(group, logits)
        return [(search.request, chunk) for search in self._searches for chunk in search.chunks()]

    def _advance_searches(self, searches: Sequence[BeamState], logits: Tensor) -> None:
        own = select_rows(logits, [index for search in searches for index in search.indices])
        try:
            check_finite(own, [beam for search in searches for beam in search.beams], self._model)
            advance(searches, own)
        except BaseException as error:
            self._fail(searches[0].request, error)

    def _retire(self) -> None:
        """Free the rows of finished answers, and truncate the rejected draft tokens of the others."""
        for one in self._sequences:
            answer = one.answer
            if answer.finish_reason is not None:
                self._keep_answer(one)
                self._engine.free(one.row)
            elif one.draft:
                # The newest token is fed in the next step.
                length = len(answer.request.prompt_token_ids) + len(answer.token_ids) - 1
                self._engine.truncate(one.row, length)
        self._sequences = [one for one in self._sequences if one.answer.finish_reason is None]
        self._searches = [search for search in self._searches if not search.done]

    def _keep_answer(self, one: ActiveSequence) -> None:
        """Keep an ended answer's keys and values, since the next turn's prompt begins with prompt and answer."""
        # Only where no bit depends on whether they were computed as an answer's or as a prompt's.
        if isinstance(self._engine, FusedEngine) and self._engine.is_exact:
            read = one.answer.request.prompt_token_ids + one.answer.token_ids
            fed = read[: self._engine.length(one.row)]  # not the last token, nor rejected drafts
            self._remember(one.row, one.answer.request, fed)


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


def _first(member: Completion | BeamState) -> Completion:
    """Return an answer, or what all of a search's beams are before its first step."""
    return member.beams[0] if isinstance(member, BeamState) else member


def _grouped(active: Sequence[ActiveSequence]) -> list[list[ActiveSequence]]:
    """Return the sequences whose logits are processed in one call: those that share their processors."""
    groups: dict[object, list[ActiveSequence]] = {}
    for one in active:
        request = one.answer.request
        groups.setdefault((request.processors, request.options.do_sample), []).append(one)
    return list(groups.values())


def _is_drafted(one: ActiveSequence, depth: int, token: int) -> bool:
    return depth < len(one.draft) and one.draft[depth] == token
