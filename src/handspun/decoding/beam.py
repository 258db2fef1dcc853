"""Beam search with exactly the rules of transformers (`_beam_search` in generation/utils.py, 5.23).

- Each step considers the max(2, 1 + eos ids) * num_beams best continuations of all of a prompt's beams.
- A continuation among the best num_beams that ends becomes a hypothesis. Its score is its accumulated
  log-probability divided by (generated length, eos included) ** length_penalty. The num_beams best are kept.
- The best num_beams continuations that do not end become the next beams.
- early_stopping=True ends the search once there are num_beams hypotheses. False ends it when the best beam, at its
  current length, scores no better than the worst hypothesis. "never" ends it when the best beam could not score
  better even at its full length (if length_penalty is above 0, so that longer is better).

A continuation whose text completes a stop string ends as one with an eos does. A finished search leaves the batch,
so a prompt's answers do not depend on the other prompts. `BeamStream` emits the prefix that all of a prompt's
possible answers share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from handspun.decoding.engines.base import Engine, ModelInput
from handspun.decoding.engines.fused import FusedEngine
from handspun.decoding.explain import BeamTrace
from handspun.decoding.processors import nothing_left, process
from handspun.decoding.request import Completion, Request, Score
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.decoding.top import top_values


class Beams(Protocol):
    """Keys and values of one search's beams, made once its prompt has been read."""

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[ModelInput]:
        """Continue parents[i] with tokens[i] as beam i. Return the inputs for the beams' next logits."""

    def free(self) -> None:
        """Free the beams' keys and values."""


class TreeBeamCache:
    """One row of the fused engine with a prompt and the tree of its beams; a mask selects each beam's ancestors.

    Nothing is copied from beam to beam.
    """

    def __init__(self, engine: FusedEngine, row: int, prompt_tokens: int, num_beams: int) -> None:
        self._engine, self._row = engine, row
        self._position = prompt_tokens
        self._ancestors = torch.ones(num_beams, prompt_tokens, dtype=torch.bool, device=engine.model.device)
        self._themselves = torch.eye(num_beams, dtype=torch.bool, device=engine.model.device)

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[ModelInput]:
        """Return one input of num_beams tokens."""
        ancestors = self._ancestors[list(parents)]
        alive = ancestors.any(dim=0)
        # Compact only when more than half of the entries are dead, so that the moves cost little per step.
        if 2 * int(alive.sum()) < len(alive):
            places = alive.nonzero().flatten()
            self._engine.cache.keep(self._row, places)
            ancestors = ancestors[:, places]
        self._ancestors = torch.cat([ancestors, self._themselves], dim=1)  # (beams, entries)
        positions = [self._position] * len(tokens)
        self._position += 1
        return [ModelInput(self._row, tokens, positions, self._ancestors, all_logits=True)]

    def free(self) -> None:
        """Free the row."""
        self._engine.free(self._row)


class CopyingBeamCache:
    """One row per beam, copied when a beam branches. Works in any engine; the reference for the tree."""

    def __init__(self, engine: Engine, row: int, prompt_tokens: int, num_beams: int) -> None:  # noqa: ARG002
        self._engine = engine
        self._rows = [row] * num_beams  # until the first advance

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> list[ModelInput]:
        """Return one input of one token per beam."""
        rows = [self._engine.fork(self._rows[parent]) for parent in parents]
        self.free()
        self._rows = rows
        return [ModelInput(row, [token]) for row, token in zip(rows, tokens, strict=True)]

    def free(self) -> None:
        """Free the rows."""
        for row in set(self._rows):
            self._engine.free(row)


_NEVER_EXCLUDE = {"repetition_penalty", "presence_penalty", "frequency_penalty", "min_new_tokens"}
"""Processors after which every token still has a finite logit, an eos excepted."""


def agreed(answers: Sequence[Completion]) -> tuple[str, list[int]]:
    """Return the text prefix and the token prefix that all answers share. Texts may agree where tokens differ."""
    texts, ids = [answer.text.text for answer in answers], [answer.token_ids for answer in answers]
    return texts[0][: _shared_prefix_length(texts)], ids[0][: _shared_prefix_length(ids)]


def _shared_prefix_length(sequences: Sequence[Sequence[Any]]) -> int:
    """Return the length of the prefix that all sequences share."""
    # The least and the greatest sequence differ first where any two do.
    first, last = min(sequences), max(sequences)  # type: ignore[type-var]
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


