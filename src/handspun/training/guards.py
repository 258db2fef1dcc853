"""Losses that are not finite, spikes, and the end of memory."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.errors import TrainingError
from handspun.kernels.allocator import malloc_trim


@dataclass(frozen=True)
class SkippedStep:
    """A step that was not made: its loss, or the norm of its gradient, is not finite. The weights and the
    optimizer's states are as they were before it. batch: file and number of each of its rows. skipped: how many
    steps of the run were left out so far, this one too."""

    step: int
    total_steps: int
    epoch: int
    loss: float
    grad_norm: float
    batch: list[tuple[str, int]]
    skipped: int


def row_ids(batch: Sequence[Example]) -> list[tuple[str, int]]:
    """File and number of each row that the examples come from, once."""
    return list(dict.fromkeys((example.file, example.row) for example in batch))


def is_finite(loss: float, grad_norm: float) -> bool:
    """Whether a step may be made of them. All ranks have the same two numbers, so they agree."""
    return math.isfinite(loss) and math.isfinite(grad_norm)


def is_fatal(skipped: SkippedStep, config: TrainConfig) -> bool:
    """Whether the run is to end at such a step, or has left out as many as it may."""
    return config.on_nonfinite == "stop" or skipped.skipped > config.max_skipped_steps


def raise_if_fatal(skipped: SkippedStep, config: TrainConfig) -> None:
    """Raises TrainingError if the step ends the run."""
    if not is_fatal(skipped, config):
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


WINDOW = 50
"""So many losses are looked back on."""

_WARM_UP = 20
"""With fewer there is no telling what is usual."""

_FACTOR = 15
_LEAST = 0.5


@dataclass(frozen=True)
class Spike:
    """A step whose loss is above `limit`; `usual` is the median of the losses before it. batch: file and number of
    each of its rows."""

    step: int
    epoch: int
    loss: float
    usual: float
    limit: float
    batch: list[tuple[str, int]]


def spike_in(
    losses: Sequence[float], loss: float, *, step: int, epoch: int, batch: list[tuple[str, int]]
) -> Spike | None:
    """The step as a Spike, if its loss is one by the last `WINDOW` losses before it; None while they are too few.

    It is one above median + 15 times the median absolute deviation (Hampel's rule, with a wide margin: losses of
    small batches have a long upper tail), and at least 0.5 above the median: where nearly all is learned, losses
    are multiples of each other. A spike among the losses before moves neither by much.
    """
    recent = losses[-WINDOW:]
    if len(recent) < _WARM_UP:
        return None
    usual = median(recent)
    deviation = median(abs(earlier - usual) for earlier in recent)
    limit = usual + max(_FACTOR * deviation, _LEAST)
    return Spike(step, epoch, loss, usual, limit, batch) if loss > limit else None


@dataclass(frozen=True)
class OutOfMemory:
    """A micro-batch of `tokens` tokens did not fit. Its step is computed anew, and from here on micro-batches have
    at most `max_tokens`; the result is the same."""

    step: int
    epoch: int
    tokens: int
    max_tokens: int


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is Python's, a GPU's, or that of PyTorch's allocator on a CPU (a plain RuntimeError)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def none_on_oom(compute: Callable[..., float], *arguments: object) -> float | None:
    """What `compute` gives; None if memory did not suffice, and what it held is given back to the system, so that
    smaller pieces find room."""
    try:
        return compute(*arguments)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    malloc_trim()  # here, where the error and what its frames hold is gone
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def halved_max_tokens(micro_batch: Sequence[Example], max_tokens: int) -> int:
    """A `max_tokens` that cuts `micro_batch`, which has two rows or more: half of its tokens or of the old one."""
    return max(min(max_tokens, sum(len(example) for example in micro_batch)) // 2, 1)


def raise_if_unsplittable(
    micro_batch: Sequence[Example], step: int, config: TrainConfig, *, processes: int
) -> None:
    """Raises TrainingError if the micro-batch that did not fit is one row, or the run one of several processes:
    the others wait for this one's gradient, and cannot know that it starts the step anew."""
    tokens = sum(len(example) for example in micro_batch)
    if len(micro_batch) > 1 and processes == 1:
        return
    if len(micro_batch) > 1:
        what = f"a micro-batch of {len(micro_batch)} rows with {tokens} tokens"
        remedies = [f"--max-tokens {halved_max_tokens(micro_batch, config.max_tokens)}"]
    else:
        what = f"{micro_batch[0].file}, row {micro_batch[0].row}, {tokens} tokens, by itself"
        remedies = [f"--max-length {tokens // 2} (longer rows are truncated)"]
    if not config.activation_checkpointing:
        remedies.append("--activation-checkpointing")
    if config.optimizer_states != "8bit" and not config.shard:
        remedies.append("--optimizer-states 8bit")
    if not config.lora:
        remedies.append("--lora")
    raise TrainingError(
        f"memory does not suffice for step {step}: {what}. The weights are as they were before it. What takes "
        f"less: {', '.join(remedies)}. --dry-run predicts how much each needs."
    )
