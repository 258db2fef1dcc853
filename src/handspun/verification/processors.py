"""Compare processors with those of transformers, and sampled tokens with their distribution."""

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

from handspun.decoding.options import SamplingParams
from handspun.decoding.processors import History, make_processors, process
from handspun.decoding.sampling import RngKey, select_tokens
from handspun.verification.reference import Finding, Reference, Status, reference_answer, within

_ROUNDING = 1e-6
"""Relative difference between two ways of computing the same number in float32."""
Biases = tuple[tuple[tuple[int, ...], float], ...]
_NO_COUNTERPART = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Step:
    """A step of an answer. logits: (1, vocab), of the model. best: the most probable tokens, best first."""

    prompt: list[int]
    answer: list[int]
    logits: Tensor
    best: list[int]
    eos_token_ids: tuple[int, ...]

    @property
    def last(self) -> int:
        """The previous token."""
        return (self.prompt + self.answer)[-1]


class Case(NamedTuple):
    """One option, and its value at a step as SamplingParams has it."""

    name: str
    option: str
    value: Callable[[Step], Any]


def _same(option: str, value: Any) -> Case:
    """Return a case with the same value at every step."""
    return Case(option, option, lambda _: value)


def _token_biases(step: Step) -> Biases:
    return ((step.best[0],), -5.0), ((step.best[1],), 2.5)


def _run_biases(step: Step) -> Biases:
    return ((step.last, step.best[0]), -5.0), ((step.best[0], step.best[1]), 2.5)


def _bad_words(step: Step) -> tuple[tuple[int, ...], ...]:
    return (step.best[0],), (step.last, step.best[1]), (step.best[0], step.best[2])


_CASES = (
    _same("temperature", 0.7),
    _same("top_k", 50),
    _same("top_p", 0.9),
    _same("min_p", 0.05),
    _same("typical_p", 0.9),
    _same("repetition_penalty", 1.3),
    _same("no_repeat_ngram_size", 2),
    Case("logit_bias", "logit_bias", _token_biases),
    Case("sequence_bias", "sequence_bias", _run_biases),
    Case("bad_words", "bad_words_ids", _bad_words),
    _same("min_new_tokens", 4),
    Case("suppress_tokens", "suppress_tokens", lambda step: tuple(step.best[:2])),
    Case("begin_suppress_tokens", "begin_suppress_tokens", lambda step: tuple(step.best[:2])),
)


def process_both(
    logits: Tensor, rows: Sequence[History], option: str, value: Any, eos_token_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return logits after our processor for one option, and after transformers' own, (rows, vocab) each."""
    options = SamplingParams(do_sample=True, eos_token_ids=eos_token_ids, **{option: value})
    ours, theirs = process(logits, rows, make_processors(options)), []
    # Row by row, since transformers has one length for all rows.
    for row, history in zip(logits.clone()[:, None], rows, strict=True):
        ids = torch.tensor([[*history.prompt_token_ids, *history.token_ids]], device=logits.device)
        processor = _counterpart(option, value, len(history.prompt_token_ids), eos_token_ids, logits.device)
        theirs.append(processor(ids, row))
    return ours, torch.cat(theirs)


def _counterpart(
    option: str, value: Any, prompt_length: int, eos_token_ids: Sequence[int], device: torch.device
) -> LogitsProcessor:
    """Return transformers' processor for one of our options."""
    eos = list(eos_token_ids)
    match option:
        case "logit_bias" | "sequence_bias":
            return SequenceBiasLogitsProcessor([[list(run), bias] for run, bias in value])
        case "bad_words_ids":
            return NoBadWordsLogitsProcessor([list(run) for run in value], eos or None)
        case "min_new_tokens":
            return MinNewTokensLengthLogitsProcessor(prompt_length, value, eos, str(device))
        case "suppress_tokens":
            return SuppressTokensLogitsProcessor(list(value))
        case "begin_suppress_tokens":
            return SuppressTokensAtBeginLogitsProcessor(list(value), prompt_length)
    return _OF_ONE_NUMBER[option](value)


_OF_ONE_NUMBER: dict[str, Callable[[Any], LogitsProcessor]] = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
    "typical_p": TypicalLogitsWarper,
    "repetition_penalty": RepetitionPenaltyLogitsProcessor,
    "no_repeat_ngram_size": NoRepeatNGramLogitsProcessor,
}


def check_processors(material: Reference) -> Iterator[Finding]:
    """Compare each processor on the first, middle and last step of transformers' greedy answers."""
    steps = list(_steps(material))
    for case in _CASES:
        yield _compared(case, steps)
    names = ", ".join(_NO_COUNTERPART)
    yield Finding(check="processors", case=names, status="info", found="no counterpart in transformers")


