"""Beam search, with exactly transformers' rules (`_beam_search` of generation/utils.py, 5.23):

- each step looks at the max(2, 1 + eos ids) * num_beams best continuations of a prompt's beams together;
- those of the best num_beams that end become hypotheses, scored by their accumulated log-probability divided
  by (generated length, eos included) ** length_penalty; the num_beams best hypotheses are kept;
- the best num_beams that do not end go on;
- early_stopping=True ends a search with num_beams hypotheses. False ends it when the best beam, at its
  present length, is no better than the worst of them; "never", when not even at its full length (if the
  length_penalty is above 0, so that longer is better).

A continuation whose text completes a stop string ends as one with an eos does. A prompt whose search has
ended leaves the batch, so a prompt's answers do not depend on its batch mates. What all of a prompt's possible
answers begin with is shown as soon as they agree on it (`beam_stream.py`).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from handspun.decoding.engines.base import Engine, ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.explain import BeamTrace
from handspun.decoding.processors import nothing_left, process
from handspun.decoding.request import Completion, Request, check_finite
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.decoding.scheduler import feed_prompt


class Beams(Protocol):
    """The beams of one search."""

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[ModelInput]:
        """Beam i goes on from beam parents[i] with tokens[i]: the feeds that give the beams' next logits."""

    def free(self) -> None:
        """Forgets the beams."""


class TreeBeamCache:
    """A row of the fused engine that holds a prompt and the tree of its beams. The first advance comes after the
    prompt has been fed."""

    def __init__(self, engine: FusedEngine, row: int, prompt_tokens: int, num_beams: int) -> None:
        self._engine, self._row = engine, row
        self._position = prompt_tokens
        self._ancestors = torch.ones(num_beams, prompt_tokens, dtype=torch.bool, device=engine.model.device)
        self._themselves = torch.eye(num_beams, dtype=torch.bool, device=engine.model.device)

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[ModelInput]:
        """One feed of num_beams tokens."""
        ancestors = self._ancestors[list(parents)]
        alive = ancestors.any(dim=0)
        if 2 * int(alive.sum()) < len(alive):
            places = alive.nonzero().flatten()
            self._engine.cache.keep(self._row, places)
            ancestors = ancestors[:, places]
        self._ancestors = torch.cat([ancestors, self._themselves], dim=1)  # (beams, entries)
        positions = [self._position] * len(tokens)
        self._position += 1
        return [ModelInput(self._row, tokens, positions, self._ancestors, all_logits=True)]

    def free(self) -> None:
        """Forgets the row."""
        self._engine.free(self._row)


class CopyingBeamCache:
    """A row for each beam, in any engine: the plain form."""

    def __init__(self, engine: Engine, row: int, prompt_tokens: int, num_beams: int) -> None:  # noqa: ARG002
        self._engine = engine
        self._rows = [row] * num_beams  # until the first advance

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[ModelInput]:
        """A feed for each beam, of one token."""
        rows = [self._engine.fork(self._rows[parent]) for parent in parents]
        self.free()
        self._rows = rows
        return [ModelInput(row, [token]) for row, token in zip(rows, tokens, strict=True)]

    def free(self) -> None:
        """Forgets the rows."""
        for row in set(self._rows):
            self._engine.free(row)


_NEVER_EXCLUDE = {"repetition_penalty", "presence_penalty", "frequency_penalty", "min_new_tokens"}
"""Processors that leave every token, but for an eos, a finite logit."""


def agreed(answers: Sequence[Completion]) -> tuple[str, list[int]]:
    """The text and the tokens with which all of the answers begin. Texts may agree where tokens do not."""
    texts, ids = [answer.text.text for answer in answers], [answer.token_ids for answer in answers]
    return texts[0][: _shared_length(texts)], ids[0][: _shared_length(ids)]


def _shared_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Of what all begin with: it is what the first and the last of them in order begin with."""
    first, last = min(sequences), max(sequences)  # type: ignore[type-var]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


@dataclass
class BeamStream:
    """What has been streamed of one search's answers: the same of each that is streamed before the end."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    answers: int = 0
    """Of which it has been streamed: those with a return index below."""

    def grow(self, possible: Sequence[Completion]) -> list[GenerationChunk]:
        """What is new, for each answer that is sure to be returned. possible: all that may still be returned."""
        text, token_ids = agreed(possible)
        assert text.startswith(self.text), "what was shown is taken back"
        more, tokens = text[len(self.text) :], token_ids[len(self.token_ids) :]
        if not (more or tokens):
            return []
        prompt = possible[0].prompt_index
        self.text, self.token_ids, self.answers = text, token_ids, sure_answers(possible[0].job)
        return [
            GenerationChunk(prompt_index=prompt, return_index=number, text=more, token_ids=tokens)
            for number in range(self.answers)
        ]

    def finish(self, results: Sequence[GenerationResult]) -> list[GenerationChunk]:
        """The last chunk of each answer."""
        assert len(results) >= self.answers, "an answer was shown that there is not"
        return [self._last(result) for result in results]

    def _last(self, result: GenerationResult) -> GenerationChunk:
        text, tokens = (self.text, len(self.token_ids)) if result.return_index < self.answers else ("", 0)
        assert result.text.startswith(text), "what was shown is taken back"
        return GenerationChunk(
            prompt_index=result.prompt_index,
            return_index=result.return_index,
            text=result.text[len(text) :],
            token_ids=result.token_ids[tokens:],
            finish_reason=result.finish_reason,
            result=result,
        )


