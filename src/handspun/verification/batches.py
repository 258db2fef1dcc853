"""What an answer is must not depend on the batch: prompts alone, in one batch, and in the reverse order."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from handspun.decoding.explain import Candidate
from handspun.decoding.generate import answer_all
from handspun.decoding.results import GenerationResult
from handspun.models.load import ChatModel
from handspun.verification.findings import Divergence, Finding, compared, first_difference, within
from handspun.verification.material import Material, engine_logits

_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}
_SEED = 1000


def check_batches(material: Material, chat: ChatModel, name: str, *, exact: bool) -> Iterator[Finding]:
    """Logits, greedy tokens, and tokens drawn with a seed for each prompt.

    exact: whether they are to be the same bit for bit, as in int8; else logits may differ by what is tolerated,
    and tokens where rounding explains it.
    """
    yield _logits(material, chat, name, exact=exact)
    for case, options in (("greedy", {}), ("sampled", _SAMPLING)):
        yield _tokens(material, chat, f"{name}, {case}", 0.0 if exact else material.rounding, options)


def _logits(material: Material, chat: ChatModel, name: str, *, exact: bool) -> Finding:
    answers = [answer.token_ids for answer in material.answers]
    alone = [
        engine_logits(chat, [ids], [answer])[0] for ids, answer in zip(material.prompts, answers, strict=True)
    ]
    together = engine_logits(chat, material.prompts, answers)
    reverse = engine_logits(chat, material.prompts[::-1], answers[::-1])[::-1]
    difference = max(_difference(alone, together), _difference(alone, reverse))
    case = f"{name}, logits"
    if exact and difference == 0:
        return Finding(check="batches", case=case, status="pass", found="the same, bit for bit")
    return within("batches", case, difference, 0.0 if exact else material.tolerance)


def _difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """NaN is never the same."""
    largest = torch.stack([(one - other).abs().max() for one, other in zip(some, others, strict=True)]).max()
    return math.inf if bool(largest.isnan()) else float(largest)


def _tokens(material: Material, chat: ChatModel, case: str, rounding: float, options: dict[str, Any]) -> Finding:
    numbers = range(len(material.prompts))

    def answers(prompts: Sequence[int]) -> list[GenerationResult]:
        seeds = tuple(_SEED + i for i in prompts)
        return answer_all(material.job(prompts, chat=chat, explain=True, seed=seeds, **options))

    alone = [answers([i])[0] for i in numbers]
    divergences: list[Divergence] = []
    for batch in (answers(numbers), answers(numbers[::-1])[::-1]):
        for prompt, (ours, one) in enumerate(zip(batch, alone, strict=True)):
            place = first_difference(ours.token_ids, one.token_ids)
            if place is not None:
                margin = _preference_margin(one, place, ours.token_ids)
                divergences.append(
                    material.divergence(
                        prompt, place, ours.token_ids, one.token_ids, margin=margin, rounding=rounding
                    )
                )
    tokens = sum(len(answer.token_ids) for answer in alone)
    return compared("batches", case, f"{tokens} tokens the same alone, together, reversed", divergences)


def _preference_margin(alone: GenerationResult, place: int, ours: Sequence[int]) -> float:
    """By how much the answer alone preferred its token to the other, noise of the draw included; without limit if
    the other was not the next best."""
    if place >= min(len(alone.token_ids), len(ours)) or alone.explanation is None:
        return math.inf
    step = alone.explanation[place]
    if step.runner_up is None or step.runner_up.token_id != ours[place]:
        return math.inf
    return _preference(step.chosen) - _preference(step.runner_up)


def _preference(candidate: Candidate) -> float:
    return math.log(max(candidate.probability, 1e-45)) + (candidate.noise or 0.0)


__all__ = ["check_batches"]
