"""`train --overwrite`: nothing goes that a run did not write, and nothing before the new run is whole."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import handspun
from handspun.errors import ConfigError, HandspunError, OutputError
from handspun.report.page import write_report
from handspun.runs import trackers
from handspun.runs import train as run_module
from handspun.training.checkpoint import is_checkpoint
from interrupted_runs import Crash

ROWS = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n}.\n" for n in range(8))


def config(tiny_folder: Path, folder: Path, **options: Any) -> handspun.TrainConfig:
    """Two epochs of two steps."""
    values = {"num_epochs": 2, "batch_size": 4, "learning_rate": 1e-3, "dtype": "float32", "threads": 1}
    values |= {"sample_answers": False, "report_rows": 0, "cache_examples": False}
    values |= {"model": str(tiny_folder), "data": str(folder / "train.csv"), "output_dir": str(folder / "output")}
    return handspun.TrainConfig(**{**values, **options})


def train(made: handspun.TrainConfig) -> str:
    """Everything that was said."""
    console = Console(file=io.StringIO(), width=200)
    run_module.train(made, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def snapshot(folder: Path) -> dict[str, str]:
    """Every file's and link's content by its path, and empty folders."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif not any(path.iterdir()):
            found[str(path.relative_to(folder))] = "an empty folder"
    return found


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, and a finished run in `output`."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "train.csv").write_text(ROWS, encoding="utf-8")
    train(config(tiny_folder, folder, eval_ratio=0.25, learning_rate=5e-3))
    return folder


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working folder."""
    shutil.copytree(finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def model_without(tiny_folder: Path, place: Path, name: str) -> Path:
    shutil.copytree(tiny_folder, place / "incomplete")
    (place / "incomplete" / name).unlink()
    return place / "incomplete"


def linked_model(tiny_folder: Path, place: Path) -> Path:
    """A folder whose weights are a link to those of the earlier run."""
    shutil.copytree(tiny_folder, place / "linked")
    (place / "linked" / "model.safetensors").unlink()
    (place / "linked" / "model.safetensors").symlink_to(place / "output" / "checkpoint-best" / "model.safetensors")
    return place / "linked"


def adapter_on(place: Path, base: str) -> Path:
    (place / "adapter").mkdir()
    (place / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": base})
    )
    shutil.copy(
        place / "output" / "checkpoint-best" / "model.safetensors", place / "adapter/adapter_model.safetensors"
    )
    return place / "adapter"


def link_to(target: Path, link: Path) -> Path:
    link.symlink_to(target)
    return link


REFUSED: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "no such model": lambda _tiny, _place: {"model": "outptu/checkpoint-best"},
    "a model without config": lambda tiny, place: {"model": model_without(tiny, place, "config.json")},
    "a model without weights": lambda tiny, place: {"model": model_without(tiny, place, "model.safetensors")},
    "a model without template": lambda tiny, place: {"model": model_without(tiny, place, "chat_template.jinja")},
    "no such data": lambda _tiny, _place: {"data": "trian.csv"},
    "data of no format": lambda _tiny, place: {"data": place / "output" / "run.json"},
    "no such held-out data": lambda _tiny, _place: {"eval_data": "held_out.csv"},
    "too long for the model": lambda _tiny, _place: {"max_length": 10**6},
    "no such device": lambda _tiny, _place: {"device": "cuda:99"},
    "the model is a checkpoint": lambda _tiny, place: {"model": place / "output" / "checkpoint-epoch-2"},
    "the model by a relative path": lambda _tiny, _place: {"model": "output/../output/checkpoint-best"},
    "the model by a link": lambda _tiny, place: {
        "model": link_to(place / "output/checkpoint-best", place / "base")
    },
    "the model's weights by a link": lambda tiny, place: {"model": linked_model(tiny, place)},
    "the base of an adapter": lambda _tiny, place: {"model": adapter_on(place, "output/checkpoint-epoch-1")},
    "the output folder by a link": lambda _tiny, place: {
        "model": place / "output" / "checkpoint-best",
        "output_dir": link_to(place / "output", place / "elsewhere"),
    },
    "the data are the run's own": lambda _tiny, place: {"data": place / "output" / "nonfinite-step-3.jsonl"},
    "the held-out data are the run's own": lambda _tiny, _place: {"eval_data": "output/nonfinite-step-3.jsonl"},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_leaves_every_byte_of_the_earlier_run(tiny_folder: Path, place: Path, case: str) -> None:
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    batch = place / "output" / "nonfinite-step-3.jsonl"
    batch.write_text(json.dumps({**row, "file": "train.csv", "row": 1}) + "\n")
    options = {
        name: value if name == "max_length" else str(value)
        for name, value in REFUSED[case](tiny_folder, place).items()
    }
    before = snapshot(place / "output")
    with pytest.raises(HandspunError):
        train(config(tiny_folder, place, overwrite=True, **options))
    assert snapshot(place / "output") == before


def test_too_little_room_for_both_leaves_the_earlier_run(
    tiny_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(place / "output")
    monkeypatch.setattr(
        "handspun.runs.output_dir.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(OutputError, match="The earlier run stays until the first one is saved"):
        train(config(tiny_folder, place, overwrite=True))
    assert snapshot(place / "output") == before


def test_a_tracker_that_cannot_begin_brings_the_earlier_run_back(
    tiny_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can be tried only when the run has its folder."""
    before = snapshot(place / "output")

    @contextmanager
    def refuses(*_: object) -> Iterator[None]:
        raise RuntimeError("no such mode")
        yield

    monkeypatch.setattr(trackers, "_tensorboard", refuses)
    monkeypatch.setattr(trackers, "find_spec", lambda _: True)
    with pytest.raises(HandspunError, match="no such mode"):
        train(config(tiny_folder, place, overwrite=True, log_to=("tensorboard",)))
    assert snapshot(place / "output") == before