def sure_answers(job: Request) -> int:
    """How many answers to a prompt a search is sure to return. All that are asked for, if every beam has at least
    num_beams tokens to go on with; where tokens are excluded there may be fewer, but one."""
    vocabulary = job.model.model.config.get_text_config().vocab_size - len(job.options.eos_token_ids)
    is_sure = all(processor.name in _NEVER_EXCLUDE for processor in job.processors)
    return job.options.num_return_sequences if is_sure and vocabulary >= job.options.num_beams else 1


_NEVER = -1e9
"""Added to a score that is not to win; transformers' value."""
_DEAD_THRESHOLD = _NEVER / 2
"""Scores below are of beams that repeat others, or that processors exclude: no answers."""


@dataclass
class BeamState:
    """The search for one prompt's answers."""

    job: Request
    beams: list[Completion]
    """num_beams of them, the best first."""
    scores: list[float]
    """Of the beams: accumulated log-probabilities."""
    kept: Beams | None = None
    """Their keys and values, once the search has joined."""
    feeds: list[ModelInput] = field(default_factory=list)
    """What gives the next logits: those of the prompt at first, and then those of each beam."""
    hypotheses: list[tuple[float, Completion]] = field(default_factory=list)
    """(score, ended answer), the best first, num_beams at most."""
    done: bool = False
    tree: BeamTrace | None = None
    """What the search looks at, if that is asked for."""
    stream: BeamStream = field(default_factory=BeamStream)
    """What has been shown."""

    @classmethod
    def of(cls, job: Request, prompt_index: int) -> "BeamState":
        """One that waits. All its beams are the same at first, so only one of them may win."""
        n = job.options.num_beams
        tree = BeamTrace(n, job.vocabulary.text_of) if job.show_tree else None
        return cls(job, [Completion.start(job, prompt_index)] * n, [0.0] + [_NEVER] * (n - 1), tree=tree)

    def join(self, engine: Engine, make_beams: Callable[..., Beams]) -> None:
        """Begins."""
        prompt = self.beams[0].prompt_token_ids
        self.feeds = [feed_prompt(engine, prompt, self.job.on_prompt)]
        self.kept = make_beams(engine, self.feeds[0].row, len(prompt), len(self.beams))

    @property
    def length(self) -> int:
        """Tokens generated so far."""
        return len(self.beams[0].token_ids)

    @property
    def full(self) -> bool:
        """Whether there are as many hypotheses as beams."""
        return len(self.hypotheses) == self.job.options.num_beams

    def keep(self, ended: list[tuple[float, Completion]]) -> None:
        """Takes in hypotheses, and keeps the best."""
        merged = sorted(self.hypotheses + ended, key=lambda hypothesis: -hypothesis[0])
        self.hypotheses = merged[: self.job.options.num_beams]

    def has_ended(self, best_score: float, length: int) -> bool:
        """Whether going on is useless or not wanted. best_score: accumulated log-probability of the best beam
        that goes on; length: tokens generated so far."""
        options = self.job.options
        if not self.full:
            return False
        if options.early_stopping is True:
            return True
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = self.job.limits[self.beams[0].prompt_index]
        best_possible: float = best_score / length**options.length_penalty
        return best_possible <= self.hypotheses[-1][0]

    @property
    def live(self) -> list[Completion]:
        """The beams that may become answers. Before the first step all are the same."""
        if self.done:
            return []
        pairs = zip(self.beams, self.scores, strict=True)
        return [beam for beam, score in pairs if score > _DEAD_THRESHOLD or not self.length]

    def chunks(self) -> list[GenerationChunk]:
        """What the last step has made certain."""
        if self.done:
            return self.stream.finish(self.results())
        complete = [answer for _, answer in self.hypotheses[: self.job.options.num_return_sequences]]
        return self.stream.grow([*complete, *self.live])

    def cancel(self) -> list[GenerationChunk]:
        """Ends the search as far as it has come."""
        for beam in self.live:
            beam.finish("cancelled")
        return self.stream.finish(self.results())

    def results(self) -> list[GenerationResult]:
        """The best answers; after a cancellation, filled up with unfinished beams. Fewer than asked for if a
        constraint has no more. Raises ConfigError if there is none."""
        answers = [answer for _, answer in self.hypotheses] + self.live
        if not answers:
            raise nothing_left(self.beams[0], self.job.processors)
        best = answers[: self.job.options.num_return_sequences]
        results = [replace(answer, return_index=i).result() for i, answer in enumerate(best)]
        if self.tree is not None:
            results[0] = replace(results[0], tree=self.tree.with_answers([result.token_ids for result in results]))
        return results


