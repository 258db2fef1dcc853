"""What Python programs call: names, rows in memory, errors in Python's words, help, and short reprs."""

import inspect
import json
import os
import pydoc
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pandas  # type: ignore[import-untyped]
import pytest

import handspun
from handspun.config.docs import field_texts
from handspun.config.spelling import command_line, in_python
from handspun.decoding.arguments import CallOptions
from handspun.models.load import ChatModel
from handspun.runs.record import command, read_record
from small_runs import quiet_console

ROWS = [{"instruction": f"Say {n}.", "output": f"It is {n}."} for n in range(10)]
BRIEF: dict[str, Any] = {"num_epochs": 1, "sample_answers": False, "report_rows": 0, "eval_ratio": 0.2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--temperature is 3: expected at most 2.", "temperature is 3: expected at most 2."),
        ("--num-beams 2 and --do-sample exclude", "num_beams=2 and do_sample=True exclude"),
        ("--lora is 1: expected true or false.", "lora is 1: expected true or false."),
        ("use --no-do-sample.", "use do_sample=False."),
        ("--no-repeat-ngram-size 3 is", "no_repeat_ngram_size=3 is"),
        ("--no-stop-strings turns them off", "stop_strings=() turns them off"),
        ("--base-weights int8 needs --lora:", 'base_weights="int8" needs lora=True:'),
        ("--device gpu is not available", "device gpu is not available"),
        ("--columns instruction=Frage,output=Antwort, and", 'columns="instruction=Frage,output=Antwort", and'),
        ("--logit-bias.42=-100", 'logit_bias={"42": -100}'),
        ("""--logit-bias '{"42": -100}'.""", 'logit_bias={"42": -100}.'),
        (
            "(handspun export --model a --merge). Then --merge",
            "(handspun export --model a --merge). Then merge=True",
        ),
        ("pip install --user", "pip install --user"),
    ],
)
def test_in_python_respells_options_but_not_commands(text: str, expected: str) -> None:
    assert in_python(text) == expected


def test_errors_speak_of_arguments_in_python_and_of_options_on_the_command_line() -> None:
    with pytest.raises(handspun.ConfigError) as told:
        handspun.GenerationOptions(num_beams=3, do_sample=True)
    assert str(told.value).startswith("num_beams=3 and do_sample=True exclude each other")
    assert told.value.problems == [str(told.value)]
    with command_line(), pytest.raises(handspun.ConfigError, match="^--num-beams 3 and --do-sample exclude"):
        handspun.GenerationOptions(num_beams=3, do_sample=True)


def test_options_report_wrong_names_and_wrong_values_together() -> None:
    options: dict[str, Any] = {"lr": 1e-4, "batch_size": "a"}
    with pytest.raises(handspun.ConfigError) as told:
        handspun.TrainConfig(**options)
    assert told.value.problems == [
        "there is no option lr. Here it is learning_rate.",
        "batch_size is 'a': expected a whole number.",
    ]


def test_help_of_options_has_the_text_of_each_field() -> None:
    page = " ".join(pydoc.plain(pydoc.render_doc(handspun.TrainConfig)).replace("|", " ").split())
    texts = field_texts(handspun.TrainConfig)
    assert list(texts) == [field.name for field in fields(handspun.TrainConfig)]
    assert all(texts.values())
    assert all(f"{name}: {in_python(text)[:20]}" in page for name, text in texts.items())
    assert "--" not in (handspun.TrainConfig.__doc__ or "")


