"""The ways to train that one's rows and machine allow, each with its predicted time and memory."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from handspun.config import TrainConfig
from handspun.display import duration
from handspun.errors import HandspunError
from handspun.training.memory import AvailableMemory, Fit, how_it_fits

Predict = Callable[[TrainConfig], tuple[float | None, int]]
"""Returns the predicted seconds of a config's steps, None if unknown, and its predicted peak bytes."""


@dataclass(frozen=True)
class Way:
    """A way to train.

    options: what makes it, such as `--lora --base-weights int8`; `full` is without `--lora`. seconds: predicted
    for the steps, None if unknown. peak_memory: predicted bytes. fit: None if the available memory is unknown.
    chosen: whether the run has these options.
    """

    options: str
    seconds: float | None
    peak_memory: int
    fit: Fit | None
    chosen: bool


_KINDS: list[dict[str, Any]] = [
    {"lora": False, "base_weights": "float32", "lora_target_modules": None},
    {"lora": True, "base_weights": "float32"},
    {"lora": True, "base_weights": "int8"},
]
_LESS_MEMORY = {"activation_checkpointing": True}


def ways_to_train(config: TrainConfig, predict: Predict, available: AvailableMemory | None) -> list[Way]:
    """Return full fine-tuning, LoRA, and LoRA on an int8 base, each with the run's other options.

    A way that may not fit into memory is followed by itself with activation checkpointing, if that fits. If the
    run asks for a type of matmuls and `--dtype auto` is predicted to be faster, this comes last.

    Args:
        config: the run's options.
        predict: predicts time and memory of a config. A HandspunError means that it is not possible here.
        available: the memory, or None if unknown.
    """
    ways = []
    for changes in _KINDS:
        for way in _possible(config, changes, predict, available):
            ways.append(way)
            if way.fit in ("may not fit", "does not fit") and not config.activation_checkpointing:
                with_less = _possible(config, changes | _LESS_MEMORY, predict, available)
                ways += [less for less in with_less if less.fit == "fits"]
    return ways + [
        auto
        for auto in _possible(config, {"dtype": "auto"}, predict, available)
        for chosen in ways
        if chosen.chosen and auto.seconds and chosen.seconds and auto.seconds < chosen.seconds
    ]


def _possible(
    config: TrainConfig, changes: dict[str, Any], predict: Predict, available: AvailableMemory | None
) -> Iterator[Way]:
    """Yield the way that a config with these changes is, if it is possible on this machine."""
    try:
        changed = replace(config, **changes)
        seconds, peak = predict(changed)
    except HandspunError:  # int8 with --shard, or int8 matmuls that are not exact on this machine
        return
    fit = None if available is None else how_it_fits(peak, available.available)
    yield Way(_options(changed, config), seconds, peak, fit, chosen=changed == config)


def _options(changed: TrainConfig, config: TrainConfig) -> str:
    """Return the options that make a way; the run's others go without saying."""
    words = ["--lora" if changed.lora else "full"]
    if changed.base_weights == "int8":
        words.append("--base-weights int8")
    if changed.activation_checkpointing and not config.activation_checkpointing:
        words.append("--activation-checkpointing")
    if changed.dtype != config.dtype:
        words.append(f"--dtype {changed.dtype}")
    return " ".join(words)


def way_lines(ways: Sequence[Way], available: AvailableMemory | None) -> Iterator[str]:
    """Yield a table of the ways, with an arrow at the run's own."""
    room = f"; {available.available / 1e9:.1f} GB available" if available is not None else ""
    yield f"ways to train, with predicted time and peak memory{room}:"
    width = max((len(way.options) for way in ways), default=0)
    for way in ways:
        time = "" if way.seconds is None else f"{duration(way.seconds):>9}"
        fit = "" if way.fit in (None, "fits") else f"  {way.fit}"
        yield f"{'->' if way.chosen else '  '} {way.options:<{width}}{time}{way.peak_memory / 1e9:>6.1f} GB{fit}"
