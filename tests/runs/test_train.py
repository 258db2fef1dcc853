"""A whole run on a tiny model: what is written, what is said, what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import handspun
from backends import chosen
from handspun.display import log_lines_to
from handspun.errors import ConfigError, DataError, HandspunError, OutputError
from handspun.runs.train import train
from handspun.training.checkpoint import is_checkpoint
from small_runs import ROWS, printed_to, quiet_console
from small_runs import brief_config as config


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.csv"
    path.write_text(ROWS, encoding="utf-8")
    return path


@pytest.mark.parametrize("lora", [False, True])
def test_it_leaves_checkpoints_a_log_metrics_and_a_record(tiny_folder: Path, data: Path, lora: bool) -> None:
    run = train(config(tiny_folder, data, lora=lora), console=quiet_console())
    output = data.with_name("output")
    assert [path.name for path in run.checkpoints] == ["checkpoint-epoch-1", "checkpoint-epoch-2"]
    assert all(is_checkpoint(path) for path in run.checkpoints)
    card = ModelCard.load(run.checkpoints[-1] / "README.md")
    assert card.data.library_name == ("peft" if lora else "transformers")
    assert "| 4 (this checkpoint) | 2 |" in card.text
    assert "train.csv: 16 of 16 rows" in card.text
    assert run.best_checkpoint == output / "checkpoint-best"
    assert is_checkpoint(output / "checkpoint-best")
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in metrics if event["event"] == "step"]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert sum(step["rows"] for step in steps) == 2 * 16
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["config"]["learning_rate"] == 1e-3
    assert record["config"]["max_length"] == 512
    assert record["data"]["train"]["rows"]["kept"] == 16
    assert record["data"]["held_out"]["rows"]["kept"] == 4
    assert record["environment"]["versions"]["torch"]
    assert [e["step"] for e in record["evaluations"]] == [0, 2, 4]
    assert handspun.generate(handspun.load(str(run.checkpoints[-1])), "Say 3.", max_new_tokens=5)[0].token_ids


def test_the_log_is_plain_lines_in_file_and_output(tiny_folder: Path, data: Path) -> None:
    console, lines = quiet_console(), list[str]()
    with log_lines_to(lines.append):  # as a program that uses the library may
        train(config(tiny_folder, data), console=console)
    printed = printed_to(console)
    logged = (data.with_name("output") / "train.log").read_text(encoding="utf-8")
    for text in (printed, logged):
        assert "\x1b" not in text
        assert "\r" not in text
        assert "rows: 16 read, 16 kept, 0 dropped" in text
        assert re.search(r"step 1/4  epoch 1  loss \d\.\d{4}  lr 1\.00e-03  grad ", text)
        assert re.search(r"held-out loss \d\.\d{4} before, \d\.\d{4} after\n", text)
    assert re.sub(r"^\d\d:\d\d:\d\d ", "", logged, flags=re.MULTILINE) == printed
    assert "".join(f"{line}\n" for line in lines) == printed


@pytest.mark.cpu
def test_missing_kernels_are_said_once_at_the_start(tiny_folder: Path, data: Path) -> None:
    said = "training runs without native kernels, which is slower: "
    for kernels, times in (("none", 1), ("reference", 0)):  # the second is what the user wants
        lines = list[str]()
        with chosen(kernels), log_lines_to(lines.append):
            train(config(tiny_folder, data, dry_run=True), console=quiet_console())
        assert "\n".join(lines).count(said) == times


def test_a_base_models_new_end_of_turn_is_said_and_saved(tiny_folder: Path, data: Path) -> None:
    run = train(config(tiny_folder, data, lora=True), console=quiet_console())
    logged = (data.with_name("output") / "train.log").read_text(encoding="utf-8")
    assert "the end of turn <|im_end|> was not an eos of the base model" in logged
    assert "its embedding row is trained along with the adapters" in logged
    adapter = json.loads((run.checkpoints[-1] / "adapter_config.json").read_text())
    assert adapter["trainable_token_indices"]
    generation = json.loads((run.checkpoints[-1] / "generation_config.json").read_text())
    assert len(generation["eos_token_id"]) == 2


@pytest.mark.slow
def test_an_int8_base_trains_packed_and_leaves_an_ordinary_adapter(tiny_folder: Path, data: Path) -> None:
    losses = {}
    for base_weights in ("float32", "int8"):
        made = config(tiny_folder, data, lora=True, base_weights=base_weights, overwrite=True)
        run = train(made, console=quiet_console())
        losses[base_weights] = [evaluation.loss for evaluation in run.evaluations]
    log = (data.with_name("output") / "train.log").read_text(encoding="utf-8")
    assert "the frozen layers under the adapters are int8" in log
    assert "batching: packed" in log
    assert "matmuls in float32 (beside the int8 layers)" in log
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["int8"] != losses["float32"]
    adapted = handspun.load(str(run.checkpoints[-1]))
    assert handspun.generate(adapted, "Say 3.", max_new_tokens=5)[0].token_ids


@pytest.mark.slow
@pytest.mark.parametrize("base_weights", ["float32", "int8"])
def test_adapters_on_some_layers_are_planned_saved_and_exported(
    tiny_folder: Path, data: Path, base_weights: str
) -> None:
    options: dict[str, Any] = {
        "lora": True,
        "base_weights": base_weights,
        "lora_target_modules": ("q_proj", "v_proj"),
    }
    run = train(config(tiny_folder, data, **options), console=quiet_console())
    assert run.plan.trainable == sum(
        value.numel() for value in load_file(run.checkpoints[-1] / "adapter_model.safetensors").values()
    )
    saved = json.loads((run.checkpoints[-1] / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(saved["target_modules"]) == ["q_proj", "v_proj"]
    assert "on q_proj, v_proj" in (run.checkpoints[-1] / "README.md").read_text(encoding="utf-8")
    merged = handspun.export(str(run.checkpoints[-1]), output_dir=str(data.with_name("merged")), merge=True)
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_folder, Path(merged)))
    changed = {name.split(".")[-2] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"embed_tokens", "q_proj", "v_proj"}  # its end of turn is new to the tiny model


def test_target_modules_that_the_model_has_not_are_an_error_before_anything_is_written(
    tiny_folder: Path, data: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"no linear layer c_attn \(expected some of down_proj, gate_proj, k_proj"
    ):
        train(config(tiny_folder, data, lora=True, lora_target_modules=("c_attn",)), console=quiet_console())
    assert not data.with_name("output").exists()


def test_the_best_checkpoint_is_kept_not_the_last(tiny_folder: Path, data: Path) -> None:
    """A rate so high that the first step is an improvement, and everything after it is not."""
    made = config(tiny_folder, data, learning_rate=0.5, warmup_ratio=0.0, lr_schedule="constant", eval_steps=1)
    run = train(made, console=quiet_console())
    assert [evaluation.best for evaluation in run.evaluations] == [True, True, False, False, False]
    folder = data.with_name("output") / "checkpoint-best"
    assert run.best_checkpoint == folder
    assert json.loads((folder / "manifest.json").read_text())["step"] == 1


def test_a_run_that_only_gets_worse_has_no_best_checkpoint(tiny_folder: Path, data: Path) -> None:
    made = config(tiny_folder, data, learning_rate=3.0, warmup_ratio=0.0, lr_schedule="constant", eval_steps=1)
    run = train(made, console=quiet_console())
    assert [evaluation.best for evaluation in run.evaluations] == [True, False, False, False, False]
    assert run.best_checkpoint is None
    assert not data.with_name("output").joinpath("checkpoint-best").exists()


def test_a_dry_run_tells_the_plan_and_writes_nothing(tiny_folder: Path, data: Path) -> None:
    console = quiet_console()
    run = train(config(tiny_folder, data, dry_run=True), console=console)
    printed = printed_to(console)
    assert not data.with_name("output").exists()
    assert run.plan.steps == 4
    assert "16 examples x 2 epochs in batches of 8: 4 steps" in printed
    assert "predicted peak memory" in printed
    full, lora, int8 = run.ways
    assert "\n-> full  " in printed
    assert "\n   --lora --base-weights int8  " in printed
    assert (full.peak_memory, full.fit, full.chosen) == (run.plan.peak_memory, "fits", True)
    assert 0 < int8.peak_memory <= lora.peak_memory
    assert all(way.seconds for way in run.ways)


@pytest.mark.slow
def test_the_plan_of_a_dry_run_is_that_of_the_run(tiny_folder: Path, data: Path) -> None:
    console = quiet_console()
    options: dict[str, Any]
    for options in ({}, {"lora": True}, {"lora": True, "base_weights": "int8"}):
        dry = train(config(tiny_folder, data, **options, dry_run=True), console=console).plan
        real = train(config(tiny_folder, data, **options, overwrite=True), console=console).plan
        assert dry.parameters == pytest.approx(real.parameters, abs=2 * 32)
        assert (dry.steps, dry.tokens, dry.learned_tokens) == (real.steps, real.tokens, real.learned_tokens)
        assert abs(dry.trainable - real.trainable) <= 2 * 32  # the new end of turn's rows


def test_an_earlier_run_is_not_overwritten_unasked(tiny_folder: Path, data: Path) -> None:
    console = quiet_console()
    train(config(tiny_folder, data, num_epochs=1), console=console)
    other = data.with_name("output") / "notes.txt"
    other.write_text("mine")
    with pytest.raises(OutputError, match=r"holds an earlier run .*--overwrite"):
        train(config(tiny_folder, data, num_epochs=1), console=console)
    train(config(tiny_folder, data, num_epochs=1, overwrite=True), console=console)
    assert other.read_text() == "mine"


def test_a_disk_that_is_too_small_is_said_before_the_first_step(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "handspun.runs.output_dir.shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})()
    )
    with pytest.raises(OutputError, match=r"has 1\.0 kB free, and 2 checkpoints"):
        train(config(tiny_folder, data), console=quiet_console())


def test_a_run_that_fails_says_so_in_its_record(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OutputError("the disk is gone")

    monkeypatch.setattr("handspun.runs.checkpoints.save_checkpoint", broken)
    with pytest.raises(OutputError, match="the disk is gone"):
        train(config(tiny_folder, data), console=quiet_console())
    assert json.loads((data.with_name("output") / "run.json").read_text())["status"] == "failed"


def test_held_out_rows_of_a_file_that_is_not_there(tiny_folder: Path, data: Path) -> None:
    made = config(tiny_folder, data, eval_ratio=0.0, eval_data=str(data.with_name("trian.csv")))
    with pytest.raises(DataError, match=r"train\.csv"):
        train(made, console=quiet_console())


@pytest.mark.parametrize("option", ["model", "misspelt column", "max_length"])
def test_a_refused_run_leaves_the_disk_as_it_was(tiny_folder: Path, tmp_path: Path, option: str) -> None:
    data = tmp_path / "train.csv"
    column = "instructoin" if option == "misspelt column" else "instruction"
    data.write_text(f"{column},output\na,b\nc,d\n", encoding="utf-8")
    options: dict[str, dict[str, Any]] = {"model": {"model": "./absent"}, "max_length": {"max_length": 10**6}}
    refused = options.get(option, {})
    for folder in ("new", "new/below/another", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        made = replace(config(tiny_folder, data), output_dir=str(tmp_path / folder), **refused)
        with pytest.raises(HandspunError):
            train(made, console=quiet_console())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "train.csv"]
        assert not any((tmp_path / "empty").iterdir())


def test_a_refused_run_keeps_files_of_others(tiny_folder: Path, data: Path) -> None:
    output = data.with_name("output")
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(HandspunError):
        train(config(tiny_folder, data, max_length=10**6), console=quiet_console())
    assert [path.name for path in output.iterdir()] == ["notes.txt"]


def test_a_log_of_a_run_that_never_began_does_not_stand_in_the_way(tiny_folder: Path, data: Path) -> None:
    """A kill after the first line leaves one."""
    output = data.with_name("output")
    output.mkdir()
    (output / "train.log").write_text("12:00:00 loading rows\n")
    (output / "metrics.jsonl").write_text("")
    train(config(tiny_folder, data, num_epochs=1), console=quiet_console())
    assert "loading rows" not in (output / "train.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(("batching", "lora"), [("packed", False), ("padded", False), ("packed", True)])
def test_activation_checkpointing_changes_no_loss(
    tiny_folder: Path, data: Path, batching: str, lora: bool
) -> None:
    losses = []
    for checkpointing in (False, True):
        options = {
            "batching": batching,
            "lora": lora,
            "activation_checkpointing": checkpointing,
            "dtype": "float32",
        }
        made = config(tiny_folder, data, **options, overwrite=True)
        run = train(made, console=quiet_console())
        assert not run.model.model.is_activation_checkpointing  # it decodes as it always did
        losses.append([evaluation.loss for evaluation in run.evaluations])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_activation_checkpointing_computes_the_layers_again(
    tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    calls = []
    forward = Qwen2MLP.forward
    monkeypatch.setattr(Qwen2MLP, "forward", lambda self, x: calls.append(1) or forward(self, x))
    counts = []
    for checkpointing in (False, True):
        calls.clear()
        made = config(tiny_folder, data, eval_ratio=0.0, activation_checkpointing=checkpointing, overwrite=True)
        train(made, console=quiet_console())
        counts.append(len(calls))
    assert counts[1] > 1.5 * counts[0]
