"""A run's figures in TensorBoard, Weights & Biases, or trackio; each package is an extra."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

from handspun.config import Tracker
from handspun.display import logger
from handspun.errors import ConfigError

TRACKERS = "trackers"
"""The trackers' folder in an output folder: `--overwrite` may remove it, but nobody else's `wandb`."""

_PROJECT = "handspun"

Figures = Mapping[str, float]
Send = Callable[[Figures, int], None]
"""Takes figures, and the number of optimizer steps at which they were measured."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of a run. resumed_at: the step that it resumes after, as in RunLog."""

    folder: Path
    """The output folder; trackers that write files use `trackers` in it."""
    started: str
    options: Mapping[str, Any]
    resumed_at: int | None = None

    @property
    def name(self) -> str:
        """The folder's name and the second it began, without characters that W&B rejects."""
        return re.sub(r"[^\w.-]+", "-", f"{self.folder.resolve().name}-{self.started.removesuffix('+00:00')}")


def check_trackers_installed(trackers: Sequence[Tracker]) -> None:
    """Raise ConfigError if the package of a tracker is not installed."""
    missing = [name for name in dict.fromkeys(trackers) if find_spec(name) is None]
    if missing:
        raise ConfigError(
            [f"--log-to {name} needs the package {name}: pip install {name}, or leave it out." for name in missing]
        )


@contextmanager
def tracked(trackers: Sequence[Tracker], run: TrackedRun) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that sends records of metrics.jsonl to the trackers.

    Raises ConfigError if a tracker cannot start. A tracker that fails later is dropped, with a line in the log: it
    must not end a run.
    """
    senders: dict[Tracker, Send] = {}

    def send(record: Mapping[str, Any]) -> None:
        figures = figures_of(record)
        for name in list(senders) if figures else ():
            try:
                senders[name](figures, record["step"])
            except Exception as error:
                del senders[name]
                logger.warning(f"{name} accepts no more figures ({error}): the run continues without it")

    with ExitStack() as stack:
        for name in dict.fromkeys(trackers):
            opened = _opened(name, run)
            try:
                senders[name] = opened.__enter__()
            except Exception as error:
                raise ConfigError(f"--log-to {name}: {error}. Fix it, or leave {name} out.") from error
            stack.push(_leaving(name, opened))
        yield send


def _leaving(
    name: Tracker, opened: AbstractContextManager[Send]
) -> Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], None]:
    """Close a tracker, and report a failure to: the run ends as it would have without it."""

    def leave(kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            opened.__exit__(kind, error, trace)
        except Exception as failure:
            logger.warning(f"{name} could not be closed, and may lack the last figures: {failure}")

    return leave


def figures_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the figures of a record of metrics.jsonl; none if it is neither a step nor an evaluation."""
    if record["event"] == "evaluation":
        return {"eval/loss": record["loss"]}
    if record["event"] != "step":
        return {}
    names = ("epoch", "loss", "learning_rate", "grad_norm")
    seconds = record["seconds"]
    figures = {f"train/{name}": record[name] for name in names}
    figures |= {
        f"train/{name}_per_second": record[name] / seconds for name in ("rows", "tokens", "learned_tokens")
    }
    if record["memory_bytes"] is not None:
        figures["train/memory_gigabytes"] = record["memory_bytes"] / 1e9
    return figures


def _opened(name: Tracker, run: TrackedRun) -> AbstractContextManager[Send]:
    match name:
        case "tensorboard":
            return _tensorboard(run)
        case "wandb":
            return _wandb(run)
        case "trackio":
            return _trackio(run)


@contextmanager
def _tensorboard(run: TrackedRun) -> Iterator[Send]:
    """Open TensorBoard's writer. Steps that will be computed again are purged from the plots."""
    from torch.utils.tensorboard import SummaryWriter

    folder = run.folder / TRACKERS / "tensorboard"
    purge = None if run.resumed_at is None else run.resumed_at + 1 if run.resumed_at else 0
    with SummaryWriter(str(folder), purge_step=purge, flush_secs=10) as writer:
        logger.info(f"figures for TensorBoard: tensorboard --logdir {quote(str(folder))}")
        options = "\n".join(f"| {name} | {value} |" for name, value in run.options.items())
        writer.add_text("options", f"| option | value |\n| --- | --- |\n{options}", run.resumed_at or 0)

        def send(figures: Figures, step: int) -> None:
            for name, value in figures.items():
                writer.add_scalar(name, value, step)

        yield send


@contextmanager
def _wandb(run: TrackedRun) -> Iterator[Send]:
    """Open a run of W&B. A resumed run gets one more folder with the same id, as W&B resumes runs."""
    import wandb

    folder = run.folder / TRACKERS
    folder.mkdir(exist_ok=True)
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        name=run.name,
        id=run.name,
        dir=folder,
        config=dict(run.options),
        mode=os.environ.get("WANDB_MODE", "offline"),  # type: ignore[arg-type]  # it refuses others itself
        resume="allow",
        settings=wandb.Settings(silent=True, console="off"),
    )
    where = f"wandb sync {quote(opened.settings.sync_dir)}" if opened.offline else opened.url
    logger.info(f"figures for W&B: {where}")
    exit_code = 1
    try:
        yield lambda figures, step: opened.log(dict(figures), step=step)
        exit_code = 0
    finally:
        opened.finish(exit_code)  # as a context manager, it prints the trace of whatever ends the run


@contextmanager
def _trackio(run: TrackedRun) -> Iterator[Send]:
    """Open a run of trackio, in the place that its own variables name (TRACKIO_DIR); it is shown by project."""
    import trackio

    with redirect_stdout(None):  # it prints in colors, to a file too
        opened = trackio.init(
            project=_PROJECT,
            name=run.name,
            config=dict(run.options),
            resume="allow",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
    logger.info(f"figures for trackio: trackio show --project {_PROJECT}")
    try:
        yield lambda figures, step: opened.log(dict(figures), step=step)
    finally:
        with redirect_stdout(None):
            trackio.finish()  # as opened.finish() too, but this one is not done again at exit
