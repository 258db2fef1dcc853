"""run.json is read as it was written, by any version, or is one clear error."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handspun.files import to_json
from handspun.preflight.checks import EndOfTurn, Finding
from handspun.runs.record import Preflight, Resumed, RunRecord, read_record
from handspun.training.guards import OutOfMemory, SkippedStep, Spike
from records import record_of


def whole_record() -> RunRecord:
    record = record_of(seed=1, sample_prompts=["Hi"])
    record.fingerprints = {"tokenizer (sha256)": "ab"}
    record.resumed = [Resumed(4, "2026-11-25T12:00:00+00:00", {"torch": ["2.12", "2.13"]})]
    ending = EndOfTurn("<e>", 9, 10, is_eos=True, saved=["<e>"])
    record.preflight = Preflight([Finding("rows that are cut", "raise it")], ending, 3.0)
    record.seconds, record.peak_memory_bytes, record.status = 2.5, 10**9, "finished"
    record.incidents = [
        SkippedStep(3, 12, 1, float("inf"), 1.0, [("a.csv", 5)], 1),
        Spike(4, 1, 9.0, 2.0, 4.0, [("a.csv", 6)]),
        OutOfMemory(5, 1, 4096, 2048),
    ]
    record.checkpoints, record.best_checkpoint = ["checkpoint-epoch-1"], "checkpoint-best"
    return record


def test_read_record_gives_what_was_written(tmp_path: Path) -> None:
    record = whole_record()
    record.write(tmp_path)
    assert read_record(tmp_path) == record
    record = record_of()
    record.write(tmp_path)
    assert read_record(tmp_path) == record


def test_write_leaves_out_what_is_not_known(tmp_path: Path) -> None:
    record_of().write(tmp_path)
    written = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert list(written)[:3] == ["started", "config", "given"]
    assert not written.keys() & {"fingerprints", "resumed", "preflight", "seconds", "status"}
    assert written["best_checkpoint"] is None


def test_read_record_of_an_earlier_or_later_version(tmp_path: Path) -> None:
    value = to_json(record_of())
    known = {name: value[name] for name in ("started", "config", "data", "environment")}
    del known["environment"]["memory_bytes"]
    known["environment"]["mood"] = "good"
    (tmp_path / "run.json").write_text(json.dumps({**known, "color": "red"}), encoding="utf-8")
    record = read_record(tmp_path)
    assert isinstance(record, RunRecord)
    assert (record.plan, record.evaluations, record.fingerprints) == (None, [], None)


def _set(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        for name in path[:-1]:
            value = value[name]
        value[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda value: value.pop("started"), "lacks started"),
        (lambda value: value["data"]["train"].pop("sha256"), "lacks data.train.sha256"),
        (_set("config", to=[1]), "has a list as config (expected an object)"),
        (_set("plan", "steps", to="many"), "has a string as plan.steps (expected an integer)"),
        (_set("plan", "steps", to=True), "has true as plan.steps (expected an integer)"),
        (_set("evaluations", to=[{"step": 1}]), "lacks evaluations.epoch"),
        (_set("environment", "versions", to={"torch": 2}), "has the number 2 as environment.versions.torch"),
        (_set("incidents", to=[{"event": "spike"}]), "has incidents of another kind"),
        (_set("resumed", to=3), "has the number 3 as resumed (expected a list)"),
    ],
)
def test_read_record_names_what_is_damaged(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    value = to_json(whole_record())
    change(value)
    (tmp_path / "run.json").write_text(json.dumps(value), encoding="utf-8")
    found = read_record(tmp_path)
    assert isinstance(found, str)
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "is missing"), ("{", "cannot be read: "), ("[]", "has a list as its content (expected an object)")],
)
def test_read_record_of_a_file_that_is_none(tmp_path: Path, content: str | None, problem: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content, encoding="utf-8")
    assert str(read_record(tmp_path)).startswith(problem)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count a program from its start")
def test_peak_memory_of_a_program_is_not_its_parents() -> None:
    """Linux gives a new program the peak of the one that started it, as ru_maxrss."""
    parent = """
import subprocess, sys
large = bytearray(1_500_000_000)
large[::4096] = b"x" * len(large[::4096])
subprocess.run([sys.executable, "-c", sys.argv[1]], check=True)
"""
    child = "from handspun.runs.record import peak_memory; print(peak_memory())"
    answer = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    assert 0 < int(answer.stdout) < 1_000_000_000
