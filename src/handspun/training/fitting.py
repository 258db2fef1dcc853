"""Whether a run fits into the memory that is there, and which options would make it fit."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from transformers import PreTrainedModel

from handspun.config import TrainConfig, option_name
from handspun.data.batches import epoch_order
from handspun.data.example_arrays import lengths_of
from handspun.data.examples import Example
from handspun.errors import HandspunError, TrainingError
from handspun.training.plan import predicted_peak
from handspun.training.processes import Processes
from handspun.training.room import Room

_MARGIN = 0.2
"""By so much a prediction may be off (docs/results.md). A run is refused where not even four fifths of it fit, and
doubtful where six fifths of it do not."""

_HEAVIEST = 16

Shapes = Callable[[TrainConfig], PreTrainedModel]
"""The model that a config trains, on the meta device."""


def check_room(
    config: TrainConfig,
    examples: Sequence[Example],
    shapes_of: Shapes,
    room: Room | None,
    *,
    processes: Processes,
    notice: Callable[[str], None],
) -> None:
    """Compares the predicted peak with the memory that is there, on all ranks alike. `notice` is told where it is
    doubtful, and which options would fit.

    Raises TrainingError where the run cannot fit. Under `dry_run` that is told too; and with `shard`, whose share
    is not predicted, and on a GPU, whose allocator is not this one.
    """
    if room is None:
        processes.max(0.0)  # other ranks may know theirs
        return
    heaviest = _heaviest(examples, config)
    predicted = predicted_peak(shapes_of(config), heaviest, config)
    available = room.available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    taken = processes.max(predicted / max(available, 1))
    if taken * (1 + _MARGIN) <= 1:
        return
    lines = [
        f"this run is predicted to take {predicted / 1e9:.1f} GB at its peak{_each(processes)}, and "
        f"{available / 1e9:.1f} GB are there ({room.bound}).",
        *_remedies(config, heaviest, shapes_of, available),
    ]
    if taken * (1 - _MARGIN) <= 1:
        notice("it may not fit into memory: " + "\n".join(lines))
    elif config.dry_run or config.shard or processes.device.type != "cpu":
        notice("it will not fit into memory: " + "\n".join(lines))
    else:
        raise TrainingError("\n".join(lines))


def _each(processes: Processes) -> str:
    if processes.sharded:
        return " in each process, without --shard"
    return " in each process" if processes.count > 1 else ""


def _heaviest(examples: Sequence[Example], config: TrainConfig) -> list[list[Example]]:
    """Of the first epoch's batches those with the most tokens, and those with the longest rows."""
    lengths, order = lengths_of(examples), epoch_order(len(examples), seed=config.seed, epoch=1)
    made = [order[start : start + config.batch_size] for start in range(0, len(order), config.batch_size)]
    largest = sorted(made, key=lambda batch: int(lengths[batch].sum()), reverse=True)[:_HEAVIEST]
    longest = sorted(made, key=lambda batch: int(lengths[batch].max()), reverse=True)[:_HEAVIEST]
    return [[examples[i] for i in batch] for batch in largest + longest]


def _remedies(
    config: TrainConfig, heaviest: Sequence[Sequence[Example]], shapes_of: Shapes, available: int
) -> Iterator[str]:
    """A line for each change that would fit, with its predicted peak; what has a smaller change in it that fits is
    left out."""
    longest = max(len(example) for batch in heaviest for example in batch)
    model_of: dict[tuple[bool, str], PreTrainedModel] = {}
    fitting: dict[frozenset[str], str] = {}
    for changes in _changes(config, longest):
        if any(fewer <= changes.keys() for fewer in fitting):
            continue
        changed = replace(config, **changes)
        kind = changed.lora, changed.base_weights
        try:
            model_of[kind] = model_of.get(kind) or shapes_of(changed)
            peak = predicted_peak(model_of[kind], heaviest, changed)
        except HandspunError:  # int8 products that are not exact on this machine
            continue
        if peak * (1 + _MARGIN) <= available:
            named = " ".join(_typed(name, value) for name, value in changes.items())
            fitting[frozenset(changes)] = f"  {named}: {peak / 1e9:.1f} GB"
    if not fitting:
        yield "No option that was tried would make it fit: take a smaller model, or free some memory."
        return
    yield "What would fit, with its predicted peak:"
    yield from fitting.values()


def _changes(config: TrainConfig, longest: int) -> list[dict[str, Any]]:
    """Options that take less memory, alone and together, the fewest first. Micro-batches are halved as long as the
    longest row fits into one; beside other options they are the smallest."""
    halves: list[int] = []
    while (less := (halves[-1] if halves else config.max_tokens) // 2) >= longest:
        halves.append(less)
    smallest = [{"max_tokens": halves[-1]}] if halves else []
    again = [] if config.activation_checkpointing else [{"activation_checkpointing": True}]
    states = [] if config.optimizer_states == "8bit" or config.shard else [{"optimizer_states": "8bit"}]
    adapters: list[dict[str, Any]] = [] if config.lora else [{"lora": True}]
    if config.base_weights != "int8" and not config.shard:
        adapters.append({"lora": True, "base_weights": "int8"})
    nothing: list[dict[str, Any]] = [{}]
    together = [
        {**a, **b, **c, **d}
        for a, b, c, d in product(nothing + smallest, nothing + again, nothing + states, nothing + adapters)
    ]
    return sorted([*({"max_tokens": less} for less in halves), *together[1:]], key=len)


def _typed(name: str, value: object) -> str:
    return option_name(name) if value is True else f"{option_name(name)} {value}"
