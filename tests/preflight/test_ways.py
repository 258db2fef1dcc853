"""The ways to train that preflight offers, with times and memory that are given by hand."""

from typing import Literal

import pytest

from handspun.config import TrainConfig
from handspun.errors import ModelError
from handspun.preflight.ways import Way, way_lines, ways_to_train
from handspun.training.memory import AvailableMemory

ROOM = AvailableMemory(30 * 10**8, "free memory of this machine")
"""3 GB: a predicted peak fits up to 2.5 GB, since it may be a fifth more, and may fit up to 3.75 GB."""


def predict(config: TrainConfig) -> tuple[float, int]:
    """Full takes 200 s and 4 GB, LoRA 100 s and 2.6 GB, LoRA on int8 50 s and 2.5 GB.

    With float32 it takes twice as long; activation checkpointing costs a quarter and saves 0.6 of the bytes.
    """
    seconds, peak = (100.0, 26 * 10**8) if config.lora else (200.0, 40 * 10**8)
    if config.base_weights == "int8":
        seconds, peak = 50.0, 25 * 10**8
    elif config.dtype == "float32":
        seconds *= 2
    return (seconds * 1.25, peak * 4 // 10) if config.activation_checkpointing else (seconds, peak)


def test_ways_to_train_says_what_fits_and_what_would() -> None:
    full, full_less, lora, lora_less, int8 = ways_to_train(TrainConfig(), predict, ROOM)
    assert full == Way("full", 200.0, 40 * 10**8, "does not fit", chosen=True)
    assert full_less == Way("full --activation-checkpointing", 250.0, 16 * 10**8, "fits", chosen=False)
    assert lora == Way("--lora", 100.0, 26 * 10**8, "may not fit", chosen=False)
    assert (lora_less.options, lora_less.fit) == ("--lora --activation-checkpointing", "fits")
    assert int8 == Way("--lora --base-weights int8", 50.0, 25 * 10**8, "fits", chosen=False)


def test_ways_to_train_keeps_the_options_of_the_run_and_marks_them() -> None:
    config = TrainConfig(lora=True, base_weights="int8", activation_checkpointing=True, num_epochs=1)
    seen: list[TrainConfig] = []

    def seeing(changed: TrainConfig) -> tuple[float, int]:
        seen.append(changed)
        return predict(changed)

    ways = ways_to_train(config, seeing, ROOM)
    assert [(way.options, way.seconds, way.chosen) for way in ways] == [
        ("full", 250.0, False),
        ("--lora", 125.0, False),
        ("--lora --base-weights int8", 62.5, True),
    ]
    assert seen[2] == config
    assert {(one.activation_checkpointing, one.num_epochs) for one in seen} == {(True, 1)}


def test_ways_to_train_leaves_out_what_this_machine_cannot_do() -> None:
    def without_int8(config: TrainConfig) -> tuple[float, int]:
        if config.base_weights == "int8":
            raise ModelError("int8 sums overflow on this CPU")
        return predict(config)

    assert [way.options for way in ways_to_train(TrainConfig(), without_int8, None)] == ["full", "--lora"]
    sharded = ways_to_train(TrainConfig(shard=True), predict, None)  # int8 weights cannot be sharded
    assert [way.options for way in sharded] == ["full", "--lora"]


@pytest.mark.parametrize(("dtype", "is_offered"), [("float32", True), ("bfloat16", False)])
def test_ways_to_train_offers_auto_only_if_it_is_faster(
    dtype: Literal["float32", "bfloat16"], is_offered: bool
) -> None:
    config = TrainConfig(lora=True, dtype=dtype)
    *others, last = ways_to_train(config, predict, None)
    assert (last.options == "--lora --dtype auto") == is_offered
    if is_offered:
        assert (others[1].seconds, others[1].chosen) == (200.0, True)
        assert (last.seconds, last.chosen) == (100.0, False)


def test_way_lines_is_a_table_with_an_arrow_and_what_does_not_fit() -> None:
    ways = [
        Way("full", 2460.0, 4_040_000_000, "does not fit", chosen=True),
        Way("--lora", 59.0, 13_000_000_000, "may not fit", chosen=False),
        Way("--lora --base-weights int8", 7500.0, 2_440_000_000, "fits", chosen=False),
    ]
    assert list(way_lines(ways, ROOM)) == [
        "ways to train, with predicted time and peak memory; 3.0 GB available:",
        "-> full                         41m00s   4.0 GB  does not fit",
        "   --lora                          59s  13.0 GB  may not fit",
        "   --lora --base-weights int8    2h05m   2.4 GB",
    ]


def test_way_lines_leaves_out_what_is_unknown() -> None:
    assert list(way_lines([Way("full", None, 4_000_000_000, None, chosen=True)], None)) == [
        "ways to train, with predicted time and peak memory:",
        "-> full   4.0 GB",
    ]
