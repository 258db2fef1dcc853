"""What goes wrong in a run is in its log, its record and, for rows that no step could be made of, in a file that
`preview` opens."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import handspun
from handspun.cli import main
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import load_splits
from handspun.data.examples import Example
from handspun.errors import TrainingError
from handspun.runs.incidents import Incident, incident_facts, incident_from, incident_line, write_batch
from handspun.runs.train import train
from handspun.training.checkpoint import is_checkpoint
from handspun.training.guards import OutOfMemory, SkippedStep, Spike
from handspun.training.memory import AvailableMemory
from handspun.training.packed import Packed
from tiny import tiny_tokenizer

ALPACA = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n}.\n" for n in range(1, 21))


def config(model: Path, data: Path, **options: Any) -> handspun.TrainConfig:
    values: dict[str, Any] = {"num_epochs": 2, "batch_size": 4, "max_tokens": 4096, **options}
    return handspun.TrainConfig(model=str(model), data=str(data), output_dir=str(data.parent / "output"), **values)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.csv"
    path.write_text(ALPACA, encoding="utf-8")
    return path


@pytest.fixture
def row_13_is_poison(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From the second epoch on, the micro-batch with row 13 has no finite loss."""
    backward, seen = Packed.backward, list[int]()

    def poisoned(self: Packed, part: Sequence[Example], divisor: int) -> float:
        loss = backward(self, part, divisor)
        seen.extend(example.row for example in part)
        return math.nan if seen.count(13) >= 2 and 13 in [example.row for example in part] else loss

    monkeypatch.setattr(Packed, "backward", poisoned)
    return seen