@dataclass
class BeamStream:
    """The prefix of one search's answers that has been streamed, the same for each of them."""

    answers: int
    """Number of answers that are certain to be returned. It is streamed for these."""
    text: str = ""
    token_ids: list[int] = field(default_factory=list)

    def grow(self, possible: Sequence[Completion]) -> list[GenerationChunk]:
        """Return the new part of the shared prefix, one chunk per answer that is certain to be returned.

        possible: all answers that may still be returned.
        """
        text, token_ids = agreed(possible)
        assert text.startswith(self.text), "streamed text would change"
        more, tokens = text[len(self.text) :], token_ids[len(self.token_ids) :]
        if not (more or tokens):
            return []
        prompt = possible[0].request.prompt_index
        self.text, self.token_ids = text, token_ids
        return [
            GenerationChunk(prompt_index=prompt, return_index=number, text=more, token_ids=tokens)
            for number in range(self.answers)
        ]

    def finish(self, results: Sequence[GenerationResult]) -> list[GenerationChunk]:
        """Return the last chunk of each answer."""
        was_streamed = bool(self.text or self.token_ids)
        assert len(results) >= self.answers or not was_streamed, "an answer was streamed that does not exist"
        return [self._last(result) for result in results]

    def _last(self, result: GenerationResult) -> GenerationChunk:
        text, tokens = (self.text, len(self.token_ids)) if result.return_index < self.answers else ("", 0)
        assert result.text.startswith(text), "streamed text would change"
        return GenerationChunk(
            prompt_index=result.prompt_index,
            return_index=result.return_index,
            text=result.text[len(text) :],
            token_ids=result.token_ids[tokens:],
            logprobs=result.logprobs or [],
            finish_reason=result.finish_reason,
            result=result,
        )


def sure_answers(request: Request, vocab_size: int) -> int:
    """Return how many answers a search is certain to find.

    It finds all that are requested if every beam has at least num_beams continuations. If tokens can be excluded,
    only one answer is certain.
    """
    options = request.options
    is_sure = all(processor.name in _NEVER_EXCLUDE for processor in request.processors)
    has_enough = vocab_size - len(options.eos_token_ids) >= options.num_beams
    return options.num_return_sequences if is_sure and has_enough else 1


_NEVER = -1e9
"""Added to a score that must not win; transformers' value."""
_DEAD_THRESHOLD = _NEVER / 2
"""Beams with a score below this repeat others or are excluded by processors. They are not answers."""


