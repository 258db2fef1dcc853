"""What can go wrong in a step: non-finite losses, loss spikes, out of memory."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.errors import TrainingError
from handspun.kernels.allocator import malloc_trim


@dataclass(frozen=True)
class SkippedStep:
    """A step whose loss or gradient norm is not finite. Weights and optimizer states are unchanged.

    batch: file and number of each of its rows. skipped: steps skipped in this run so far, this one included.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    grad_norm: float
    batch: list[tuple[str, int]]
    skipped: int


def row_ids(batch: Sequence[Example]) -> list[tuple[str, int]]:
    """Return the file and number of each row that the examples come from, without duplicates."""
    return list(dict.fromkeys((example.file, example.row) for example in batch))


def is_finite(loss: float, grad_norm: float) -> bool:
    """Return whether both are finite."""
    # All ranks have the same two numbers, so they agree.
    return math.isfinite(loss) and math.isfinite(grad_norm)


def is_fatal(skipped: SkippedStep, config: TrainConfig) -> bool:
    """Return whether the skipped step ends the run."""
    return config.on_nonfinite == "stop" or skipped.skipped > config.max_skipped_steps


def raise_if_fatal(skipped: SkippedStep, config: TrainConfig) -> None:
    """Raise TrainingError if the skipped step ends the run."""
    if not is_fatal(skipped, config):
        return
    rows = "\n".join(f"  {file}, row {row}" for file, row in skipped.batch)
    if config.on_nonfinite == "stop":
        why = "Add --on-nonfinite skip to resume from the last checkpoint and skip such steps."
    else:
        why = (
            f"{skipped.skipped - 1} steps were skipped before it, and --max-skipped-steps is "
            f"{config.max_skipped_steps}."
        )
    raise TrainingError(
        f"step {skipped.step} was skipped: loss is {skipped.loss}, gradient norm is {skipped.grad_norm}. Weights "
        f"are unchanged. Rows of the step:\n{rows}\n{why} A lower --learning-rate, or --dtype float32, may help."
    )


WINDOW = 50
"""Number of recent losses that a new one is compared with."""

_MIN_LOSSES = 20
"""Number of losses needed before any can be called a spike."""

_FACTOR = 15
_MIN_EXCESS = 0.5


@dataclass(frozen=True)
class Spike:
    """A step whose loss is above `limit`.

    usual: median of the recent losses before it. batch: file and number of each of its rows.
    """

    step: int
    epoch: int
    loss: float
    usual: float
    limit: float
    batch: list[tuple[str, int]]


def spike_in(
    losses: Sequence[float], loss: float, *, step: int, epoch: int, batch: list[tuple[str, int]]
) -> Spike | None:
    """Return a Spike if the loss is far above the last `WINDOW` losses, else None (also while there are too few).

    The limit is median + 15 times the median absolute deviation, and at least 0.5 above the median.

    Args:
        losses: the losses of earlier steps, oldest first.
        loss: the loss of this step.
        step: number of this step.
        epoch: number of this epoch.
        batch: file and number of each row of this step.
    """
    recent = losses[-WINDOW:]
    if len(recent) < _MIN_LOSSES:
        return None
    # Hampel's rule: an earlier spike moves neither median by much. The margin is wide, since losses of small
    # batches have a long upper tail.
    usual = median(recent)
    deviation = median(abs(earlier - usual) for earlier in recent)
    # Late in training, losses are small, and easily multiples of each other: hence the least excess.
    limit = usual + max(_FACTOR * deviation, _MIN_EXCESS)
    return Spike(step, epoch, loss, usual, limit, batch) if loss > limit else None


@dataclass(frozen=True)
class OutOfMemory:
    """A micro-batch of `tokens` tokens that did not fit in memory.

    Its step is computed again. From then on, micro-batches have at most `max_tokens`; the result is the same.
    """

    step: int
    epoch: int
    tokens: int
    max_tokens: int


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error means out of memory: Python's, a GPU's, or PyTorch's on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # PyTorch's allocator for CPUs raises a RuntimeError without a class of its own.
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def free_memory() -> None:
    """Give memory that nothing holds any more back to the system, so that smaller micro-batches find room."""
    malloc_trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halved_max_tokens(micro_batch: Sequence[Example], max_tokens: int) -> int:
    """Return a `max_tokens` small enough to split `micro_batch`, which has at least two rows."""
    return max(min(max_tokens, sum(len(example) for example in micro_batch)) // 2, 1)


def raise_if_unsplittable(
    micro_batch: Sequence[Example], step: int, config: TrainConfig, *, processes: int
) -> None:
    """Raise TrainingError if the micro-batch that did not fit is a single row, or if there are several processes.

    Args:
        micro_batch: the rows that did not fit.
        step: number of the step, for the message.
        config: options of the run, for the remedies.
        processes: number of ranks.
    """
    tokens = sum(len(example) for example in micro_batch)
    # Other ranks wait for this one's gradient, and cannot know that it starts the step again.
    if len(micro_batch) > 1 and processes == 1:
        return
    if len(micro_batch) > 1:
        what = f"a micro-batch of {len(micro_batch)} rows with {tokens} tokens"
        remedies = [f"--max-tokens {halved_max_tokens(micro_batch, config.max_tokens)}"]
    else:
        what = f"{micro_batch[0].file}, row {micro_batch[0].row}, alone has {tokens} tokens"
        remedies = [f"--max-length {tokens // 2} (longer rows are truncated)"]
    if not config.activation_checkpointing:
        remedies.append("--activation-checkpointing")
    if config.optimizer_states != "8bit" and not config.shard:
        remedies.append("--optimizer-states 8bit")
    if not config.lora:
        remedies.append("--lora")
    raise TrainingError(
        f"step {step} ran out of memory: {what}. Weights are unchanged. Use less memory with any of: "
        f"{', '.join(remedies)}. --dry-run predicts how much each needs."
    )
