"""Choose the next tokens of answers from the model's logits: process, select, explain, score."""

from collections.abc import Sequence

import torch
from torch import Tensor

from handspun.decoding.explain import explain
from handspun.decoding.processors import check_some_left, process
from handspun.decoding.request import Completion, Score, check_finite
from handspun.decoding.sampling import gumbel_noise, select_tokens, stream_of
from handspun.decoding.top import top_values
from handspun.models.load import ChatModel


def next_tokens(
    logits: Tensor, answers: Sequence[Completion], model: ChatModel
) -> tuple[Tensor, Sequence[Score | None]]:
    """Return the next token of each answer, (answers,), and its score if requested.

    logits: (answers, vocab). answers: those of one group.
    """
    processors = answers[0].request.processors
    check_finite(logits, answers, model)
    filtered = process(logits, answers, processors)
    check_some_left(filtered, answers, processors)
    tokens = select_tokens(filtered, draws=_random_streams(answers))
    _append_explanations(logits, answers, tokens)
    if not any(answer.request.logprobs for answer in answers):
        return tokens, [None] * len(answers)
    found = score_tokens(logits, tokens.tolist(), max(answer.request.top_logprobs for answer in answers))
    return tokens, [
        Score(one.logprob, one.top[: answer.request.top_logprobs]) if answer.request.logprobs else None
        for one, answer in zip(found, answers, strict=True)
    ]


def score_prompt_tokens(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Score]:
    """Return the score of each token with its rank. Arguments: as of `score_tokens`."""
    own = logits.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logits > own).sum(-1) + 1
    scores = score_tokens(logits, token_ids, top)
    return [score._replace(rank=rank) for score, rank in zip(scores, ranks.tolist(), strict=True)]


def score_tokens(logits: Tensor, token_ids: Sequence[int], top: int) -> list[Score]:
    """Return the score of each token, with the `top` most probable ones. logits: (tokens, vocab)."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(token_ids, device=logits.device)[:, None])[:, 0].tolist()
    if not top:
        return [Score(logprob, []) for logprob in chosen]
    best, ids = top_values(logprobs, min(top, logits.shape[-1]))
    tops = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), best.tolist(), strict=True)]
    return [Score(logprob, row) for logprob, row in zip(chosen, tops, strict=True)]


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
        select_rows(logits, chosen), asking, request.processors,
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


def select_rows(logits: Tensor, indices: list[int]) -> Tensor:
    """Select rows, (tokens, vocab) -> (indices, vocab), without a copy if all are selected in order."""
    return logits if indices == list(range(len(logits))) else logits[indices]