def test_a_file_that_cannot_be_moved_aside_brings_the_others_back(
    tiny_folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mount point, or a folder of a container's image, cannot be renamed."""
    before = snapshot(place / "output")
    rename, moved = os.rename, []

    def refuses(source: Path, target: Path, **_: object) -> None:
        if Path(source).name == "checkpoint-epoch-2":
            raise OSError(18, "Invalid cross-device link")
        moved.append(Path(source).name)
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuses)
    with pytest.raises(OutputError, match="Invalid cross-device link"):
        train(config(tiny_folder, place, overwrite=True))
    assert snapshot(place / "output") == before
    assert moved.count("run.json") == 2  # it had been moved, and came back


def test_the_earlier_run_goes_when_the_new_one_has_saved(
    tiny_folder: Path, place: Path, crash_after: Callable[[int], None]
) -> None:
    output = place / "output"
    before = snapshot(output)
    made = config(tiny_folder, place)
    crash_after(1)
    with pytest.raises(Crash):
        train(config(tiny_folder, place, overwrite=True))
    kept = output / ".handspun" / "replaced-1"
    assert snapshot(kept) == before
    assert all(map(is_checkpoint, kept.glob("checkpoint-*")))
    assert not list(output.glob("checkpoint-*"))
    crash_after(3)
    with pytest.raises(Crash):  # again from the start, past the first epoch
        train(made)
    assert not kept.exists()
    crash_after(4)
    assert "resuming after step 2 of 4" in train(made)
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == [
        "checkpoint-epoch-1",
        "checkpoint-epoch-2",
    ]


@pytest.mark.slow
def test_a_second_overwrite_keeps_both_earlier_runs_until_it_has_saved(
    tiny_folder: Path, place: Path, crash_after: Callable[[int], None]
) -> None:
    output = place / "output"
    before = snapshot(output)
    crash_after(1)
    for rate in (2e-3, 3e-3):
        with pytest.raises(Crash):
            train(config(tiny_folder, place, overwrite=True, learning_rate=rate))
    assert snapshot(output / ".handspun" / "replaced-1") == before
    second = json.loads((output / ".handspun" / "replaced-2" / "run.json").read_text())
    assert second["config"]["learning_rate"] == 2e-3
    crash_after(4)
    train(config(tiny_folder, place, overwrite=True))
    assert not (output / ".handspun").exists()


