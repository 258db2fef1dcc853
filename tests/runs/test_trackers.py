"""Figures that are sent to TensorBoard, W&B and trackio: what these have on disk is what metrics.jsonl has."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from handspun.config import Tracker
from handspun.errors import ConfigError, StoppedError
from handspun.runs import trackers
from handspun.runs import train as run_module
from handspun.runs.trackers import Send, TrackedRun, check_trackers_installed, figures_of
from handspun.training.loop import Event, Step
from interrupted_runs import config, crash, events, train, weights

NAMES: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard", "wandb", "trackio")
STEP = {"event": "step", **asdict(Step(3, 9, 2, 1.5, 2e-5, 0.25, 8, 400, 100, 300, 2.0))}


def scalars(output: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw, in float32."""
    found = EventAccumulator(str(output / "trackers" / "tensorboard"))
    found.Reload()
    return {name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}


def of_metrics(output: Path, kind: str, name: str) -> list[tuple[int, float]]:
    return [(event["step"], event[name]) for event in events(output) if event["event"] == kind]


def in_float32(values: list[tuple[int, float]]) -> list[tuple[int, Any]]:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in values]


def test_rates_are_a_second_and_memory_is_in_gigabytes() -> None:
    assert figures_of({**STEP, "memory_bytes": 3_000_000_000}) == {
        "train/epoch": 2,
        "train/loss": 1.5,
        "train/learning_rate": 2e-5,
        "train/grad_norm": 0.25,
        "train/rows_per_second": 4.0,
        "train/tokens_per_second": 200.0,
        "train/learned_tokens_per_second": 50.0,
        "train/memory_gigabytes": 3.0,
    }
    assert "train/memory_gigabytes" not in figures_of({**STEP, "memory_bytes": None})
    assert figures_of({"event": "evaluation", "step": 3, "loss": 2.5}) == {"eval/loss": 2.5}
    assert figures_of({"event": "epochend", "step": 3, "epoch": 1}) == {}


def test_the_name_of_a_run_has_no_sign_that_wandb_refuses() -> None:
    made = TrackedRun(Path("out put/ä#1"), "2026-11-25T20:08:56+00:00", {})
    assert made.name == "ä-1-2026-11-25T20-08-56"


def test_missing_packages_are_named_all_at_once_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name != "trackio" else object())
    with pytest.raises(ConfigError, match="pip install tensorboard") as caught:
        check_trackers_installed(NAMES)
    assert "--log-to wandb needs the package wandb: pip install wandb" in str(caught.value)
    assert "pip install trackio" not in str(caught.value)


@pytest.mark.slow
def test_all_three_have_the_figures_of_metrics_jsonl_and_nothing_leaves_the_machine(
    tiny_folder: Path, data: Path
) -> None:
    """In a process of its own, since trackio reads its folder from the environment once. An API key alone sends
    nothing; a proxy that is not there would make an attempt fail."""
    output = data.with_name("output")
    options = ["--model", str(tiny_folder), "--data", str(data), "--output-dir", str(output), "--num-epochs", "1"]
    options += ["--eval-ratio", "0.1", "--no-sample-answers", "--report-rows", "0", "--dtype", "float32"]
    options += [word for name in NAMES for word in ("--log-to", name)]
    kept = data.with_name("trackio")
    environment = {**os.environ, "TRACKIO_DIR": str(kept), "WANDB_API_KEY": "0" * 40, "HTTPS_PROXY": "localhost:1"}
    environment.pop("WANDB_MODE", None)
    said = subprocess.run(
        [sys.executable, "-m", "handspun", "train", *options], env=environment, capture_output=True, text=True
    )
    assert (said.returncode, said.stderr) == (0, "")
    losses, held_out = of_metrics(output, "step", "loss"), of_metrics(output, "evaluation", "loss")
    assert len(losses) == 3

    found = scalars(output)
    assert found["train/loss"] == in_float32(losses)
    assert found["eval/loss"] == in_float32(held_out)
    assert found["train/learning_rate"] == in_float32(of_metrics(output, "step", "learning_rate"))
    assert f"tensorboard --logdir {output}/trackers/tensorboard" in said.stdout

    [run] = (output / "trackers" / "wandb").glob("offline-run-*/run-output-*.wandb")
    written = run.read_bytes()
    assert all(json.dumps(loss).encode() in written for _, loss in losses + held_out)
    assert f"wandb sync {run.parent}" in said.stdout

    with sqlite3.connect(kept / "handspun.db") as database:
        rows = [(step, json.loads(text)) for step, text in database.execute("select step, metrics from metrics")]
    assert [(step, facts["train/loss"]) for step, facts in rows if "train/loss" in facts] == losses
    assert [(step, facts["eval/loss"]) for step, facts in rows if "eval/loss" in facts] == held_out
    assert "trackio show --project handspun" in said.stdout
    assert "\x1b" not in said.stdout
    assert f"\nreport: {output}/report.html\n" in said.stdout


