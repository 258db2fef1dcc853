"""The command in a report does the run again."""

import shlex
from typing import Any

import pytest

import handspun
from handspun.cli.app import app
from handspun.runs.record import command, options_given


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": True, "cache_examples": False, "learning_rate": 1e-4, "eval_ratio": 0.1},
        {"data": "my rows.csv", "sample_prompts": ("one", "it's two", "-3"), "system_prompt": "--hush"},
    ],
)
def test_the_command_of_a_report_gives_the_same_options(options: dict[str, Any]) -> None:
    made = handspun.TrainConfig(**options)
    line = command(options_given(made))
    assert len(line.splitlines()) == 1 + sum(part.startswith("--") for part in shlex.split(line))
    arguments = shlex.split(line.replace("\\\n", " "))
    _, bound, *_ = app.parse_args(arguments[1:], exit_on_error=False, print_error=False)
    assert bound.arguments.get("config", handspun.TrainConfig()) == made


def test_several_processes_are_started_by_torchrun() -> None:
    line = command({"data": "a.csv"}, processes=2)
    assert line == "torchrun --standalone --nproc-per-node 2 -m handspun train \\\n    --data a.csv"
