"""What is drawn from: distributions against transformers', and draws against their distribution."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from handspun.decoding.options import ResolvedOptions
from handspun.decoding.processors import History, make_processors, process
from handspun.decoding.sampling import Stream, choose
from handspun.verification.findings import Finding, Status, within
from handspun.verification.material import Material
from handspun.verification.reference import reference_answer

_SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.7},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.3, "min_p": 0.05, "repetition_penalty": 1.2},
    {"typical_p": 0.9},
)
_CLOSE = 1e-4
"""Between probabilities behind the processors, where logits differ by rounding."""
_EQUAL = 1e-6
"""The same where they come from equal logits."""
_DRAWS = 1000
_IMPROBABLE = 1e-4
"""A right sampler gives a smaller p-value once in 10,000 times."""
_FEWEST = 5
"""Draws that are expected in a bin of the test, at least."""


def check_distributions(material: Material) -> Iterator[Finding]:
    """The distribution of each answer's first token, by transformers' `generate` and by the engine with our
    processors."""
    for options in _SETTINGS:
        yield _distribution(material, options)


def _distribution(material: Material, options: dict[str, Any]) -> Finding:
    own = ResolvedOptions(do_sample=True, eos_token_ids=material.eos_token_ids, **options)
    processors, asked = make_processors(own), {"top_k": 0, **options}  # transformers' default is 50
    largest, on_equal_logits = 0.0, 0.0
    for prompt, logits in zip(material.prompts, material.logits, strict=True):
        with torch.random.fork_rng():  # transformers draws a token from it
            reference = reference_answer(
                material.chat.model, prompt, eos_token_ids=(), max_new_tokens=1, do_sample=True, **asked
            )
        both = torch.stack([logits[0], reference.logits[0]])
        ours = process(both, [History(prompt)] * 2, processors).softmax(-1)  # (2, vocab)
        differences = (ours - reference.processed[0].softmax(-1)).abs().amax(-1)
        largest = max(largest, float(differences[0]))
        on_equal_logits = max(on_equal_logits, float(differences[1]))
    case = ", ".join(f"{name} {value}" for name, value in options.items())
    if on_equal_logits <= _EQUAL and not largest <= _CLOSE and material.largest_difference <= material.tolerance:
        found = f"a token at a filter's edge: probabilities differ by {largest:.1e}, on equal logits by "
        return Finding(check="sampling", case=case, status="tie", found=f"{found}{on_equal_logits:.1e}")
    if not on_equal_logits <= _EQUAL:
        return within("sampling", case, on_equal_logits, _EQUAL, what="probabilities from equal logits differ by")
    return within("sampling", case, largest, _CLOSE, what="difference")


def check_draws(material: Material) -> Iterator[Finding]:
    """Pearson's chi-squared of draws from the least certain step of the answers. Noise is named by seed, prompt,
    answer and step: along each of them it has to be as good as independent."""
    logits = torch.cat([answer.logits for answer in material.answers])
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs[(-(logprobs.exp() * logprobs).sum(-1)).argmax()].exp()
    streams: dict[str, list[tuple[Stream, int]]] = {
        "seeds": [((i, 0, 0), 0) for i in range(_DRAWS)],
        "prompts": [((0, i, 0), 0) for i in range(_DRAWS)],
        "answers": [((0, 0, i), 0) for i in range(_DRAWS)],
        "steps": [((0, 0, 0), i) for i in range(_DRAWS)],
    }
    for name, draws in streams.items():
        tokens = choose(probabilities.log().expand(_DRAWS, -1), draws=draws)
        p, bins = goodness_of_fit(tokens, probabilities)
        status: Status = "pass" if p >= _IMPROBABLE else "fail"
        if bins < 2:
            status = "info"
        found = f"p = {p:.2g} ({bins} bins), at least {_IMPROBABLE:.0e}"
        yield Finding(check="draws", case=f"{_DRAWS:,} {name}", status=status, found=found)


def goodness_of_fit(tokens: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """(p-value, bins) of Pearson's test: how probable draws as far from the distribution as these are, or farther.

    tokens: the draws, (draws,); probabilities: (vocab,). Tokens of which fewer than 5 are expected share a bin.
    The p-value is 0 if an impossible token was drawn.
    """
    probabilities = probabilities.double().cpu()
    counts = tokens.cpu().bincount(minlength=len(probabilities)).double()
    if bool((counts[probabilities == 0] > 0).any()):
        return 0.0, len(counts)
    expected = probabilities * len(tokens)
    alone = expected >= _FEWEST
    expected = torch.cat([expected[alone], expected[~alone].sum()[None]])
    counts = torch.cat([counts[alone], counts[~alone].sum()[None]])
    if expected[-1] < _FEWEST and len(expected) > 1:  # the shared bin joins the last of the others
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
        counts = torch.cat([counts[:-2], counts[-2:].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.double)
    p = torch.special.gammaincc(freedom / 2, statistic / 2) if len(counts) > 1 else torch.ones(())
    return float(p), len(counts)


__all__ = ["check_distributions", "check_draws", "goodness_of_fit"]
