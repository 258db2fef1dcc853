"""Optimiser steps that are left out, because their loss or gradient is not finite."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.errors import TrainingError


@dataclass(frozen=True)
class Skipped:
    """A step that was not made: its loss, or the norm of its gradient, is not finite. The weights and the
    optimiser's states are as they were before it. batch: file and number of each of its rows. skipped: how many
    steps of the run were left out so far, this one too."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    grad_norm: float
    batch: list[tuple[str, int]]
    skipped: int


def rows_of(batch: Sequence[Example]) -> list[tuple[str, int]]:
    """File and number of each row that the examples come from, once."""
    return list(dict.fromkeys((example.file, example.row) for example in batch))


def is_finite(loss: float, grad_norm: float) -> bool:
    """Whether a step may be made of them. All ranks have the same two numbers, so they agree."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


def ends_run(skipped: Skipped, config: TrainConfig) -> bool:
    """Whether the run is to end at such a step, or has left out as many as it may."""
    return config.on_nonfinite == "stop" or skipped.skipped > config.max_skipped_steps


def refuse_to_go_on(skipped: Skipped, config: TrainConfig) -> None:
    """Raises TrainingError if the step ends the run."""
    if not ends_run(skipped, config):
        return
    rows = "\n".join(f"  {file}, row {row}" for file, row in skipped.batch)
    if config.on_nonfinite == "stop":
        why = "With --on-nonfinite skip, the same command goes on from the last checkpoint without such steps."
    else:
        why = (
            f"{skipped.skipped - 1} steps were left out before it, and --max-skipped-steps is "
            f"{config.max_skipped_steps}."
        )
    raise TrainingError(
        f"step {skipped.step} was not made: its loss is {skipped.loss} and its gradient's norm "
        f"{skipped.grad_norm}. The weights are as they were before it. Its rows:\n{rows}\n"
        f"{why} A lower --learning-rate, or --dtype float32, may help."
    )
