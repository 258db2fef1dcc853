"""Answers in the middle of a run: they are seen, and the run does not notice."""

import json
from pathlib import Path
from typing import Any

import pytest

from handspun.errors import ConfigError, DataError
from handspun.report.page import report_page
from handspun.runs.metrics import read_run
from interrupted_runs import config, crash, events, train, weights

ADAPTERS = {"lora": True, "lora_dropout": 0.3}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "full padded": {"batching": "padded"},
    "LoRA": ADAPTERS,
    "LoRA padded": {**ADAPTERS, "batching": "padded"},
    "int8 base": {**ADAPTERS, "base_weights": "int8"},
    "matmuls in bfloat16": {"dtype": "bfloat16"},
    "computed again": {"activation_checkpointing": True},
}


def samples_in(output: Path) -> list[dict[str, Any]]:
    made = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [event for event in made if event["event"] == "samples"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_losses_are_the_same_bits_with_answers_and_without(
    tiny_folder: Path, data: Path, kind: str
) -> None:
    """Under dropout too, whose draws another draw would change."""
    train(config(tiny_folder, data, "without", **KINDS[kind]))
    train(config(tiny_folder, data, "with", **KINDS[kind], sample_every=3))
    without, answered = data.with_name("without"), data.with_name("with")
    assert len(samples_in(answered)) == 5
    assert weights(answered) == weights(without)
    assert [event for event in events(answered) if event["event"] != "samples"] == events(without)


def test_answers_land_in_the_log_the_metrics_and_the_report(tiny_folder: Path, data: Path) -> None:
    prompts = ("Say 3.", "Say 4 <b>.")
    said = train(config(tiny_folder, data, "output", sample_every=6, sample_prompts=prompts))
    output = data.with_name("output")
    found = samples_in(output)
    assert [(sample["step"], sample["epoch"]) for sample in found] == [(6, 2), (12, 3)]
    assert [answer["prompt"] for answer in found[0]["answers"]] == list(prompts)
    assert "answers after step 6, in " in said
    assert "  > Say 4 <b>." in (output / "train.log").read_text(encoding="utf-8")
    page = report_page(read_run(output))
    assert "Say 4 &lt;b&gt;." in page
    assert "After step 12" in page


@pytest.mark.slow
def test_a_resumed_run_answers_behind_the_same_steps(tiny_folder: Path, data: Path, crash_after: Any) -> None:
    train(config(tiny_folder, data, "whole", sample_every=2))
    again = config(tiny_folder, data, "again", sample_every=2, save_steps=4)
    crash_after(9)
    crash(again)
    crash_after(15)
    train(again)
    assert events(data.with_name("again")) == events(data.with_name("whole"))


@pytest.mark.slow
def test_a_run_may_go_on_with_more_answers(tiny_folder: Path, data: Path, crash_after: Any) -> None:
    """No weight depends on them."""
    crash_after(7)
    crash(config(tiny_folder, data, "output"))
    crash_after(15)
    train(config(tiny_folder, data, "output", sample_every=5))
    assert [sample["step"] for sample in samples_in(data.with_name("output"))] == [10, 15]


def test_what_cannot_be_answered_is_said_before_the_first_step(tiny_folder: Path, data: Path) -> None:
    with pytest.raises(
        ConfigError, match="sample_every needs the whole model in one process, and shard=True splits it"
    ):
        config(tiny_folder, data, "output", sample_every=1, shard=True)
    with pytest.raises(DataError):
        train(config(tiny_folder, data, "output", sample_every=1, sample_prompts=("too long " * 600,)))
    assert not data.with_name("output").exists()