@pytest.mark.parametrize("function", [handspun.generate, handspun.stream])
def test_generation_options_are_arguments_with_types_and_texts(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    for config in (handspun.GenerationOptions, CallOptions):
        own = {field.name for field in fields(config)}
        assert own <= parameters.keys()
        assert all(re.search(rf"^    {name}: ", function.__doc__, re.MULTILINE) for name in own)
    assert parameters["temperature"].annotation == (float | None)


def test_signatures_name_the_options_that_a_function_takes() -> None:
    for function, config in (
        (handspun.train, handspun.TrainConfig),
        (handspun.evaluate, handspun.DataConfig),
        (handspun.preview, handspun.DataConfig),
        (handspun.compare, handspun.GenerationOptions),
        (handspun.export, handspun.ExportConfig),
    ):
        assert {field.name for field in fields(config)} <= inspect.signature(function).parameters.keys()
    assert next(iter(inspect.signature(handspun.train).parameters)) == "data"


def test_train_takes_rows_and_generate_takes_the_run(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "output"
    run = handspun.train(ROWS, model=str(tiny_folder), output_dir=folder, console=quiet_console(), **BRIEF)
    assert isinstance(run.model, ChatModel)
    assert re.fullmatch(r"TrainedRun\('.*output', 1 checkpoint, best held-out loss \d\.\d{4}\)", repr(run))
    first = handspun.generate(run, "Say 3.", max_new_tokens=4)
    assert first == handspun.generate(folder / "checkpoint-epoch-1", "Say 3.", max_new_tokens=4)
    record = read_record(folder)
    assert not isinstance(record, str)
    name = record.config["data"]
    assert re.fullmatch(r"list of 10 rows \(sha256 [0-9a-f]{12}\)", name)
    assert f"# data.jsonl: the {name}, which a Python program gave" in command(record.given)
    assert "--data data.jsonl" in command(record.given)
    again = handspun.train(
        ROWS, model=str(tiny_folder), output_dir=folder, resume=True, console=quiet_console(), **BRIEF
    )
    assert again.model_in_memory is None
    assert handspun.generate(again.model, "Say 3.", max_new_tokens=4) == first


def test_a_run_of_rows_resumes_only_with_the_same_rows(tiny_folder: Path, tmp_path: Path) -> None:
    """The rows are compared by their content, whatever kind of table holds them."""
    folder = tmp_path / "output"
    options = {"model": str(tiny_folder), "output_dir": str(folder), "console": quiet_console(), **BRIEF}
    handspun.train(ROWS, **options)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    (folder / "run.json").write_text(json.dumps({**record, "status": "interrupted"}), encoding="utf-8")
    other = [*ROWS[:-1], {"instruction": "Say 9.", "output": "It is nine."}]
    with pytest.raises(handspun.ConfigError, match="rows \\(sha256\\)"):
        handspun.train(other, **options)
    run = handspun.train(pandas.DataFrame(ROWS), **options)
    assert len(run.checkpoints) == 1


def test_rows_of_all_kinds_are_the_same_rows(tiny_folder: Path) -> None:
    kinds = [ROWS, pandas.DataFrame(ROWS), datasets.Dataset.from_list(ROWS)]
    previews = [handspun.preview(rows, tiny_folder) for rows in kinds]
    assert {preview.dataset.fingerprint for preview in previews} == {previews[0].dataset.fingerprint}
    assert repr(previews[0]).startswith("tokens trained on are between ⟦ and ⟧\n\n--- list of 10 rows (sha256 ")
    assert "It is 0.<|im_end|>⟧" in repr(previews[0])
    assert previews[1].report.kept == 10


def test_missing_cells_of_a_dataframe_are_missing(tiny_folder: Path) -> None:
    table = pandas.DataFrame({"instruction": ["Hi", None], "output": ["Ho", "He"], "when": [pandas.NaT, 2]})
    [dropped] = handspun.preview(table, tiny_folder).report.dropped
    assert (dropped.row, dropped.text) == (2, "empty instruction")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], r"data is \[\]: expected at least one row"),
        ({"train": ROWS}, r"of a mapping, take one value, as in data\['train'\]"),
        ([{"instruction": "a"}, 3], "list of 2 rows, row 2: expected a dict of column -> value, found int"),
        ([{1: "a"}], "the column 1 is not text"),
        ([{"output": {1}}], r"list of 1 row, row 1, column 'output': a set cannot be read"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), r"take some, as in list\(data.take\(1000\)\)"),
    ],
)
def test_data_that_holds_no_rows(data: Any, expected: str) -> None:
    with pytest.raises(handspun.HandspunError, match=expected):
        handspun.TrainConfig(data=data)


def test_evaluate_and_compare_take_names_and_models(tiny_folder: Path, tiny_chat: ChatModel) -> None:
    scores = handspun.evaluate(tiny_folder, ROWS, generate=True, max_new_tokens=2)
    assert repr(scores) == f"Scores('{tiny_folder}', 10 rows, loss {scores.loss:.4f}, exact match 0.0%)"
    found = handspun.compare([tiny_folder, tiny_chat], "Say 3.", max_new_tokens=2)
    assert found.models == [str(tiny_folder), "tiny"]
    assert [len(answers) for answers in found.answers] == [1, 1]


def test_export_takes_a_run_or_a_name(tiny_folder: Path, tiny_chat: ChatModel, tmp_path: Path) -> None:
    assert handspun.export(tiny_folder, tmp_path / "merged", merge=True) == tmp_path / "merged"
    assert (tmp_path / "merged" / "config.json").exists()
    with pytest.raises(handspun.ConfigError, match="export reads a checkpoint"):
        handspun.export(tiny_chat, tmp_path / "other", merge=True)  # type: ignore[arg-type]


def test_reprs_are_short(tiny_chat: ChatModel) -> None:
    assert re.fullmatch(r"ChatModel\('tiny', \d+K, float32, cpu\)", repr(tiny_chat))
    answer = handspun.generate(tiny_chat, "Hi", max_new_tokens=1)[0]
    assert repr(answer) == f"GenerationResult({answer.text!r}, 1 token, {answer.finish_reason})"


@pytest.mark.parametrize("model", [3, None, {"name": "x"}])
def test_generate_says_what_a_model_is(model: Any) -> None:
    with pytest.raises(handspun.ConfigError, match=r"expected a model from handspun\.load, a run from"):
        handspun.generate(model, "hi")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_import_lets_threads_wait_busily_for_a_short_time_only(given: dict[str, str], expected: str) -> None:
    """libgomp reads the variable when it is loaded, so torch must not have been imported."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = "import handspun, os, sys; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    answer = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **given}, capture_output=True, text=True, check=True
    )
    assert answer.stdout == f"False {expected}\n"
