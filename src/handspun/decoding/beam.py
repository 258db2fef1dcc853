"""Beam search, with exactly transformers' rules (`_beam_search` of generation/utils.py, 5.23):

- each step looks at the max(2, 1 + eos ids) * num_beams best continuations of a prompt's beams together;
- those of the best num_beams that end become hypotheses, scored by their accumulated log-probability divided
  by (generated length, eos included) ** length_penalty; the num_beams best hypotheses are kept;
- the best num_beams that do not end go on;
- early_stopping=True ends a search with num_beams hypotheses. False ends it when the best beam, at its
  present length, is no better than the worst of them; "never", when not even at its full length (if the
  length_penalty is above 0, so that longer is better).

A continuation whose text completes a stop string ends as one with an eos does. A prompt whose search has
ended leaves the batch, so a prompt's answers do not depend on its batch mates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from handspun.decoding.answer import Answer, Job, prefill
from handspun.decoding.engine import Engine
from handspun.decoding.processors import process
from handspun.decoding.results import GenerationResult

_NEVER = -1e9
"""Added to a score that is not to win; transformers' value."""


@dataclass
class Search:
    """The search for one prompt's answers."""

    job: Job
    beams: list[Answer]
    """num_beams of them, the best first."""
    hypotheses: list[tuple[float, Answer]] = field(default_factory=list)
    """(score, ended answer), the best first, num_beams at most."""
    done: bool = False

    @property
    def full(self) -> bool:
        """Whether there are as many hypotheses as beams."""
        return len(self.hypotheses) == self.job.options.num_beams

    def keep(self, ended: list[tuple[float, Answer]]) -> None:
        """Takes in hypotheses, and keeps the best."""
        merged = sorted(self.hypotheses + ended, key=lambda hypothesis: -hypothesis[0])
        self.hypotheses = merged[: self.job.options.num_beams]

    def has_ended(self, best_score: Tensor, length: int) -> bool:
        """Whether going on is useless or not wanted. best_score: accumulated log-probability of the best beam
        that goes on; length: tokens generated so far."""
        options = self.job.options
        if not self.full:
            return False
        if options.early_stopping is True:
            return True
        if options.early_stopping == "never" and options.length_penalty > 0:
            length = self.job.limits[self.beams[0].prompt_index]
        best_possible = float(best_score / length**options.length_penalty)
        return best_possible <= self.hypotheses[-1][0]

    def results(self) -> list[GenerationResult]:
        """The best answers; after a cancellation, filled up with unfinished beams."""
        for beam in self.beams if not self.done else []:
            beam.finish("cancelled")
        answers = [answer for _, answer in self.hypotheses] + ([] if self.done else self.beams)
        best = answers[: self.job.options.num_return_sequences]
        return [replace(answer, return_index=i).result() for i, answer in enumerate(best)]


def beam_search(prompt_indices: Sequence[int], job: Job) -> list[GenerationResult]:
    """The num_return_sequences best answers to each of these prompts, which are decoded in one batch."""
    n = job.options.num_beams
    searches = [Search(job, [Answer.start(job, i)] * n) for i in prompt_indices]
    going, engine = searches, Engine(job.model.model)
    logits, scores, tokens = None, torch.empty(0), torch.empty(0)
    while going and not job.should_stop():
        if logits is None:
            logits = prefill(engine, [beam for search in going for beam in search.beams], job)
            scores = torch.tensor([[0.0] + [_NEVER] * (n - 1)], device=logits.device).repeat(len(going), 1)
        else:
            logits = engine.step(tokens)
        scores, parents, tokens = _advance(going, logits, scores)
        still = torch.tensor([i for i, search in enumerate(going) if not search.done], dtype=torch.long)
        still = still.to(scores.device)
        offsets = torch.arange(len(going), device=scores.device)[:, None] * n
        engine.reorder((parents + offsets)[still].flatten())
        scores, tokens = scores[still], tokens[still].flatten()
        going = [search for search in going if not search.done]
    return [result for search in searches for result in search.results()]


def _advance(searches: list[Search], logits: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of every search: scores (prompts, beams) and logits (prompts * beams, vocab) to the scores,
    parents (index of a beam in its search) and tokens of the beams that go on, each (prompts, beams)."""
    options, length = searches[0].job.options, len(searches[0].beams[0].token_ids) + 1
    own = logits.log_softmax(-1)
    filtered = process(own, [beam for search in searches for beam in search.beams], searches[0].job.processors)
    width = max(2, 1 + len(options.eos_token_ids)) * options.num_beams
    total = (filtered.view(*scores.shape, -1) + scores[..., None]).flatten(1)  # (prompts, beams * vocab)
    top, index = total.topk(width)  # (prompts, width), as are the next four
    parents, tokens = index // own.shape[-1], index % own.shape[-1]
    logprobs = own.view(len(searches), -1).gather(1, index)
    candidates = [
        _candidates(search, *chosen)
        for search, *chosen in zip(searches, parents.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
    ]
    scores, order = _settle(searches, candidates, top, length)
    return scores, parents.gather(1, order), tokens.gather(1, order)


def _settle(
    searches: list[Search], candidates: list[list[Answer]], top: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Turns the ended ones of each search's candidates into hypotheses, and the others into its beams.

    top: (prompts, width), accumulated log-probabilities, the best first; length: generated tokens.
    Returns the beams' scores and their places among the candidates, both (prompts, beams).
    """
    options = searches[0].job.options
    ended = torch.tensor([[c.finish_reason is not None for c in row] for row in candidates], device=top.device)
    running, order = (top + ended * _NEVER).topk(options.num_beams)
    divided = (top / length**options.length_penalty).tolist()
    for i, search in enumerate(searches):
        best = [j for j in range(options.num_beams) if ended[i, j]]
        search.keep([(divided[i][j], candidates[i][j]) for j in best])
        search.beams = [candidates[i][j] for j in order[i].tolist()]
        search.done = bool(ended[i].all()) or search.has_ended(running[i, 0], length)
    return running, order


def _candidates(search: Search, parents: list[int], tokens: list[int], logprobs: list[float]) -> list[Answer]:
    """The continuations of one search's beams."""
    candidates = []
    for parent, token, logprob in zip(parents, tokens, logprobs, strict=True):
        candidate = search.beams[parent].copy()
        candidate.add(token, logprob)
        candidates.append(candidate)
    return candidates


__all__ = ["beam_search"]
