"""Logits that are no numbers: a model with NaN or infinity in it would answer with its first token, for ever."""

from collections.abc import Sequence
from weakref import WeakSet

import torch
from torch import Tensor, nn

from handspun.decoding.answer import Answer
from handspun.errors import ModelError
from handspun.models.finite import nonfinite_weights
from handspun.models.load import ChatModel

_CHECKED: WeakSet[nn.Module] = WeakSet()
"""Models whose weights have been looked at: once is enough, and takes as long as a step."""


def check_finite(logits: Tensor, answers: Sequence[Answer], model: ChatModel) -> None:
    """Raise ModelError if any of the model's logits is NaN or infinite. logits: (answers, vocab).

    Attention hides NaN in some weights behind finite logits (a NaN in its softmax counts as 0), so the weights are
    looked at too, at the first step of a model's first answers.
    """
    if not bool(torch.isfinite(logits.sum())):  # one pass over them; only what is not finite is looked at again
        wrong = (~torch.isfinite(logits)).sum(-1).tolist()
        if any(wrong):  # or they are large, and their sum overflowed
            row = next(i for i, count in enumerate(wrong) if count)
            what = f"{wrong[row]:,} of the model's {logits.shape[-1]:,} logits are NaN or infinite"
            raise ModelError(
                f"{model.name}: {what}, {_where(answers[row])}. {_cause(nonfinite_weights(model.model))}"
            )
    if model.model not in _CHECKED:
        if found := nonfinite_weights(model.model):
            what = f"the logits are finite {_where(answers[0])}, but cannot be right"
            raise ModelError(f"{model.name}: {what}. {_cause(found)}")
        _CHECKED.add(model.model)


def _where(answer: Answer) -> str:
    return f"at token {len(answer.token_ids) + 1} of the answer to prompt {answer.prompt_index + 1}"


def _cause(found: str) -> str:
    if found:
        return (
            f"These weights hold NaN or infinity: {found}. Use an earlier checkpoint, or download the model again."
        )
    return (
        "All weights are finite, so a number overflowed on the way: use --weights float32, and if that is what it "
        "is, an earlier checkpoint."
    )


__all__ = ["check_finite"]