def metrics(output: Path) -> list[dict[str, Any]]:
    """Read as strictly as other languages read JSON, which has no NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.usefixtures("row_13_is_poison")
def test_a_run_that_stops_keeps_its_checkpoint_and_leaves_the_batch_for_preview(
    tiny_folder: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TrainingError, match=r"loss is nan[\s\S]*train\.csv, row 13"):
        train(config(tiny_folder, data), console=Console(file=io.StringIO()))
    output = data.parent / "output"
    assert is_checkpoint(output / "checkpoint-epoch-1")
    assert not (output / "checkpoint-epoch-2").exists()
    record = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "failed"
    (incident,) = record["incidents"]
    assert (incident["event"], incident["loss"], incident["skipped"]) == ("skipped", "nan", 1)
    assert [str(data), 13] in incident["batch"]
    file = output / f"nonfinite-step-{incident['step']}.jsonl"
    written = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {(row["file"], row["row"]) for row in written} == {(name, row) for name, row in incident["batch"]}
    log = (output / "train.log").read_text(encoding="utf-8")
    assert f"handspun preview --data {file} --model {tiny_folder}" in log
    assert f"{output} holds checkpoint-epoch-1" in log
    assert main(["preview", "--data", str(file), "--model", str(tiny_folder), "--examples", "4", "--plain"]) == 0
    shown = capsys.readouterr().out
    assert "rows: 4 read, 4 kept, 0 dropped" in shown
    assert "Say 13.<|im_end|>" in shown
    assert "⟦It is 13.<|im_end|>⟧" in shown


@pytest.mark.slow
@pytest.mark.usefixtures("row_13_is_poison")
def test_a_run_that_skips_goes_on_to_its_end_and_says_what_it_left_out(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = train(config(tiny_folder, data, on_nonfinite="skip"), console=Console(file=io.StringIO()))
    events = metrics(made.output_dir)
    kinds = [event["event"] for event in events if event["event"] in ("step", "skipped")]
    assert sorted(kinds) == ["skipped"] + ["step"] * 9
    (left_out,) = [event for event in events if event["event"] == "skipped"]
    record = json.loads((made.output_dir / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert record["incidents"] == [left_out]
    assert f"step {left_out['step']} was skipped: loss is nan" in (made.output_dir / "train.log").read_text()
    assert list(made.output_dir.glob("nonfinite*"))
    monkeypatch.undo()
    train(config(tiny_folder, data, overwrite=True, num_epochs=1), console=Console(file=io.StringIO()))
    assert not list(made.output_dir.glob("nonfinite*"))


@pytest.mark.slow
@pytest.mark.usefixtures("row_13_is_poison")
def test_a_run_that_stopped_meets_the_same_step_again_and_passes_it_only_when_told_to(
    tiny_folder: Path, data: Path
) -> None:
    """It saves after every step, and still not after the skipped one."""
    stopping = config(tiny_folder, data, save_steps=1)
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"step \d+ was skipped"):
            train(stopping, console=Console(file=io.StringIO()))
    made = train(config(tiny_folder, data, save_steps=1, on_nonfinite="skip"), console=Console(file=io.StringIO()))
    steps = [event["step"] for event in metrics(made.output_dir) if event["event"] in ("step", "skipped")]
    assert steps == list(range(1, 11))
    assert len(made.incidents) == 1


@pytest.mark.slow
def test_a_resumed_run_has_the_incidents_of_the_run_before(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward, made = Packed.backward, []

    def small_and_then_gone(self: Packed, part: Sequence[Example], divisor: int) -> float:
        if len(part) > 2:
            raise MemoryError
        made.append(len(part))
        if len(made) == 15:  # in the second epoch
            raise OSError("gone")
        return backward(self, part, divisor)

    monkeypatch.setattr(Packed, "backward", small_and_then_gone)
    with pytest.raises(OSError, match="gone"):
        train(config(tiny_folder, data), console=Console(file=io.StringIO()))
    run = train(config(tiny_folder, data), console=Console(file=io.StringIO()))
    events = [event["event"] for event in metrics(run.output_dir)]
    assert events.count("outofmemory") == 1  # the smaller micro-batches are kept
    assert [type(incident) for incident in run.incidents] == [OutOfMemory]


@pytest.mark.parametrize(
    "incident",
    [
        SkippedStep(3, 9, 1, math.inf, -math.inf, [("a.csv", 2)], 1),
        Spike(30, 1, 9.0, 2.0, 3.0, [("a.csv", 2)]),
        OutOfMemory(2, 1, 900, 400),
    ],
)
def test_an_incident_is_read_as_it_was_written(incident: Incident) -> None:
    assert incident_from(json.loads(json.dumps(incident_facts(incident)))) == incident


@pytest.mark.usefixtures("row_13_is_poison")
def test_rows_that_are_no_longer_those_of_the_run_are_not_written(tiny_folder: Path, data: Path) -> None:
    examples, held_out = load_splits(config(tiny_folder, data), ChatTemplate(tiny_tokenizer()), max_length=99)
    assert held_out is None
    (data.parent / "output").mkdir()
    skipped = SkippedStep(3, 9, 1, math.nan, math.nan, [(str(data), 2)], 1)
    data.write_text(ALPACA.replace("Say 2.", "Sing 2."), encoding="utf-8")
    assert "train.csv has changed while the run went on" in write_batch(
        skipped, config(tiny_folder, data), examples
    )
    data.unlink()
    assert "the data cannot be read any more" in write_batch(skipped, config(tiny_folder, data), examples)
    assert not list((data.parent / "output").iterdir())


def test_a_written_batch_has_the_very_tokens_whatever_the_rows_formats_were(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """A folder of two formats, with tools, a system column, and held-out rows that are none of the batch."""
    folder = tmp_path / "rows"
    folder.mkdir()
    alpaca = [
        {"instruction": f"Say {n}", "input": "é" * n, "output": f"{n}", "system": "Be brief."} for n in range(6)
    ]
    tool = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    calls = [
        {
            "conversations": [
                {"from": "human", "value": f"Weather {n}?"},
                {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "X"}})},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "Sun."},
            ],
            "tools": json.dumps([tool]),
        }
        for n in range(6)
    ]
    for name, rows in (("a", alpaca), ("b", calls)):
        text = "\n".join(json.dumps(row) for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    made = config(tiny_folder, folder, eval_ratio=0.2, cache_examples=False)
    template = ChatTemplate(tiny_tokenizer())
    training, _ = load_splits(made, template, max_length=512, eval_ratio=0.2)
    batch = sorted({(example.file, example.row) for example in training.examples})
    (tmp_path / "output").mkdir()
    write_batch(SkippedStep(1, 9, 1, math.nan, 1.0, batch, 1), made, training)
    again = handspun.TrainConfig(data=str(tmp_path / "output" / "nonfinite-step-1.jsonl"), cache_examples=False)
    read, _ = load_splits(again, template, max_length=512)
    assert [e.input_ids for e in read.examples] == [e.input_ids for e in training.examples]
    assert [e.loss_mask for e in read.examples] == [e.loss_mask for e in training.examples]


def test_lines_name_rows_by_file() -> None:
    rows = [("b.csv", 4), ("a.csv", 9), ("b.csv", 1)]
    spike = incident_line(Spike(30, 1, 9.0, 2.0, 3.0, rows))
    assert spike == ("step 30: loss 9.0000 is a spike (usual 2.0000, limit 3.0000): a.csv row 9; b.csv rows 1, 4")
    assert "step 2: out of memory for a micro-batch of 900 tokens" in incident_line(OutOfMemory(2, 1, 900, 400))


def test_a_run_that_met_the_end_of_memory_records_what_it_went_on_with(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Packed.backward

    def small(self: Packed, part: Sequence[Example], divisor: int) -> float:
        if len(part) > 2:
            raise MemoryError
        return backward(self, part, divisor)

    monkeypatch.setattr(Packed, "backward", small)
    made = train(config(tiny_folder, data), console=Console(file=io.StringIO()))
    (event,) = [event for event in metrics(made.output_dir) if event["event"] == "outofmemory"]
    record = json.loads((made.output_dir / "run.json").read_text(encoding="utf-8"))
    assert record["incidents"] == [event]
    assert record["status"] == "finished"
    assert f"at most {event['max_tokens']} (--max-tokens)" in (made.output_dir / "train.log").read_text()


def test_a_run_that_does_not_fit_is_refused_before_its_weights_are_read(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "handspun.runs.train.available_memory", lambda _: AvailableMemory(10**8, "free memory of this machine")
    )
    monkeypatch.setattr(
        "handspun.runs.train.load_trainable", lambda *_, **__: pytest.fail("the weights were read")
    )
    with pytest.raises(TrainingError, match=r"predicted peak memory is 0\.6 GB, and 0\.1 GB is available"):
        train(config(tiny_folder, data), console=Console(file=io.StringIO()))
    console = Console(file=io.StringIO(), width=200)
    plan = train(config(tiny_folder, data, dry_run=True), console=console).plan
    assert plan.steps == 10
    assert isinstance(console.file, io.StringIO)
    assert "this run will not fit in memory" in console.file.getvalue()
