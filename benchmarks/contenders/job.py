"""What a contender is asked to do, and what it answers. Standard library only: every environment reads it."""

import json
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One epoch over the rows of a json file, in their order unless the options say otherwise."""

    model: str
    rows: str
    held_out: str | None = None
    batch_size: int = 8
    max_length: int = 512
    learning_rate: float = 1e-5
    lr_schedule: str = "linear"
    warmup_ratio: float = 0.0
    lora: bool = False
    dtype: str = "float32"
    threads: int = 2
    save_at: tuple[int, ...] = ()
    """Steps after which the weights are saved into save_dir/step-N; the time that it takes is not counted."""
    save_dir: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the contender's own configuration."""


def job_of_this_process() -> Job:
    """The job in the command line's one argument, a JSON object."""
    return Job(**json.loads(sys.argv[1]))


def read_rows(job: Job) -> list[dict[str, str]]:
    """The rows in the Alpaca format."""
    with open(job.rows, encoding="utf-8") as file:
        return list(json.load(file))


def answer(**figures: Any) -> None:
    """Prints the figures, with the peak memory of this process."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = 1024 * int(status.split("VmHWM:")[1].split()[0])  # ru_maxrss begins with the parent's
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps({**figures, "peak_gb": peak / 1e9}))
