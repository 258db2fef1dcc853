"""A run's options as the command that makes the run again."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from handspun.config import TrainConfig, option_name

_OF_THE_FOLDER = {"overwrite", "dry_run", "resume"}
"""They say what is done with an earlier run, and nothing of this one."""


def options_given(config: TrainConfig) -> dict[str, Any]:
    """The options that differ from their defaults, in the order of config.py."""
    return {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in _OF_THE_FOLDER and getattr(config, field.name) != field.default
    }


def command(given: Mapping[str, Any], *, processes: int = 1) -> str:
    """`handspun train ...` with these options, one a line, for a shell; several processes are torchrun's."""
    start = "handspun train"
    if processes > 1:
        start = f"torchrun --standalone --nproc-per-node {processes} -m {start}"
    return " \\\n    ".join([start, *(option for name, value in given.items() for option in _typed(name, value))])


def _typed(name: str, value: Any) -> list[str]:
    option = option_name(name)
    if value is True:
        return [option]
    if value is False:
        return ["--no-" + option.removeprefix("--")]
    if isinstance(value, list | tuple):
        return [part for one in value for part in _typed(name, one)]
    if isinstance(value, Mapping):
        return _typed(name, json.dumps(value, ensure_ascii=False))
    is_like_one = str(value).startswith("-")
    return [shlex.join([f"{option}={value}"] if is_like_one else [option, str(value)])]