@torch.inference_mode()
def beam_search(job: Request, make_beams: Callable[..., Beams] | None = None) -> Iterator[GenerationChunk]:
    """The num_return_sequences best answers to each of the job's prompts, as far as they are certain. A prompt's
    search joins where there is room for it, and leaves when it has ended.

    make_beams: TreeBeamCache or CopyingBeamCache; if not given, a tree where the engine can keep one.
    """
    engine = make_engine(job.model)
    make_beams = make_beams or (TreeBeamCache if isinstance(engine, FusedEngine) else CopyingBeamCache)
    order = sorted(range(len(job.prompts)), key=lambda i: len(job.prompts[i]))
    waiting, going = deque(BeamState.of(job, i) for i in order), list[BeamState]()
    while waiting or going:
        if job.should_stop():
            yield from [chunk for search in (*going, *waiting) for chunk in search.cancel()]
            return
        while waiting and _has_room(going, waiting[0]):
            going.append(waiting.popleft())
            going[-1].join(engine, make_beams)
        logits = engine.forward([feed for search in going for feed in search.feeds])
        _advance(going, _a_row_for_each_beam(logits, going))
        yield from [chunk for search in going for chunk in search.chunks()]
        going = [search for search in going if not search.done]


def _has_room(going: Sequence[BeamState], search: BeamState) -> bool:
    job, beams = search.job, len(search.beams)
    tokens = beams * sum(one.beams[0].max_total_tokens for one in (*going, search))
    return not going or ((len(going) + 1) * beams <= job.batch_size and tokens <= job.max_batch_tokens)


def _a_row_for_each_beam(logits: Tensor, searches: Sequence[BeamState]) -> Tensor:
    """(prompts * beams, vocab): a prompt's own logits are those of all its beams."""
    n, places, start = searches[0].job.options.num_beams, list[int](), 0
    for search in searches:
        own = n if search.length else 1
        places += [start + beam % own for beam in range(n)]
        start += own
    return logits if len(places) == len(logits) else logits[places]


def _advance(searches: Sequence[BeamState], logits: Tensor) -> None:
    """One step of every search. logits: (prompts * beams, vocab)."""
    options, prompts = searches[0].job.options, len(searches)
    beams = [beam for search in searches for beam in search.beams]
    check_finite(logits, beams, searches[0].job.model)
    own = logits.log_softmax(-1)
    filtered = process(own, beams, searches[0].job.processors)
    width = max(2, 1 + len(options.eos_token_ids)) * options.num_beams
    # The best of all are among the best of each beam: no beam's whole vocabulary is sorted twice.
    best, ids = filtered.topk(min(width, filtered.shape[-1]))  # (prompts * beams, width)
    scores = best.new_tensor([search.scores for search in searches])  # (prompts, beams)
    together = (best + scores.view(-1, 1)).view(prompts, -1)
    top, index = together.topk(min(width, together.shape[-1]))  # (prompts, width), as are the next three
    parents = index // best.shape[-1]
    tokens = ids.view(prompts, -1).gather(1, index)
    logprobs = own.view(prompts, options.num_beams, -1)[torch.arange(prompts)[:, None], parents, tokens]
    columns = (top.tolist(), parents.tolist(), tokens.tolist(), logprobs.tolist())
    for search, *chosen in zip(searches, *columns, strict=True):
        _select(search, *chosen)


def _select(
    search: BeamState, top: list[float], parents: list[int], tokens: list[int], logprobs: list[float]
) -> None:
    """The best continuations, (width,) with their accumulated log-probabilities, the best first: those that end
    become hypotheses, the others the search's beams."""
    options, length = search.job.options, search.length + 1
    candidates = _candidates(search, parents, tokens, logprobs)
    has_ended = [candidate.finish_reason is not None for candidate in candidates]
    best = [i for i in range(options.num_beams) if has_ended[i] and top[i] > _DEAD_THRESHOLD]
    search.keep([(top[i] / length**options.length_penalty, candidates[i]) for i in best])
    penalized = torch.tensor(top) + torch.tensor(has_ended) * _NEVER
    running, order = (values.tolist() for values in penalized.topk(options.num_beams))
    search.scores, search.beams = running, [candidates[i] for i in order]
    if search.tree is not None:
        beams = [i if score > _DEAD_THRESHOLD else None for i, score in zip(order, running, strict=True)]
        search.tree.grow(parents, tokens, top, ended=best, beams=beams)
    nothing_goes_on = all(has_ended) or running[0] <= _DEAD_THRESHOLD
    search.done = nothing_goes_on or search.has_ended(running[0], length)
    assert search.kept is not None
    if search.done:
        search.kept.free()
    else:
        search.feeds = search.kept.advance([parents[i] for i in order], [tokens[i] for i in order])


def _candidates(
    search: BeamState, parents: list[int], tokens: list[int], logprobs: list[float]
) -> list[Completion]:
    """The continuations of one search's beams."""
    candidates = []
    for parent, token, logprob in zip(parents, tokens, logprobs, strict=True):
        candidate = search.beams[parent].copy()
        candidate.add(token, logprob)
        candidates.append(candidate)
    return candidates
