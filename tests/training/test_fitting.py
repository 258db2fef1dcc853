"""A run that cannot fit is refused before its first step, with what would; one that may not is told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from handspun.config import TrainConfig
from handspun.data.examples import Example
from handspun.errors import ModelError, TrainingError
from handspun.models.int8 import quantize_base
from handspun.models.lora import add_lora
from handspun.training.batching import batches, epoch_order
from handspun.training.distributed import Distributed
from handspun.training.memory import AvailableMemory, check_fits_in_memory, make_plan, predicted_peak
from tiny import tiny_model

CONFIG = TrainConfig(dtype="float32", batch_size=8)


def rows(count: int = 40) -> list[Example]:
    lengths = [100 + 7 * row % 60 for row in range(count)]
    return [
        Example([*range(row + 5, row + 5 + length)], [False] * 50 + [True] * (length - 50), "a", row)
        for row, length in enumerate(lengths)
    ]


def shapes_of(config: TrainConfig) -> PreTrainedModel:
    """A model of which weights take about as much as activations."""
    with torch.device("meta"):
        model = tiny_model(
            "llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16
        )
        if config.lora:
            model = add_lora(model, "tiny", rank=16, alpha=32, dropout=0.0)
    if config.base_weights == "int8":
        quantize_base(model)
    return model


def peak(config: TrainConfig) -> int:
    return make_plan(shapes_of(config), rows(), config).peak_memory


def check(config: TrainConfig, available: float, processes: Distributed = Distributed()) -> list[str]:  # noqa: B008
    room = AvailableMemory(int(available), "free memory of this machine")
    return check_fits_in_memory(config, rows(), shapes_of, room, processes=processes)


def test_where_there_is_room_nothing_is_said() -> None:
    assert check(CONFIG, 1.21 * peak(CONFIG)) == []


def test_where_a_fifth_may_be_missing_it_is_doubtful_and_said() -> None:
    (doubt,) = check(CONFIG, 1.19 * peak(CONFIG))
    assert doubt.startswith(
        f"this run may not fit in memory: predicted peak memory is {peak(CONFIG) / 1e9:.1f} GB"
    )
    assert check(CONFIG, 0.81 * peak(CONFIG))


def test_where_more_is_missing_the_run_is_refused_and_a_dry_run_told() -> None:
    available = 0.79 * peak(CONFIG)
    with pytest.raises(TrainingError, match=rf"and {available / 1e9:.1f} GB is available \(free"):
        check(CONFIG, available)
    (doubt,) = check(replace(CONFIG, dry_run=True), available)
    assert doubt.startswith("this run will not fit in memory")


def test_what_would_fit_is_named_with_its_prediction_and_does_fit() -> None:
    available = 0.79 * peak(CONFIG)
    with pytest.raises(TrainingError) as caught:
        check(CONFIG, available)
    remedies = dict(line.strip().split(": ") for line in str(caught.value).splitlines()[2:])
    for name, predicted in remedies.items():
        needed = peak(replace(CONFIG, **as_given(name)))
        assert predicted == f"{needed / 1e9:.1f} GB"
        assert 1.2 * needed <= available
    for name in ("--max-tokens 512", "--activation-checkpointing", "--optimizer-states 8bit", "--lora"):
        assert (name in remedies) == (1.2 * peak(replace(CONFIG, **as_given(name))) <= available)
    assert "--lora" in remedies
    assert not any(name.count("--") > 1 and "--lora" in name.split() for name in remedies)  # it is enough alone


def as_given(typed: str) -> dict[str, Any]:
    """The options of `--max-tokens 512 --lora` as a config has them."""
    options = [option.strip().split() for option in typed.split("--")[1:]]
    values: dict[str, Any] = {name.replace("-", "_"): (*value, True)[0] for name, *value in options}
    return {name: int(value) if str(value).isdigit() else value for name, value in values.items()}


def test_options_are_taken_together_where_none_alone_will_do() -> None:
    together = replace(CONFIG, lora=True, activation_checkpointing=True)
    available = 1.2 * peak(together) + 1
    with pytest.raises(TrainingError) as caught:
        check(CONFIG, available)
    assert f"  --activation-checkpointing --lora: {peak(together) / 1e9:.1f} GB" in str(caught.value).splitlines()


def test_where_nothing_helps_it_is_said() -> None:
    with pytest.raises(TrainingError, match=r"No option that was tried makes it fit\. Use a smaller model"):
        check(CONFIG, 10**8)


def test_what_this_machine_cannot_do_is_not_named() -> None:
    def without_int8(config: TrainConfig) -> PreTrainedModel:
        if config.base_weights == "int8":
            raise ModelError("int8 sums overflow on this CPU")
        return shapes_of(config)

    room = AvailableMemory(int(0.5 * peak(CONFIG)), "here")
    with pytest.raises(TrainingError) as caught:
        check_fits_in_memory(CONFIG, rows(), without_int8, room, processes=Distributed())
    assert "int8" not in str(caught.value)


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert check(CONFIG, 2.5 * peak(CONFIG)) == []
    assert check(CONFIG, 2.0 * peak(CONFIG))


def test_a_gpus_prediction_was_never_measured_and_refuses_nothing() -> None:
    assert check(CONFIG, 1000, Distributed(device=torch.device("cuda")))


def test_the_heaviest_batches_stand_for_all() -> None:
    order = epoch_order(40, seed=CONFIG.seed, epoch=1)
    whole = predicted_peak(shapes_of(CONFIG), batches(rows(), order, CONFIG.batch_size), CONFIG)
    assert whole == peak(CONFIG)
    available = 0.5 * whole
    with pytest.raises(TrainingError, match=f"predicted peak memory is {whole / 1e9:.1f} GB"):
        check(CONFIG, available)


def test_without_a_word_from_the_system_nothing_is_refused() -> None:
    assert check_fits_in_memory(CONFIG, rows(), shapes_of, None, processes=Distributed()) == []
