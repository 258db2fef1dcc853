"""A run as it goes: plain lines in train.log, one JSON object an event in metrics.jsonl, and the terminal.

On a terminal there is one progress bar below the lines; anywhere else the lines alone, with nothing that
moves the cursor, so that a file they are sent to reads well.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from handspun.report.environment import current_memory
from handspun.report.incidents import incident_facts, incident_line
from handspun.training.checkpoint import errors_for_people
from handspun.training.loop import EpochEnd, Evaluation, Event, Step
from handspun.training.nonfinite import Skipped
from handspun.training.out_of_memory import OutOfMemory
from handspun.training.spikes import Spike

_LEAST_SECONDS_BETWEEN_STEPS = 1.0
"""In train.log and on the terminal; metrics.jsonl has every step."""


def plain_console() -> Console:
    """Standard output without highlighting, and in a notebook plain text like anywhere else."""
    return Console(highlight=False, force_jupyter=False)


class RunLog:
    """Where a run's lines and events go. A folder of None (a dry run) writes no files.

    resumed_at: the step that a run goes on after; what metrics.jsonl has of later ones will be written again.
    """

    def __init__(
        self,
        folder: Path | None,
        console: Console,
        *,
        resumed_at: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._console = console
        self._clock = clock
        if folder is not None and resumed_at is not None:
            _forget_events_after(folder / "metrics.jsonl", resumed_at)
        mode = "w" if resumed_at is None else "a"
        self._log = _open(folder, "train.log", mode)
        self._metrics = _open(folder, "metrics.jsonl", mode)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        self._last_step_line = -_LEAST_SECONDS_BETWEEN_STEPS

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        for file in (self._log, self._metrics):
            if file is not None:
                file.close()

    def line(self, text: str) -> None:
        """One line (or several), with the time of day in train.log."""
        self.only_in_file(text)
        for part in text.splitlines() or [""]:
            self._console.print(part, markup=False, highlight=False, soft_wrap=True)

    def only_in_file(self, text: str) -> None:
        """The same for what is shown by others, such as the error that ends the run."""
        for part in text.splitlines() or [""]:
            _write(self._log, f"{datetime.now():%H:%M:%S} {part}\n")

    def event(self, event: Event) -> None:
        """One event of the loop, as a line and as a record."""
        measured = {"memory_bytes": current_memory()} if isinstance(event, Step) else {}
        _write(self._metrics, json.dumps({**_facts(event), **measured}) + "\n")
        if isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Evaluation):
            best = ", the best so far" if event.best and event.step else ""
            self.line(f"held-out loss {event.loss:.4f} over {event.learned_tokens} tokens{best}")
        elif isinstance(event, Skipped | Spike | OutOfMemory):
            self.line(incident_line(event))
        elif isinstance(event, EpochEnd):
            self._last_step_line = -_LEAST_SECONDS_BETWEEN_STEPS

    def _step(self, step: Step) -> None:
        self._seconds += step.seconds
        self._tokens += step.tokens
        self._steps += 1
        now = self._clock()
        is_due = now - self._last_step_line >= _LEAST_SECONDS_BETWEEN_STEPS or step.step == step.total_steps
        text = self._step_line(step)
        if is_due:
            self._last_step_line = now
            _write(self._log, f"{datetime.now():%H:%M:%S} {text}\n")
        if self._console.is_terminal:
            self._show_progress(step)
        elif is_due:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _step_line(self, step: Step) -> str:
        width = len(str(step.total_steps))
        return (
            f"step {step.step:>{width}}/{step.total_steps}  epoch {step.epoch}  loss {step.loss:.4f}  "
            f"lr {step.learning_rate:.2e}  grad {step.grad_norm:.2f}  "
            f"{step.tokens / step.seconds:.0f} tokens/s ({step.learned_tokens / step.seconds:.0f} learned, "
            f"{step.computed_tokens / step.seconds:.0f} computed)  "
            f"left {duration(self._seconds_left(step))}"
        )

    def _seconds_left(self, step: Step) -> float:
        """By the mean of all steps so far; evaluation and saving are not in it."""
        return (step.total_steps - step.step) * self._seconds / self._steps

    def _show_progress(self, step: Step) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("loss [bold]{task.fields[loss]:.3f}[/]"),
                TextColumn("{task.fields[rate]:.0f} tokens/s"),
                TextColumn("left {task.fields[left]}"),
                console=self._console,
                expand=True,
            )
            self._task = self._progress.add_task("", total=step.total_steps, epoch=1, loss=0.0, rate=0.0, left="")
            self._progress.start()
        assert self._task is not None
        self._progress.update(
            self._task,
            completed=step.step,
            epoch=step.epoch,
            loss=step.loss,
            rate=self._tokens / self._seconds,
            left=duration(self._seconds_left(step)),
        )


def _facts(event: Event) -> dict[str, Any]:
    if isinstance(event, Skipped | Spike | OutOfMemory):
        return incident_facts(event)
    return {"event": type(event).__name__.lower(), **asdict(event)}


def duration(seconds: float) -> str:
    """`8s`, `3m07s`, `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _open(folder: Path | None, name: str, mode: str) -> TextIO | None:
    if folder is None:
        return None
    with errors_for_people(folder / name):
        return (folder / name).open(mode, encoding="utf-8")  # type: ignore[return-value]


def _forget_events_after(path: Path, step: int) -> None:
    """Keeps whole lines up to the step; a kill may have cut the last one. After step 0 all are made again."""
    kept = []
    with errors_for_people(path):
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() and step else []:
            with suppress(ValueError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)


def _write(file: TextIO | None, text: str) -> None:
    """A line is in the file when this returns: `tail -f` shows it live."""
    if file is not None:
        with errors_for_people(Path(file.name)):
            file.write(text)
            file.flush()
