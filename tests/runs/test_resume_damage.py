"""Any file of an unfinished run may be damaged: it ends with the same bits all the same, or is one clear error."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import handspun
from handspun.errors import HandspunError, OutputError
from handspun.runs import train as run_module
from handspun.training.checkpoint import is_checkpoint
from handspun.training.loop import Event, Loop, TrainingState

ROWS = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n}.\n" for n in range(8))


class Crash(BaseException):
    """The power goes."""


def train(tiny_folder: Path, folder: Path, output: str = "output") -> str:
    """Three epochs of two steps, with a checkpoint after each step."""
    console = Console(file=io.StringIO(), width=200)
    config = handspun.TrainConfig(
        model=str(tiny_folder),
        data=str(folder / "train.csv"),
        output_dir=str(folder / output),
        num_epochs=3,
        batch_size=4,
        learning_rate=1e-3,
        eval_ratio=0.25,
        eval_steps=1,
        save_steps=1,
        keep_last=2,
        dtype="float32",
        threads=1,
        sample_answers=False,
        report_rows=0,
        cache_examples=False,
    )
    run_module.train(config, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def weights(output: Path) -> dict[str, str]:
    """sha256 of the weights of the checkpoints that every such run has in the end."""
    names = ["checkpoint-best", *(f"checkpoint-epoch-{n}" for n in (1, 2, 3))]
    files = [output / name / "model.safetensors" for name in names]
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.exists()}


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, a run that nobody disturbed in `whole`, and one that ended after step 5 of 6 in `output`."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "train.csv").write_text(ROWS, encoding="utf-8")
    train(tiny_folder, folder, "whole")
    events = run_module.training_events

    def cut(loop: Loop, state: TrainingState) -> Iterator[Event]:
        for event in events(loop, state):
            if event.step > 5:
                raise Crash
            yield event

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "training_events", cut)
        with pytest.raises(Crash):
            train(tiny_folder, folder)
    return folder


@pytest.fixture
def place(runs: Path, tmp_path: Path) -> Path:
    """A copy of all of it."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def other_types(content: bytes) -> bytes:
    """The same names with values of other types; of what is no JSON object, a list."""
    try:
        facts = json.loads(content)
    except ValueError:
        return b"[1, 2]\n"
    turned = {name: ["another type"] if not isinstance(value, list) else 3 for name, value in facts.items()}
    return json.dumps(turned).encode()


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "removed": lambda _: None,
    "empty": lambda _: b"",
    "cut": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "garbage": lambda content: b"\xff\xfe{[" + content[4:],
    "other types": other_types,
    "an empty object": lambda _: b"{}\n",
}
RECORDS = ["run.json", "train.log", "metrics.jsonl", "report_data.json", "report.html"]
IN_MODELS = ["manifest.json", "model.safetensors", "config.json", "README.md"]
IN_STATES = [f"training_state/{name}" for name in ("manifest.json", "state.json")]
IN_STATES += [f"training_state/{name}.safetensors" for name in ("optimizer", "weights")]
FILES = [
    f"{folder}/{name}" for folder in ("checkpoint-step-5", "checkpoint-epoch-2") for name in IN_MODELS + IN_STATES
]
FILES += [f"{folder}/{name}" for folder in ("checkpoint-best", "checkpoint-epoch-1") for name in IN_MODELS]
CASES = [(name, list(DAMAGES)[n % len(DAMAGES)]) for n, name in enumerate(FILES)]
CASES += [("checkpoint-step-5/manifest.json", damage) for damage in list(DAMAGES)[1:]]


