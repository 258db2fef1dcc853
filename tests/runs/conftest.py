"""Fixtures of runs that are interrupted."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from handspun.report import pictures
from handspun.runs import train as run_module
from handspun.training.loop import Event, Loop, TrainingState
from interrupted_runs import ROWS, Crash


@pytest.fixture(autouse=True, scope="module")
def reports_without_pictures() -> Iterator[None]:
    """Draw no pictures: they take half of a small run's time, and tests/report tests them."""
    with pytest.MonkeyPatch.context() as patch:
        for plot in ("line_plot", "bar_plot"):
            patch.setattr(pictures, plot, lambda *_, **__: "")
        yield


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.csv"
    path.write_text(ROWS, encoding="utf-8")
    return path


@pytest.fixture
def crash_after(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Ends the next run behind the given step, before anything is made of its events."""

    def arm(step: int) -> None:
        def cut(loop: Loop, state: TrainingState) -> Iterator[Event]:
            for event in whole(loop, state):
                if event.step > step:
                    raise Crash
                yield event

        monkeypatch.setattr(run_module, "training_events", cut)

    whole = run_module.training_events
    yield arm
    monkeypatch.setattr(run_module, "training_events", whole)
