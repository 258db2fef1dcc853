"""The log of a run: plain lines in train.log, one JSON object per event in metrics.jsonl, and the terminal.

On a terminal there is one panel below the lines (live.py). Anywhere else there are only lines, and nothing moves
the cursor, so a file that receives them reads well.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, TypeVar

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from handspun.config import Tracker
from handspun.display import HarmlessConsole, duration, is_terminal, is_unicode, logger, unfailing, visible
from handspun.files import output_errors, write_text
from handspun.runs.incidents import incident_facts, incident_line
from handspun.runs.live import LiveState, one_line, shown, wrapped
from handspun.runs.metrics import read_events, read_metrics
from handspun.runs.record import RunRecord, current_memory
from handspun.runs.sample_answers import Samples
from handspun.runs.trackers import TrackedRun, tracked
from handspun.training.guards import OutOfMemory, SkippedStep, Spike
from handspun.training.loop import EpochEnd, Evaluation, Event, Step

_LEAST_SECONDS_BETWEEN_STEPS = 1.0
"""For train.log and the terminal; metrics.jsonl has every step."""

_WIDTH = 84
"""Columns of a prompt or an answer: with its prefix, a line is shorter than 100."""

_LINES_OF_AN_ANSWER = 3
"""Most lines of an answer; metrics.jsonl has all of it."""


_Kind = TypeVar("_Kind", Step, Evaluation)


def plain_console() -> Console:
    """Return standard output without highlighting; in a notebook, plain text as anywhere else.

    FORCE_COLOR, by which rich treats a file as a terminal, adds colors and no panel.
    """
    return HarmlessConsole(force_jupyter=False, force_interactive=None if is_terminal(sys.stdout) else False)


class RunLog(logging.Handler):
    """Shows and writes the lines of the log, and a run's events, within a block.

    A record may have `only_in_file`: it is shown elsewhere, such as the error that ends the run; `styled`: a rich
    text to show on terminals that have colors; or `unwrapped`: a command that is copied as one line. With a folder
    of None (a dry run) no files are written.

    resumed_at: the step that the run resumes after. Events of later steps are removed from metrics.jsonl, since
    they will be written again.
    """

    def __init__(
        self,
        folder: Path | None,
        console: Console,
        *,
        resumed_at: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__()
        self._folder, self._resumed_at = folder, resumed_at
        self._console, self._file = console, console.file
        if folder is not None:  # a dry run is there to be printed; a run goes on in train.log
            console.file = unfailing(console.file)
        self._clock, self._began = clock, clock()
        if folder is not None and resumed_at is not None:
            _forget_events_after(folder / "metrics.jsonl", resumed_at)
        mode = "w" if resumed_at is None else "a"
        self._log = _open(folder, "train.log", mode)
        self._metrics = _open(folder, "metrics.jsonl", mode)
        self._live: LiveState | None = None
        self._send: Callable[[Mapping[str, Any]], None] | None = None
        self._seconds, self._first_seconds, self._steps = 0.0, 0.0, 0
        self._last_step_line = -_LEAST_SECONDS_BETWEEN_STEPS

    def __enter__(self) -> Self:
        logger.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logger.removeHandler(self)
        self._console.file = self._file
        for file in (self._log, self._metrics):
            if file is not None:
                file.close()

    @property
    def steps(self) -> int:
        """Optimizer steps that were logged."""
        return self._steps

    @property
    def seconds(self) -> float:
        """Seconds since the log began: with the run's own start, and after all else."""
        return self._clock() - self._began

    def move_to(self, folder: Path) -> None:
        """Continue in another folder, and move the files into it."""
        moved = []
        for file in (self._log, self._metrics):
            assert file is not None
            file.close()
            target = folder / Path(file.name).name
            with output_errors(target):
                os.replace(file.name, target)
            moved.append(_open(folder, target.name, "a"))
        self._folder, (self._log, self._metrics) = folder, moved

    @property
    def has_terminal(self) -> bool:
        """Whether a terminal shows the panel; true on the first rank only."""
        return self._console.is_interactive and not self._console.quiet

    @contextmanager
    def watched(self, state: LiveState) -> Iterator[None]:
        """Show the panel on a terminal. It includes what a resumed run has done before."""
        if not self.has_terminal:
            yield
            return
        if self._metrics is not None:
            earlier = read_metrics(Path(self._metrics.name))
            for facts in earlier.steps:
                state.see(_from_facts(Step, facts))
            state.evaluations += [_from_facts(Evaluation, facts) for facts in earlier.evaluations]
        self._live = state
        try:
            with shown(state, self._console):
                yield
        finally:
            self._live = None

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Log that work begins which takes a while. On a terminal, a spinner and a clock run until it is done."""
        logger.info(f"{text} ...")
        began = self._clock()
        if self.has_terminal:
            spinner = SpinnerColumn("dots" if is_unicode(self._console.encoding) else "line", style="")
            clock = Progress(TextColumn(" "), spinner, TimeElapsedColumn(), console=self._console, transient=True)
            clock.add_task("")
            with clock:
                self._console.show_cursor(True)  # a process that is killed could not bring it back
                yield
        else:
            yield
        if (seconds := self._clock() - began) >= 1:
            logger.info(f"  took {duration(seconds)}")

    @contextmanager
    def tracked(self, trackers: Sequence[Tracker], record: RunRecord) -> Iterator[None]:
        """Send the figures to the trackers too. Raises ConfigError."""
        assert self._folder is not None
        options = {**record.config, "dtype": record.dtype}
        run = TrackedRun(self._folder, record.started, options, self._resumed_at)
        with tracked(trackers, run) as self._send:
            try:
                yield
            finally:
                self._send = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record's lines to train.log with the time of day, and print them.

        Raises OutputError if train.log cannot be written: unlike the terminal, it is one of the run's results.
        """
        lines = visible(record.getMessage()).split("\n")
        for line in lines:
            _write(self._log, f"{datetime.fromtimestamp(record.created):%H:%M:%S} {line}\n")
        if getattr(record, "only_in_file", False):
            return
        styled: Text | None = getattr(record, "styled", None)
        if styled is not None and self._console.is_terminal and not self._console.no_color:
            self._console.print(styled, soft_wrap=not self._console.is_interactive)
            return
        is_whole = not self._console.is_interactive or getattr(record, "unwrapped", False)
        for line in lines:  # wrapped between words on a terminal, and whole in a file
            self._console.print(line, markup=False, highlight=False, soft_wrap=is_whole)

    def event(self, event: Event | Samples) -> None:
        """Log one event of the loop, or sample answers after a step, as lines and as a record."""
        measured = {"memory_bytes": current_memory()} if isinstance(event, Step) else {}
        record = {**_facts(event), **measured}
        _write(self._metrics, json.dumps(record) + "\n")
        if self._send is not None:
            self._send(record)
        if isinstance(event, Step):
            self._first_seconds = self._first_seconds or event.seconds
            self._seconds += event.seconds
            self._steps += 1
        if self._live is not None:
            left = self._seconds_left(event) if isinstance(event, Step) else None
            self._live.see(event, memory=measured.get("memory_bytes"), seconds_left=left)
        if isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Samples):
            self._samples(event)
        elif isinstance(event, Evaluation):
            best = ", the best so far" if event.best and event.step else ""
            logger.info(f"held-out loss {event.loss:.4f} over {event.learned_tokens} tokens{best}")
        elif isinstance(event, SkippedStep | Spike | OutOfMemory):
            logger.info(incident_line(event))
        elif isinstance(event, EpochEnd):
            self._last_step_line = -_LEAST_SECONDS_BETWEEN_STEPS

    def _step(self, step: Step) -> None:
        now = self._clock()
        if now - self._last_step_line < _LEAST_SECONDS_BETWEEN_STEPS and step.step < step.total_steps:
            return
        self._last_step_line = now
        left = self._seconds_left(step)
        self._info_beside_panel(_step_line(step) + ("" if left is None else f"  left {duration(left)}"))

    def _samples(self, samples: Samples) -> None:
        """Log all answers, each on its own lines; on a terminal the panel has them."""
        lines = [f"answers after step {samples.step}, in {duration(samples.seconds)}:"]
        for answer in samples.answers:
            lines.append("  > " + wrapped(one_line(answer.prompt), _WIDTH, 1)[0])
            text = one_line(answer.text) + (
                " (cut: the time is up)" if answer.finish_reason == "cancelled" else ""
            )
            lines += ["    " + part for part in wrapped(text, _WIDTH, _LINES_OF_AN_ANSWER)]
        self._info_beside_panel("\n".join(lines))

    def _info_beside_panel(self, text: str) -> None:
        """Log what the panel, if there is one, shows already."""
        logger.info(text, extra={"only_in_file": self._live is not None})

    def _seconds_left(self, step: Step) -> float | None:
        """Return the seconds left by the mean of the steps so far, without evaluation and saving.

        The first step does not count, since it may take many times as long as the others; None after it.
        """
        if self._steps < 2:
            return None
        return (step.total_steps - step.step) * (self._seconds - self._first_seconds) / (self._steps - 1)