@dataclass(eq=False)
class BeamState:
    """The state of one prompt's search."""

    request: Request
    beams: list[Completion]
    """The num_beams current beams, best first."""
    scores: list[float]
    """Accumulated log-probabilities of the beams."""
    stream: BeamStream
    """The text streamed so far."""
    cache: Beams | None = None
    """Keys and values of the beams, once the prompt has been read."""
    inputs: list[ModelInput] = field(default_factory=list)
    """Inputs of the next step: each beam's newest token."""
    indices: list[int] = field(default_factory=list)
    """Index of each beam's logits among those of the last step."""
    hypotheses: list[tuple[float, Completion]] = field(default_factory=list)
    """(score, ended answer), best first, at most num_beams."""
    done: bool = False
    tree: BeamTrace | None = None
    """The explored tree, if requested."""

    @classmethod
    def start(cls, request: Request, vocab_size: int) -> "BeamState":
        """Return a search that has not started."""
        # All beams are the same at first, so all but one start with a score that cannot win.
        n = request.options.num_beams
        tree = BeamTrace(n, request.vocabulary.text_of) if request.show_tree else None
        scores = [0.0] + [_NEVER] * (n - 1)
        stream = BeamStream(sure_answers(request, vocab_size))
        return cls(request, [Completion.start(request)] * n, scores, stream, tree=tree)

    @property
    def rows(self) -> int:
        """Number of beams, each a row in a batch."""
        return len(self.beams)

    @property
    def max_total_tokens(self) -> int:
        """Number of prompt and answer tokens of all beams at full length."""
        return self.rows * self.beams[0].max_total_tokens

    @property
    def reserved_tokens(self) -> int:
        """Most slots that its row takes: `TreeBeamCache` compacts it once most of its tokens are dead."""
        request = self.request
        return len(request.prompt_token_ids) + self.rows * (2 * request.max_new_tokens + 1)

    @property
    def length(self) -> int:
        """Number of tokens generated so far."""
        return len(self.beams[0].token_ids)

    @property
    def full(self) -> bool:
        """True if there are as many hypotheses as beams."""
        return len(self.hypotheses) == self.request.options.num_beams

    def keep(self, ended: list[tuple[float, Completion]]) -> None:
        """Add hypotheses and keep the best num_beams."""
        merged = sorted(self.hypotheses + ended, key=lambda hypothesis: -hypothesis[0])
        self.hypotheses = merged[: self.request.options.num_beams]

    def has_ended(self, best_score: float, length: int) -> bool:
        """Return whether the search is over by the early_stopping rule.

        best_score: accumulated log-probability of the best unfinished beam. length: tokens generated so far.
        """
        options = self.request.options
        if not self.full:
            return False
        if options.early_stopping is True:
            return True
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = self.request.max_new_tokens
        best_possible: float = best_score / length**options.length_penalty
        return best_possible <= self.hypotheses[-1][0]

    @property
    def live(self) -> list[Completion]:
        """The beams that may become answers. Before the first step all are identical."""
        if self.done:
            return []
        pairs = zip(self.beams, self.scores, strict=True)
        return [beam for beam, score in pairs if score > _DEAD_THRESHOLD or not self.length]

    def chunks(self) -> list[GenerationChunk]:
        """Return chunks with the text that the last step made certain, and with what it added to the tree."""
        if self.done:
            return self._with_tree(self.stream.finish(self.results()))
        complete = [answer for _, answer in self.hypotheses[: self.request.options.num_return_sequences]]
        return self._with_tree(self.stream.grow([*complete, *self.live]))

    def _with_tree(self, chunks: list[GenerationChunk]) -> list[GenerationChunk]:
        """Return the chunks with the tree's new nodes in the first, which may have nothing else."""
        if self.tree is None:
            return chunks
        if not chunks:
            index = self.request.prompt_index
            chunks = [GenerationChunk(prompt_index=index, return_index=0, text="", token_ids=[])]
        return [replace(chunks[0], tree_nodes=self.tree.new_nodes()), *chunks[1:]]

    def cancel(self) -> list[GenerationChunk]:
        """End the search with its current beams as answers."""
        for beam in self.live:
            beam.finish("cancelled")
        if self.cache is not None:
            self.cache.free()
        return self.stream.finish(self.results())

    def results(self) -> list[GenerationResult]:
        """Return the best answers; after a cancellation, unfinished beams fill up the list.

        There are fewer than requested if a constraint allows no more. Raises ConfigError if there are none.
        """
        answers = [answer for _, answer in self.hypotheses] + self.live
        if not answers:
            raise nothing_left(self.beams[0], self.request.processors)
        best = answers[: self.request.options.num_return_sequences]
        results = [replace(answer, return_index=i).result() for i, answer in enumerate(best)]
        if self.tree is not None:
            results[0] = replace(results[0], tree=self.tree.with_answers([result.token_ids for result in results]))
        return results


def advance(searches: Sequence[BeamState], logits: Tensor) -> None:
    """Advance searches by one step.

    searches: those with the same processors, and as many beams and eos ids. logits: (prompts * beams, vocab).
    """
    options, prompts = searches[0].request.options, len(searches)
    beams = [beam for search in searches for beam in search.beams]
    own = logits.log_softmax(-1)
    filtered = process(own, beams, searches[0].request.processors)
    width = max(2, 1 + len(options.eos_token_ids)) * options.num_beams
    # The best of all beams are among the best of each beam, so the second topk only sees (beams * width) values.
    best, ids = top_values(filtered, min(width, filtered.shape[-1]))  # (prompts * beams, width)
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
    """Turn the best continuations into hypotheses (if they end) and the next beams (if they do not).

    Args:
        search: The search to update.
        top: Accumulated log-probabilities of the continuations, (width,), best first.
        parents: Index of the beam that each one continues.
        tokens: Its new token.
        logprobs: The token's log-probability in the model's own distribution.
    """
    options, length = search.request.options, search.length + 1
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
    assert search.cache is not None
    if search.done:
        search.cache.free()
    else:
        search.inputs = search.cache.advance([parents[i] for i in order], [tokens[i] for i in order])


def _candidates(
    search: BeamState, parents: list[int], tokens: list[int], logprobs: list[float]
) -> list[Completion]:
    """Return the continuations of one search's beams."""
    candidates = []
    for parent, token, logprob in zip(parents, tokens, logprobs, strict=True):
        candidate = search.beams[parent].copy()
        candidate.add(token, Score(logprob, []))
        candidates.append(candidate)
    return candidates
