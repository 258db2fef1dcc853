"""A micro-batch that memory does not suffice for: half as many tokens are tried, where it can be cut."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.errors import TrainingError
from handspun.models.allocator import give_back_freed_memory


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


def unless_out_of_memory(compute: Callable[..., float], *arguments: object) -> float | None:
    """What `compute` gives; None if memory did not suffice, and what it held is given back to the system, so that
    smaller pieces find room."""
    try:
        return compute(*arguments)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    give_back_freed_memory()  # here, where the error and what its frames hold is gone
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def half_of(part: Sequence[Example], max_tokens: int) -> int:
    """A `max_tokens` that cuts `part`, which has two rows or more: half of its tokens or of the old one."""
    return max(min(max_tokens, sum(len(example) for example in part)) // 2, 1)


def refuse_to_cut(part: Sequence[Example], step: int, config: TrainConfig, *, processes: int) -> None:
    """Raises TrainingError if the micro-batch that did not fit is one row, or the run one of several processes:
    the others wait for this one's gradient, and cannot know that it starts the step anew."""
    tokens = sum(len(example) for example in part)
    if len(part) > 1 and processes == 1:
        return
    if len(part) > 1:
        what = f"a micro-batch of {len(part)} rows with {tokens} tokens"
        remedies = [f"--max-tokens {half_of(part, config.max_tokens)}"]
    else:
        what = f"{part[0].file}, row {part[0].row}, {tokens} tokens, by itself"
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