def damage(path: Path, how: str) -> None:
    """Replaces the file, so that a second name of it keeps what it has."""
    content = DAMAGES[how](path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_damaged_file_ends_in_the_same_bits_or_in_one_error(
    tiny_folder: Path, place: Path, name: str, how: str
) -> None:
    """One error where a model is damaged that is not made again; it takes nothing away, and its remedy works."""
    output = place / "output"
    damage(output / name, how)
    folder = output / name.split("/")[0]
    if folder.name != "checkpoint-step-5" and "training_state" not in name:
        before = weights(output)
        with pytest.raises(HandspunError, match=f"Move {folder} away to continue without it"):
            train(tiny_folder, place)
        assert weights(output) == before
        folder.rename(place / "away")
    train(tiny_folder, place)
    expected = weights(place / "whole")
    if (place / "away").exists():
        expected = {name: sum for name, sum in expected.items() if name not in (folder.name, "checkpoint-best")}
    assert {name: sum for name, sum in weights(output).items() if name in expected} == expected
    assert all(map(is_checkpoint, output.glob("checkpoint-*")))
    assert json.loads((output / "run.json").read_text())["status"] == "finished"
    assert len((output / "report.html").read_bytes()) > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", RECORDS[:4])
@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_record_never_ends_a_run(tiny_folder: Path, place: Path, name: str, how: str) -> None:
    """What it held is in the checkpoint, or can be had again, or is worth no run."""
    damage(place / "output" / name, how)
    said = train(tiny_folder, place)
    assert "resuming after step 5 of 6" in said
    assert ("its content is taken from checkpoint-step-5" in said) == (name == "run.json")
    assert weights(place / "output") == weights(place / "whole")


def test_everything_of_the_record_is_gone_at_once(tiny_folder: Path, place: Path) -> None:
    for name in RECORDS:
        (place / "output" / name).unlink(missing_ok=True)
    assert "resuming after step 5 of 6" in train(tiny_folder, place)
    assert weights(place / "output") == weights(place / "whole")
    record = json.loads((place / "output" / "run.json").read_text())
    whole = json.loads((place / "whole" / "run.json").read_text())
    assert record["evaluations"] == whole["evaluations"]
    assert record["checkpoints"] == whole["checkpoints"]


def test_no_checkpoint_is_whole(tiny_folder: Path, place: Path) -> None:
    folders = list((place / "output").glob("checkpoint-*/training_state"))
    for folder in folders:
        damage(folder / "state.json", "cut")
    with pytest.raises(OutputError, match="none of its checkpoints is intact") as raised:
        train(tiny_folder, place)
    assert len(folders) == 2
    assert all(str(folder / "state.json") in str(raised.value) for folder in folders)


def test_a_training_state_of_a_newer_version_is_one_error(tiny_folder: Path, place: Path) -> None:
    state = place / "output" / "checkpoint-step-5" / "training_state"
    facts = json.loads((state / "state.json").read_text())
    (state / "state.json").write_text(json.dumps({**facts, "version": 2}))
    manifest = json.loads((state / "manifest.json").read_text())
    manifest["files"]["state.json"] = hashlib.sha256((state / "state.json").read_bytes()).hexdigest()
    (state / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match=r"saved by another version of Handspun \(expected format 1, got 2\)"):
        train(tiny_folder, place)


def test_a_checkpoint_that_the_user_removed_is_not_missed(tiny_folder: Path, place: Path) -> None:
    shutil.rmtree(place / "output" / "checkpoint-epoch-1")
    said = train(tiny_folder, place)
    assert "checkpoint-epoch-1 no longer exists: the run continues without it" in said
    record = json.loads((place / "output" / "run.json").read_text())
    assert record["checkpoints"] == ["checkpoint-epoch-2", "checkpoint-epoch-3"]


def test_metrics_of_the_steps_that_are_left_are_kept(tiny_folder: Path, place: Path) -> None:
    file = place / "output" / "metrics.jsonl"
    lines = file.read_text().splitlines()
    lines[2:4] = ["{", '"step"', "[]", '{"event": "step", "step": "1"}', "\x00", '{"event": "step", "step": 1}']
    file.write_text("\n".join(lines) + "\n")
    train(tiny_folder, place)
    whole = [json.loads(line) for line in (place / "whole" / "metrics.jsonl").read_text().splitlines()]
    found: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in found] == [
        (event["event"], event["step"]) for event in whole[:2] + whole[4:]
    ]