STRANGERS = [
    "checkpoint-plan.md",
    "checkpoint-old/notes.txt",
    "checkpoint-old/training_state/notes.txt",
    "checkpoint-step-notes/a.txt",
    "checkpoint-epoch-2.bak/model.safetensors",
    ".checkpoint-best.partial/a.txt",
    ".checkpoint-best.old/a.txt",
    ".checkpoint-epoch-1.deleted/a.txt",
    ".something.partial",
    ".something.old",
    ".something.deleted/a.txt",
    ".run.json.partial",
    ".report.html.partial",
    ".something.handspun/a.txt",
    ".checkpoint-epoch-1.handspun-old/a.txt",
    "nonfinite-step-by-step.jsonl",
    "sub/.something.partial",
    "sub/.something.old/a.txt",
    "sub/train.log",
    "notes.txt",
    "wandb/run-1/a.txt",
    "trackers/mine.txt",
]


def test_files_of_others_that_are_called_like_ours_stay(
    tiny_folder: Path, place: Path, crash_after: Callable[[int], None]
) -> None:
    """Next to a run that is refused, one that overwrites and is killed, and one that goes on and ends."""
    output = place / "output"
    for name in STRANGERS:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(f"mine: {name}")

    def are_there() -> bool:
        return [name for name in STRANGERS if not (output / name).exists()] == [] and all(
            (output / name).read_text() == f"mine: {name}" for name in STRANGERS
        )

    with pytest.raises(OutputError, match="holds an earlier run"):
        train(config(tiny_folder, place))
    assert are_there()
    made = config(tiny_folder, place, save_steps=1, log_to=("tensorboard",))
    crash_after(3)
    with pytest.raises(Crash):
        train(config(tiny_folder, place, save_steps=1, log_to=("tensorboard",), overwrite=True))
    assert are_there()
    crash_after(4)
    assert "resuming after step 3 of 4" in train(made)
    assert are_there()


IN_THE_WAY = [
    "report.html",
    "run.json",
    "train.log",
    "metrics.jsonl",
    "report_data.json",
    "nonfinite-step-3.jsonl",
    "checkpoint-best/model.safetensors",
    "checkpoint-epoch-1/notes.txt",
    "checkpoint-step-7",
]


