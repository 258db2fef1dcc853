"""Each processor against transformers' own of the same name, on logits of the model."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from handspun.decoding.options import ResolvedOptions
from handspun.decoding.processors import History, make_processors, process
from handspun.verification.findings import Finding
from handspun.verification.material import Material

_ROUNDING = 1e-6
"""Relative: between two ways of computing the same number in float32."""
_WITHOUT = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Step:
    """A place in an answer. logits: (1, vocab), the model's. best: the tokens that they prefer, the best first."""

    prompt: list[int]
    answer: list[int]
    logits: Tensor
    best: list[int]
    eos_token_ids: tuple[int, ...]

    @property
    def last(self) -> int:
        """The token before."""
        return (self.prompt + self.answer)[-1]


class Case(NamedTuple):
    """One processor with values: as options of ours, and as transformers' object."""

    name: str
    ours: Callable[[Step], dict[str, Any]]
    theirs: Callable[[Step], LogitsProcessor]


def _with(name: str, value: Any, make: Callable[[Any], LogitsProcessor]) -> Case:
    """One whose value is the same everywhere."""
    return Case(name, lambda _: {name: value}, lambda _: make(value))


def _token_biases(step: Step) -> dict[tuple[int, ...], float]:
    return {(step.best[0],): -5.0, (step.best[1],): 2.5}


def _run_biases(step: Step) -> dict[tuple[int, ...], float]:
    return {(step.last, step.best[0]): -5.0, (step.best[0], step.best[1]): 2.5}


def _as_lists(biases: dict[tuple[int, ...], float]) -> list[list[list[int] | float]]:
    return [[list(run), bias] for run, bias in biases.items()]


def _bad_words(step: Step) -> list[list[int]]:
    return [[step.best[0]], [step.last, step.best[1]], [step.best[0], step.best[2]]]


_CASES = (
    _with("temperature", 0.7, TemperatureLogitsWarper),
    _with("top_k", 50, TopKLogitsWarper),
    _with("top_p", 0.9, TopPLogitsWarper),
    _with("min_p", 0.05, MinPLogitsWarper),
    _with("typical_p", 0.9, TypicalLogitsWarper),
    _with("repetition_penalty", 1.3, RepetitionPenaltyLogitsProcessor),
    _with("no_repeat_ngram_size", 2, NoRepeatNGramLogitsProcessor),
    Case(
        "logit_bias",
        lambda step: {"logit_bias": tuple(_token_biases(step).items())},
        lambda step: SequenceBiasLogitsProcessor(_as_lists(_token_biases(step))),
    ),
    Case(
        "sequence_bias",
        lambda step: {"sequence_bias": tuple(_run_biases(step).items())},
        lambda step: SequenceBiasLogitsProcessor(_as_lists(_run_biases(step))),
    ),
    Case(
        "bad_words",
        lambda step: {"bad_words_ids": tuple(tuple(run) for run in _bad_words(step))},
        lambda step: NoBadWordsLogitsProcessor(_bad_words(step), list(step.eos_token_ids) or None),
    ),
    Case(
        "min_new_tokens",
        lambda _: {"min_new_tokens": 4},
        lambda step: MinNewTokensLengthLogitsProcessor(
            len(step.prompt), 4, list(step.eos_token_ids), str(step.logits.device)
        ),
    ),
    Case(
        "suppress_tokens",
        lambda step: {"suppress_tokens": tuple(step.best[:2])},
        lambda step: SuppressTokensLogitsProcessor(step.best[:2]),
    ),
    Case(
        "begin_suppress_tokens",
        lambda step: {"begin_suppress_tokens": tuple(step.best[:2])},
        lambda step: SuppressTokensAtBeginLogitsProcessor(step.best[:2], len(step.prompt)),
    ),
)


def check_processors(material: Material) -> Iterator[Finding]:
    """Each processor on the first, the middle and the last step of transformers' greedy answers."""
    steps = list(_steps(material))
    for case in _CASES:
        yield _compared(case, steps)
    names = ", ".join(_WITHOUT)
    yield Finding(check="processors", case=names, status="info", found="no counterpart in transformers")


def _steps(material: Material) -> Iterator[Step]:
    for prompt, answer in zip(material.prompts, material.answers, strict=True):
        ids = answer.token_ids
        for place in sorted({0, len(ids) // 2, len(ids) - 1}):
            logits = answer.logits[place : place + 1]
            yield Step(prompt, ids[:place], logits, logits[0].topk(3).indices.tolist(), material.eos_token_ids)


def _compared(case: Case, steps: Sequence[Step]) -> Finding:
    """Excluded tokens are to be the same, and all other logits to rounding."""
    changed, excluded, difference = 0, 0, 0.0
    for step in steps:
        options = ResolvedOptions(do_sample=True, eos_token_ids=step.eos_token_ids, **case.ours(step))
        ours = process(step.logits, [History(step.prompt, step.answer)], make_processors(options))
        input_ids = torch.tensor([step.prompt + step.answer], device=step.logits.device)
        theirs: Tensor = case.theirs(step)(input_ids, step.logits.clone())
        changed += not torch.equal(theirs, step.logits)
        out = theirs == -math.inf
        excluded += int(((ours == -math.inf) != out).sum())
        relative = (ours - theirs).masked_fill(out, 0.0).abs() / theirs.masked_fill(out, 0.0).abs().clamp_min(1.0)
        difference = max(difference, float(relative.max()))
    if excluded or not difference <= _ROUNDING:
        found = f"{excluded} tokens excluded by one alone; other logits differ by {difference:.1e} of their value"
        return Finding(check="processors", case=case.name, status="fail", found=found)
    if not changed:
        return Finding(
            check="processors", case=case.name, status="info", found="it had nothing to do on these prompts"
        )
    how = "equal" if difference == 0 else f"equal to {difference:.0e}"
    found = f"{len(steps)} rows {how}, {changed} changed"
    return Finding(check="processors", case=case.name, status="pass", found=found)


__all__ = ["check_processors"]
