"""`torchrun several_runs.py configs.json`: the runs of a list of TrainConfigs, one by one, in one launch.

A run with "crash_after" ends on all ranks behind that step, before anything is made of the next one's events.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from handspun import TrainConfig, train
from handspun.runs import train as run_module


class Crash(BaseException):
    """The power goes."""


def crash(options: dict[str, Any], *, after: int) -> None:
    """The run, up to a step."""
    whole = run_module.training_events

    def cut(*arguments: Any) -> Iterator[Any]:
        for event in whole(*arguments):
            if event.step > after:
                raise Crash
            yield event

    run_module.training_events = cut  # type: ignore[assignment]
    try:
        train(TrainConfig(**options))
    except Crash:
        run_module.training_events = whole


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for options in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        crash_after = options.pop("crash_after", None)
        if crash_after is None:
            train(TrainConfig(**options))
        else:
            crash(options, after=crash_after)
    dist.destroy_process_group()