@pytest.mark.parametrize("name", IN_THE_WAY)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_of_others_under_a_name_of_ours_is_refused_by_name(
    tiny_folder: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    output = tmp_path / "output"
    (output / name).parent.mkdir(parents=True)
    (output / name).write_text("<html>mine</html>\n")
    (tmp_path / "train.csv").write_text(ROWS)
    before = snapshot(output)
    with pytest.raises(OutputError, match=rf"did not write.*: {name.split('/')[0]}.*Move it away"):
        train(config(tiny_folder, tmp_path, overwrite=overwrite))
    assert snapshot(output) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda output: (output / "checkpoint-best" / "notes.txt").write_text("mine"),
            "checkpoint-best .*notes.txt",
        ),
        (
            lambda output: (output / "checkpoint-best" / "README.md").write_text("mine"),
            "checkpoint-best .*README.md",
        ),
        (
            lambda output: (output / "checkpoint-epoch-1" / "manifest.json").unlink(),
            "checkpoint-epoch-1 .no manifest",
        ),
        (lambda output: (output / "report.html").write_text("<html>mine</html>"), "report.html"),
        (
            lambda output: link_to(output / "train.log", output / "checkpoint-epoch-9"),
            "checkpoint-epoch-9 .a link",
        ),
    ],
)
def test_what_was_added_or_changed_in_a_run_is_refused_by_name(
    tiny_folder: Path, place: Path, change: Callable[[Path], object], named: str
) -> None:
    change(place / "output")
    before = snapshot(place / "output")
    with pytest.raises(OutputError, match=rf"did not write.*{named}.*Move it away"):
        train(config(tiny_folder, place, overwrite=True))
    assert snapshot(place / "output") == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "content"),
    [
        (name, content)
        for name in ("run.json", "metrics.jsonl", "report_data.json", "train.log")
        for content in (b"", b"\0" * 100, b'{\n  "started": "2026', b'{"a": 1}')
        if (name, content)
        != ("run.json", b'{"a": 1}')  # no run would write it, and nothing else says that one did
    ],
)
def test_a_run_with_a_damaged_record_can_be_replaced(
    tiny_folder: Path, place: Path, name: str, content: bytes
) -> None:
    """An empty file holds nothing to lose; another is known by the run that it lies beside."""
    (place / "output" / name).write_bytes(content)
    if name == "report_data.json":  # which alone says that no one has edited the tables of rows
        with pytest.raises(OutputError, match=r"held_out_rows\.csv"):
            train(config(tiny_folder, place, num_epochs=1, overwrite=True))
        for table in (place / "output").glob("*_rows.csv"):
            table.unlink()
    train(config(tiny_folder, place, num_epochs=1, overwrite=True))
    assert json.loads((place / "output" / "run.json").read_text())["status"] == "finished"
    assert [path.name for path in (place / "output").glob("checkpoint-*")] == ["checkpoint-epoch-1"]


@pytest.mark.slow
def test_a_file_that_the_user_puts_into_a_checkpoint_outlives_it(
    tiny_folder: Path, place: Path, crash_after: Callable[[int], None]
) -> None:
    """checkpoint-best is replaced by a better one, the state of an older step goes: neither takes it along."""
    made = config(tiny_folder, place, save_steps=1, keep_last=1, eval_ratio=0.25, eval_steps=1, overwrite=True)
    crash_after(2)
    with pytest.raises(Crash):
        train(made)
    output = place / "output"
    added = [output / "checkpoint-best" / "mine.txt", output / "checkpoint-epoch-1" / "mine.txt"]
    for path in added:
        path.write_text("mine")
    crash_after(4)
    train(config(tiny_folder, place, save_steps=1, keep_last=1, eval_ratio=0.25, eval_steps=1))
    assert (output / "kept-checkpoint-best" / "mine.txt").read_text() == "mine"
    assert is_checkpoint(output / "checkpoint-best")
    assert (output / "checkpoint-epoch-1" / "mine.txt").read_text() == "mine"


def test_an_output_folder_that_is_refused_is_not_left_behind(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(ROWS)
    with pytest.raises(OutputError, match="holds no unfinished run"):
        train(config(tiny_folder, tmp_path, resume=True))
    assert os.listdir(tmp_path) == ["train.csv"]


def test_a_name_that_is_not_utf_8_is_refused_before_anything(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(ROWS)
    with pytest.raises(ConfigError, match=r"output_dir is .*: expected text that UTF-8 can encode"):
        config(tiny_folder, tmp_path, output_dir=os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    assert os.listdir(tmp_path) == ["train.csv"]


def test_a_folder_whose_name_is_not_utf_8_is_refused_before_anything(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.csv").write_text(ROWS)
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    monkeypatch.chdir(os.fsencode(tmp_path) + b"/\xff")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="not valid UTF-8"):
        train(config(tiny_folder, tmp_path, output_dir="output"))
    assert os.listdir(".") == []


def test_a_report_of_somebody_else_is_not_replaced_by_the_report_command(place: Path) -> None:
    (place / "output" / "report.html").write_text("<html>mine</html>")
    with pytest.raises(OutputError, match=r"report\.html was not written by Handspun"):
        write_report(place / "output")
    assert (place / "output" / "report.html").read_text() == "<html>mine</html>"
    (place / "output" / "report.html").unlink()
    assert b"Handspun" in write_report(place / "output").read_bytes()
