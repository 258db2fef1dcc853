"""Compare answers: greedy and beam search with transformers, all kinds of decoding alone and in batches."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from handspun.decoding.explain import Candidate, TreeNode
from handspun.decoding.results import GenerationResult
from handspun.models.fused import fusing_unsupported_reason
from handspun.models.load import ChatModel
from handspun.verification.reference import (
    Divergence,
    Finding,
    Reference,
    ReferenceAnswer,
    compared,
    engine_logits,
    first_difference,
    next_logprobs,
    reference_answer,
    reference_beams,
    within,
)

_PENALTIES = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 12}
_BEAMS: tuple[dict[str, Any], ...] = (
    {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 2},
    {"num_beams": 3, "length_penalty": 0.6, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never", "num_return_sequences": 1},
)
_FEWER_PROMPTS = 2
"""Number of prompts for the second and third beam search."""


def check_logits(material: Reference) -> Finding:
    """Compare the engine's logits at every step of transformers' greedy answers."""
    steps = sum(len(logits) for logits in material.logits)
    reason = fusing_unsupported_reason(material.chat.model.config)
    engine = "the engine" if reason is None else f"with transformers' forward ({reason})"
    return within("logits", f"{engine}, {steps} steps", material.largest_difference, material.tolerance)


def check_greedy(material: Reference) -> Iterator[Finding]:
    """Compare greedy answers token by token, without processors and with some."""
    yield _greedy(material, "plain", material.answers)
    limits, model = material.limits, material.chat.model
    options = {**_PENALTIES, "min_new_tokens": min(12, *limits)}
    answers = [
        reference_answer(model, ids, eos_token_ids=material.eos_token_ids, max_new_tokens=limit, **options)
        for ids, limit in zip(material.prompts, limits, strict=True)
    ]
    yield _greedy(material, "penalties", answers, **options)


def _greedy(material: Reference, case: str, expected: Sequence[ReferenceAnswer], **options: Any) -> Finding:
    found = material.decode(**options)
    divergences = []
    for prompt, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        place = first_difference(ours.token_ids, theirs.token_ids)
        if place is not None:
            margin = _margin(theirs, place, ours.token_ids)
            divergences.append(
                material.divergence(
                    prompt, place, ours.token_ids, theirs.token_ids, margin=margin, rounding=material.rounding
                )
            )
    tokens = sum(len(answer.token_ids) for answer in expected)
    return compared("greedy", case, f"{len(found)} answers, {tokens} identical tokens", divergences)


def _margin(theirs: ReferenceAnswer, place: int, ours: Sequence[int]) -> float:
    """Return by how much transformers' processed logits prefer its own token over ours."""
    if place >= min(len(ours), len(theirs.token_ids)):
        return math.inf
    logits = theirs.processed[place]
    margin = float(logits[theirs.token_ids[place]] - logits[ours[place]])
    return margin if math.isfinite(margin) else math.inf


def check_beams(material: Reference) -> Iterator[Finding]:
    """Compare the ids and scores of beam searches."""
    for options in _BEAMS:
        prompts = (
            range(len(material.prompts)) if options is _BEAMS[0] else range(len(material.prompts))[:_FEWER_PROMPTS]
        )
        yield _beams(material, prompts, options)


def _beams(material: Reference, prompts: Sequence[int], options: dict[str, Any]) -> Finding:
    """Compare searches for some prompts, given by index."""
    found = material.decode(prompts, show_tree=True, **options)
    per_prompt, penalty = options["num_return_sequences"], options["length_penalty"]
    divergences, difference = list[Divergence](), 0.0
    for number, prompt in enumerate(prompts):
        ours = found[number * per_prompt : (number + 1) * per_prompt]
        theirs, expected = reference_beams(
            material.chat.model,
            material.prompts[prompt],
            eos_token_ids=material.eos_token_ids,
            max_new_tokens=material.limits[prompt],
            **options,
        )
        scores = _scores(ours, penalty)
        apart = _first_divergence(
            material, prompt, ours, theirs, scores=scores, expected=expected, beams=options["num_beams"]
        )
        if apart is not None:
            divergences.append(apart)
        else:
            triples = zip(ours, scores, expected, strict=True)
            difference = max(
                difference, *(abs(a - b) * len(one.token_ids) ** (penalty - 1) for one, a, b in triples)
            )
    case = f"{options['num_beams']} beams, early_stopping {options['early_stopping']}, {len(prompts)} prompts"
    if not difference <= material.rounding:
        what = "same tokens, but log-probabilities per token differ by"
        return within("beams", case, difference, material.rounding, what=what)
    same = f"{len(found)} identical answers, log-probabilities per token to {difference:.0e}"
    return compared("beams", case, same, divergences)


def _scores(answers: Sequence[GenerationResult], length_penalty: float) -> list[float]:
    nodes = answers[0].tree or []
    of_answer = {node.return_index: node.score for node in nodes if node.return_index is not None}
    return [
        of_answer.get(answer.return_index, math.nan) / len(answer.token_ids) ** length_penalty
        for answer in answers
    ]


