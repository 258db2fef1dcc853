"""Small runs that end in the middle: their options, what they print, and the files that they leave."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import handspun
from handspun.runs import train as run_module

ROWS = "instruction,input,output\n" + "".join(
    f"Say {n} {'and more ' * (n % 5)}.,,It is {n}{' or so' * (n % 4)}.\n" for n in range(20)
)


class Crash(BaseException):
    """The power goes."""


def config(tiny_folder: Path, data: Path, output: str, **options: object) -> handspun.TrainConfig:
    """Three epochs of five steps, each in some micro-batches; the last batch of an epoch is a short one."""
    values: dict[str, Any] = {"num_epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "eval_ratio": 0.1}
    values |= {"max_tokens": 96, "eval_steps": 2, "dtype": "float32", "threads": 1}
    values |= {"sample_answers": False, "report_rows": 0, **options}
    return handspun.TrainConfig(
        model=str(tiny_folder), data=str(data), output_dir=str(data.with_name(output)), **values
    )


def train(made: handspun.TrainConfig) -> str:
    """Everything that was said."""
    console = Console(file=io.StringIO(), width=200)
    run_module.train(made, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def crash(made: handspun.TrainConfig) -> None:
    with pytest.raises(Crash):
        train(made)


def weights(output: Path) -> dict[str, str]:
    """sha256 of the weights of every checkpoint."""
    files = sorted(output.glob("checkpoint-*/*.safetensors"))
    return {str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def events(output: Path) -> list[dict[str, Any]]:
    made = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: event[key] for key in event if key not in ("seconds", "memory_bytes")} for event in made]
