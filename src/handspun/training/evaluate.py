"""Held-out loss: a mean over tokens, so it does not depend on how the rows are cut into batches."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from handspun.data.example_arrays import learned_tokens_of
from handspun.data.examples import Example
from handspun.training.execution import Execution
from handspun.training.processes import Processes


def evaluate(
    model: PreTrainedModel,
    execution: Execution,
    examples: Sequence[Example],
    *,
    max_tokens: int,
    processes: Processes = Processes(),  # noqa: B008  (frozen)
) -> tuple[float, int]:
    """(mean loss a learned token, number of learned tokens), with dropout off. A NaN stays a NaN."""
    was_training = model.training
    model.eval()
    parts = processes.parts(examples, lambda rows: execution.cut(rows, max_tokens))
    loss_sum = processes.sum(sum(execution.loss(part) for part in parts))
    model.train(was_training)
    learned_tokens = learned_tokens_of(examples)
    return loss_sum / learned_tokens, learned_tokens