def _first_divergence(
    material: Reference,
    prompt: int,
    ours: Sequence[GenerationResult],
    theirs: Sequence[list[int]],
    *,
    scores: Sequence[float],
    expected: Sequence[float],
    beams: int,
) -> Divergence | None:
    """Return the first of a prompt's answers that differs, with the search's closest decision as its margin."""
    pairs = zip([answer.token_ids for answer in ours], theirs, scores, expected, strict=True)
    for mine, other, score, wanted in pairs:
        place = first_difference(mine, other)
        if place is not None:
            gap = closest_decision(material, prompt, ours[0].tree or [], beams=beams)
            margin = min(gap, abs(score - wanted))
            rounding = material.rounding * len(other)  # scores are sums over this many tokens
            return material.divergence(prompt, place, mine, other, margin=margin, rounding=rounding)
    return None


def closest_decision(material: Reference, prompt: int, tree: Sequence[TreeNode], *, beams: int) -> float:
    """Return the smallest margin, in transformers' log-probabilities, between a kept and a dropped candidate.

    A search that takes another course because of rounding has some decision this close.

    Args:
        material: The reference.
        prompt: Index of the prompt.
        tree: The tree of our search.
        beams: Number of beams.
    """
    paths: dict[int | None, list[int]] = {None: []}
    gaps, eos = [], material.eos_token_ids
    level: list[tuple[int | None, float]] = [(None, 0.0)]
    while level and len(paths[level[0][0]]) < material.limits[prompt]:
        candidates: list[tuple[float, bool]] = []
        for place, score in level:
            logprobs = next_logprobs(material.chat.model, material.prompts[prompt] + paths[place])
            best = logprobs.topk(min(beams + 1 + len(eos), len(logprobs)))
            pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
            candidates += [(score + value, token in eos) for value, token in pairs]
        for scores in ([s for s, _ in candidates], [s for s, has_ended in candidates if not has_ended]):
            scores.sort(reverse=True)
            gaps += [scores[beams - 1] - scores[beams]] if len(scores) > beams else []
        places = {place for place, _ in level}
        children = [(i, node) for i, node in enumerate(tree) if node.parent in places and not node.ended]
        paths |= {i: [*paths[node.parent], node.token_id] for i, node in children}
        level = [(i, node.score) for i, node in children]
    return min(gaps, default=math.inf)


_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}
_SEED = 1000


def check_batches(material: Reference, chat: ChatModel, name: str, *, exact: bool) -> Iterator[Finding]:
    """Compare logits, greedy tokens and sampled tokens (one seed per prompt) between batches.

    Args:
        material: The reference, with prompts and answers.
        chat: The model to check.
        name: Name of its weights.
        exact: Require bit-identical results, as for int8. Otherwise logits may differ within the tolerance, and
            tokens where rounding explains it.
    """
    yield _logits(material, chat, name, exact=exact)
    for case, options in (("greedy", {}), ("sampled", _SAMPLING)):
        yield _tokens(material, chat, f"{name}, {case}", 0.0 if exact else material.rounding, options)


def _logits(material: Reference, chat: ChatModel, name: str, *, exact: bool) -> Finding:
    answers = [answer.token_ids for answer in material.answers]
    alone = [
        engine_logits(chat, [ids], [answer])[0] for ids, answer in zip(material.prompts, answers, strict=True)
    ]
    together = engine_logits(chat, material.prompts, answers)
    reverse = engine_logits(chat, material.prompts[::-1], answers[::-1])[::-1]
    difference = max(_difference(alone, together), _difference(alone, reverse))
    case = f"{name}, logits"
    if exact and difference == 0:
        return Finding(check="batches", case=case, status="pass", found="bit-identical")
    return within("batches", case, difference, 0.0 if exact else material.tolerance)


def _difference(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest absolute difference; infinity if there is a NaN."""
    largest = torch.stack([(one - other).abs().max() for one, other in zip(some, others, strict=True)]).max()
    return math.inf if bool(largest.isnan()) else float(largest)


def _tokens(material: Reference, chat: ChatModel, case: str, rounding: float, options: dict[str, Any]) -> Finding:
    numbers = range(len(material.prompts))

    def answers(prompts: Sequence[int]) -> list[GenerationResult]:
        seeds = tuple(_SEED + i for i in prompts)
        return material.decode(prompts, chat=chat, explain=True, seed=seeds, **options)

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
    return compared("batches", case, f"{tokens} identical tokens alone, together, reversed", divergences)


def _preference_margin(alone: GenerationResult, place: int, ours: Sequence[int]) -> float:
    """Return by how much the answer computed alone preferred its token to ours, noise of the draw included.

    The margin is infinite if our token was not the runner-up.
    """
    if place >= min(len(alone.token_ids), len(ours)) or alone.explanation is None:
        return math.inf
    step = alone.explanation[place]
    if step.runner_up is None or step.runner_up.token_id != ours[place]:
        return math.inf
    return _preference(step.chosen) - _preference(step.runner_up)


def _preference(candidate: Candidate) -> float:
    return math.log(max(candidate.probability, 1e-45)) + (candidate.noise or 0.0)