@pytest.mark.slow
def test_a_run_that_ends_early_says_no_more_than_without_trackers(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def ended(*_: object) -> Iterator[Event]:
        raise StoppedError(signal.SIGINT, step=0, total_steps=15)
        yield

    monkeypatch.setattr(run_module, "training_events", ended)
    monkeypatch.delitem(sys.modules, "openai", raising=False)  # wandb would advertise what it has for it
    with pytest.raises(StoppedError):
        train(config(tiny_folder, data, "output", log_to=("wandb",)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_steps_that_are_made_again_are_drawn_once(
    tiny_folder: Path, data: Path, crash_after: Callable[[int], None]
) -> None:
    made = config(tiny_folder, data, "output", save_steps=4, log_to=("tensorboard",))
    crash_after(7)
    crash(made)
    output = data.with_name("output")
    assert [step for step, _ in scalars(output)["train/loss"]] == [1, 2, 3, 4, 5, 6, 7]
    crash_after(1000)
    train(made)
    assert scalars(output)["train/loss"] == in_float32(of_metrics(output, "step", "loss"))
    assert [step for step, _ in scalars(output)["train/loss"]] == list(range(1, 16))
    assert scalars(output)["eval/loss"] == in_float32(of_metrics(output, "evaluation", "loss"))


def test_a_tracker_that_fails_costs_its_figures_and_not_the_run(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = list[int]()

    @contextmanager
    def failing(name: Tracker, *_: object) -> Iterator[Send]:
        def send(_: object, step: int) -> None:
            if name == "wandb" and step == 3:
                raise OSError("the service is gone")
            taken.append(step) if name == "wandb" else None

        yield send

    train(config(tiny_folder, data, "without"))
    monkeypatch.setattr(trackers, "_opened", failing)
    said = train(config(tiny_folder, data, "output", log_to=NAMES))
    assert taken == [0, 1, 2, 2]  # the held-out losses of 0 and 2 are with them
    assert said.count("accepts no more figures") == 1
    assert "wandb accepts no more figures (the service is gone): the run continues without it" in said
    assert weights(data.with_name("output")) == weights(data.with_name("without"))


def test_a_tracker_that_cannot_be_closed_does_not_fail_a_finished_run(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def failing(*_: object) -> Iterator[Send]:
        yield lambda *_: None
        raise OSError("no room")

    monkeypatch.setattr(trackers, "_opened", failing)
    said = train(config(tiny_folder, data, "output", log_to=("wandb",)))
    assert "wandb could not be closed, and may lack the last figures: no room" in said
    assert json.loads((data.with_name("output") / "run.json").read_text())["status"] == "finished"


def test_a_tracker_that_cannot_begin_ends_the_run_before_its_first_step(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "sideways")
    with pytest.raises(ConfigError, match="(?s)--log-to wandb: .*mode.*leave wandb out"):
        train(config(tiny_folder, data, "output", log_to=("wandb",)))
    assert not [event for event in events(data.with_name("output")) if event["event"] == "step"]
