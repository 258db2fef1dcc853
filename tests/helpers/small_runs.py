"""Rows and options of small whole runs."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

import handspun

ROWS = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n}.\n" for n in range(20))


def config(tiny_folder: Path, data: Path, **options: Any) -> handspun.TrainConfig:
    values: dict[str, Any] = {
        "num_epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "eval_ratio": 0.2,
        **options,
    }
    return handspun.TrainConfig(
        model=str(tiny_folder), data=str(data), output_dir=str(data.with_name("output")), **values
    )


def brief_config(tiny_folder: Path, data: Path, **options: object) -> handspun.TrainConfig:
    brief = {"sample_answers": False, "report_rows": 0}
    values: dict[str, Any] = {
        "num_epochs": 2,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "eval_ratio": 0.2,
        **brief,
        **options,
    }
    return handspun.TrainConfig(
        model=str(tiny_folder), data=str(data), output_dir=str(data.with_name("output")), **values
    )


def quiet_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed_to(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
