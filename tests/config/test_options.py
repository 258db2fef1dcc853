"""Options: each default once, all problems at once, each with its remedy."""

import pytest

from handspun.config import GenerationOptions, TrainConfig
from handspun.errors import ConfigError


def problems(make: type, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(**options)
    return caught.value.problems


def test_all_problems_are_listed_at_once() -> None:
    found = problems(TrainConfig, batch_size=0, num_epochs=0, learning_rate=-1.0)
    assert [text.split()[0] for text in found] == ["num_epochs", "batch_size", "learning_rate"]
    assert found[1] == "batch_size is 0: expected at least 1."


def test_held_out_rows_come_from_one_place() -> None:
    (found,) = problems(TrainConfig, eval_data="held_out.csv", eval_ratio=0.1)
    assert "eval_data and eval_ratio exclude each other" in found


@pytest.mark.parametrize(
    "options", [{"lora_target_modules": ("q_proj",)}, {"lora": True, "lora_target_modules": ()}]
)
def test_target_modules_are_for_lora_and_at_least_one(options: dict[str, object]) -> None:
    (found,) = problems(TrainConfig, **options)
    assert found.startswith("lora_target_modules names layers for LoRA adapters. Add")


def test_beams_with_top_p_and_no_sampling_is_a_contradiction() -> None:
    (found,) = problems(GenerationOptions, num_beams=4, top_p=0.9)
    assert found.startswith("top_p only affects sampling, and num_beams=4 does not sample.")


def test_beams_and_sampling_exclude_each_other() -> None:
    (found,) = problems(GenerationOptions, num_beams=4, do_sample=True)
    assert "exclude each other" in found


def test_more_answers_than_beams_cannot_be_had() -> None:
    (found,) = problems(GenerationOptions, num_beams=2, num_return_sequences=3)
    assert "num_return_sequences=3 is more than num_beams=2" in found


def test_beam_options_without_beams_are_said_to_have_no_effect() -> None:
    assert len(problems(GenerationOptions, length_penalty=0.6, early_stopping=True)) == 2


def test_int8_weights_are_frozen_and_want_adapters() -> None:
    (found,) = problems(TrainConfig, base_weights="int8")
    assert found.startswith('base_weights="int8" needs lora=True')
    assert TrainConfig(base_weights="int8", lora=True).lora


def test_short_states_and_shares_exclude_each_other() -> None:
    (found,) = problems(TrainConfig, optimizer_states="8bit", shard=True)
    assert found.startswith("shard=True splits float32 optimizer states")


@pytest.mark.parametrize(
    ("lora", "given", "expected"), [(False, None, 5e-5), (True, None, 5e-4), (True, 1e-3, 1e-3)]
)
def test_the_default_learning_rate_depends_on_lora(lora: bool, given: float | None, expected: float) -> None:
    assert TrainConfig(lora=lora, learning_rate=given).peak_learning_rate == expected
