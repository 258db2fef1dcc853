"""Answers before and after a run leave the run as it is."""

import json
from pathlib import Path
from typing import Any

import pytest

import handspun
from handspun.runs.metrics import read_metrics
from handspun.runs.sample_answers import SamplePrompt, sample_answers
from handspun.runs.train import train
from small_runs import ROWS, config, quiet_console

PROMPTS = [SamplePrompt("Say 3.", [{"role": "user", "content": "Say 3."}])]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_sample_answers_change_nothing_of_the_training(tiny_folder: Path, tmp_path: Path, lora: bool) -> None:
    data = tmp_path / "train.csv"
    data.write_text(ROWS, encoding="utf-8")
    steps = []
    for asked in (False, True):
        options: dict[str, Any] = {"lora": lora, "lora_dropout": 0.1, "report_rows": 0, "overwrite": True}
        options["sample_answers"] = asked
        options |= {"sample_prompts": ("Say 3.",), "num_epochs": 1, "dtype": "float32"}  # a probe may choose anew
        run = train(config(tiny_folder, data, **options), console=quiet_console())
        found = read_metrics(run.output_dir / "metrics.jsonl").steps
        steps.append([(step["loss"], step["grad_norm"]) for step in found])
    assert steps[0] == steps[1]


def test_weights_lie_as_they_lay_before_the_answers(tiny_chat: handspun.ChatModel) -> None:
    before = {name: weight.clone() for name, weight in tiny_chat.model.state_dict().items()}
    sample_answers(tiny_chat, PROMPTS, seconds=60)
    assert tiny_chat.model.state_dict().keys() == before.keys() > set()
    for name, weight in tiny_chat.model.state_dict().items():
        assert weight.untyped_storage().nbytes() == weight.nbytes
        assert weight.equal(before[name])


def test_the_time_for_answers_is_bounded(tiny_chat: handspun.ChatModel) -> None:
    ticks = iter(range(1_000_000))
    made = sample_answers(tiny_chat, PROMPTS, seconds=30, clock=lambda: float(next(ticks)))
    assert [answer.finish_reason for answer in made.answers] == ["cancelled"]
    assert next(ticks) < 40


@pytest.mark.slow
def test_an_int8_base_answers_without_float_copies(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.csv"
    data.write_text(ROWS, encoding="utf-8")
    options = {"lora": True, "base_weights": "int8", "sample_prompts": ("Say 3.",)}
    run = train(config(tiny_folder, data, **options), console=quiet_console())
    kept = json.loads((run.output_dir / "report_data.json").read_text(encoding="utf-8"))
    assert len(kept["before"]["answers"]) == len(kept["after"]["answers"]) == 1
    assert any("float copies" in note for note in kept["before"]["notes"])