def _steps(material: Reference) -> Iterator[Step]:
    for prompt, answer in zip(material.prompts, material.answers, strict=True):
        ids = answer.token_ids
        for place in sorted({0, len(ids) // 2, len(ids) - 1}):
            logits = answer.logits[place : place + 1]
            yield Step(prompt, ids[:place], logits, logits[0].topk(3).indices.tolist(), material.eos_token_ids)


def _compared(case: Case, steps: Sequence[Step]) -> Finding:
    """Require the same excluded tokens, and equal other logits up to rounding."""
    changed, excluded, difference = 0, 0, 0.0
    for step in steps:
        rows, value = [History(step.prompt, step.answer)], case.value(step)
        ours, theirs = process_both(step.logits, rows, case.option, value, step.eos_token_ids)
        changed += not torch.equal(theirs, step.logits)
        out = theirs == -math.inf
        excluded += int(((ours == -math.inf) != out).sum())
        relative = (ours - theirs).masked_fill(out, 0.0).abs() / theirs.masked_fill(out, 0.0).abs().clamp_min(1.0)
        difference = max(difference, float(relative.max()))
    if excluded or not difference <= _ROUNDING:
        found = f"{excluded} tokens excluded by only one side; other logits differ by {difference:.1e} (relative)"
        return Finding(check="processors", case=case.name, status="fail", found=found)
    if not changed:
        return Finding(check="processors", case=case.name, status="info", found="no effect on these prompts")
    how = "equal" if difference == 0 else f"equal to {difference:.0e}"
    found = f"{len(steps)} rows {how}, {changed} changed"
    return Finding(check="processors", case=case.name, status="pass", found=found)


_SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.2},
    {"typical_p": 0.9},
)
_MAX_DIFFERENCE = 1e-4
"""Limit for differences of probabilities after the processors, if the logits differ by rounding."""
_MAX_DIFFERENCE_EQUAL_LOGITS = 1e-6
"""The same limit for equal logits."""
_NUM_DRAWS = 1000
_MIN_P_VALUE = 1e-4
"""A correct sampler has a smaller p-value once in 10,000 times."""
_MIN_EXPECTED = 5
"""Minimum expected number of draws per bin of the test."""


def check_distributions(material: Reference) -> Iterator[Finding]:
    """Compare the distribution of each answer's first token: transformers' `generate` against our processors."""
    for options in _SETTINGS:
        yield _distribution(material, options)


def _distribution(material: Reference, options: dict[str, Any]) -> Finding:
    own = SamplingParams(do_sample=True, eos_token_ids=material.eos_token_ids, **options)
    processors, asked = make_processors(own), {"top_k": 0, **options}  # transformers' default is 50
    largest, on_equal_logits = 0.0, 0.0
    for prompt, logits in zip(material.prompts, material.logits, strict=True):
        with torch.random.fork_rng():  # transformers samples a token, which advances the global generator
            reference = reference_answer(
                material.chat.model, prompt, eos_token_ids=(), max_new_tokens=1, do_sample=True, **asked
            )
        both = torch.stack([logits[0], reference.logits[0]])
        ours = process(both, [History(prompt)] * 2, processors).softmax(-1)  # (2, vocab)
        differences = (ours - reference.processed[0].softmax(-1)).abs().amax(-1)
        largest = max(largest, float(differences[0]))
        on_equal_logits = max(on_equal_logits, float(differences[1]))
    case = ", ".join(f"{name} {value}" for name, value in options.items())
    if (
        on_equal_logits <= _MAX_DIFFERENCE_EQUAL_LOGITS
        and not largest <= _MAX_DIFFERENCE
        and material.largest_difference <= material.tolerance
    ):
        found = f"a token at a filter's edge: probabilities differ by {largest:.1e}, on equal logits by "
        return Finding(check="sampling", case=case, status="tie", found=f"{found}{on_equal_logits:.1e}")
    if not on_equal_logits <= _MAX_DIFFERENCE_EQUAL_LOGITS:
        return within(
            "sampling",
            case,
            on_equal_logits,
            _MAX_DIFFERENCE_EQUAL_LOGITS,
            what="probabilities from equal logits differ by",
        )
    return within("sampling", case, largest, _MAX_DIFFERENCE, what="difference")


def check_draws(material: Reference) -> Iterator[Finding]:
    """Test draws at the answers' least certain step with Pearson's chi-squared.

    Noise is keyed by seed, prompt, answer and step. Draws must be independent along each of them.
    """
    logits = torch.cat([answer.logits for answer in material.answers])
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs[(-(logprobs.exp() * logprobs).sum(-1)).argmax()].exp()
    streams: dict[str, list[tuple[RngKey, int]]] = {
        "seeds": [((i, 0, 0), 0) for i in range(_NUM_DRAWS)],
        "prompts": [((0, i, 0), 0) for i in range(_NUM_DRAWS)],
        "answers": [((0, 0, i), 0) for i in range(_NUM_DRAWS)],
        "steps": [((0, 0, 0), i) for i in range(_NUM_DRAWS)],
    }
    for name, draws in streams.items():
        tokens = select_tokens(probabilities.log().expand(_NUM_DRAWS, -1), draws=draws)
        p, bins = goodness_of_fit(tokens, probabilities)
        status: Status = "pass" if p >= _MIN_P_VALUE else "fail"
        if bins < 2:
            status = "info"
        found = f"p = {p:.2g} ({bins} bins), at least {_MIN_P_VALUE:.0e}"
        yield Finding(check="draws", case=f"{_NUM_DRAWS:,} {name}", status=status, found=found)


def goodness_of_fit(tokens: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """Return (p-value, number of bins) of Pearson's chi-squared test.

    The p-value is the probability of draws at least as far from the distribution as these. It is 0 if an
    impossible token was drawn. tokens: the draws, (draws,). probabilities: (vocab,).
    """
    probabilities = probabilities.double().cpu()
    counts = tokens.cpu().bincount(minlength=len(probabilities)).double()
    if bool((counts[probabilities == 0] > 0).any()):
        return 0.0, len(counts)
    expected = probabilities * len(tokens)
    # Pearson's statistic follows chi-squared only with enough expected draws per bin: rarer tokens share one, and
    # if that is still too small, it joins the one before.
    alone = expected >= _MIN_EXPECTED
    expected = torch.cat([expected[alone], expected[~alone].sum()[None]])
    counts = torch.cat([counts[alone], counts[~alone].sum()[None]])
    if expected[-1] < _MIN_EXPECTED and len(expected) > 1:
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
        counts = torch.cat([counts[:-2], counts[-2:].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.double)
    p = torch.special.gammaincc(freedom / 2, statistic / 2) if len(counts) > 1 else torch.ones(())
    return float(p), len(counts)