def _step_line(step: Step) -> str:
    """Return a step in columns, so that numbers of the usual sizes line up."""
    width = len(str(step.total_steps))
    return (
        f"step {step.step:>{width}}/{step.total_steps}  epoch {step.epoch}  loss {step.loss:.4f}  "
        f"lr {step.learning_rate:.2e}  grad {step.grad_norm:5.2f}  "
        f"{step.tokens / step.seconds:4.0f} tokens/s ({step.learned_tokens / step.seconds:.0f} target)"
    )


def _from_facts(kind: type[_Kind], facts: dict[str, Any]) -> _Kind:
    """Return the event that `_facts` made a record of."""
    return kind(**{one.name: facts[one.name] for one in fields(kind)})


def _facts(event: Event | Samples) -> dict[str, Any]:
    if isinstance(event, SkippedStep | Spike | OutOfMemory):
        return incident_facts(event)
    return {"event": type(event).__name__.lower(), **asdict(event)}


def _open(folder: Path | None, name: str, mode: str) -> TextIO | None:
    if folder is None:
        return None
    with output_errors(folder / name):
        return (folder / name).open(mode, encoding="utf-8")  # type: ignore[return-value]


def _forget_events_after(path: Path, step: int) -> None:
    """Keep whole events up to the step: a kill may have cut the last one. After step 0, keep none."""
    with output_errors(path):
        events = read_events(path) if step else iter(())
        write_text(path, "".join(json.dumps(event) + "\n" for event in events if event["step"] <= step))


def _write(file: TextIO | None, text: str) -> None:
    """Write and flush, so that `tail -f` shows each line at once."""
    if file is not None:
        with output_errors(Path(file.name)):
            file.write(text)
            file.flush()
