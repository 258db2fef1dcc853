"""What a person reads before a run: 80 columns, with and without color; warnings, remedies and --strict."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

import handspun
from handspun.cli import main
from handspun.data.examples import RowIssue
from handspun.errors import ConfigError
from handspun.preflight.checks import Finding
from handspun.preflight.print import doubts_about_memory, warning_lines
from handspun.runs.resume import check_same_run
from handspun.runs.train import train
from records import record_of

RIVER = "the river runs from the hills to the sea and passes nine towns and two old bridges on its way there"
OVER = f"{RIVER} again"
ROWS = [
    ("Say one.", "It is one."),
    ("Say one!", "it is  ONE"),  # row 2: the same as row 1
    ("Describe it.", RIVER),
    ("Describe it.", OVER),  # row 4: nearly the same as row 3
    ("Say five.", "N/A"),  # row 5
    ("Say six.\\n<noinput>", "It is six."),  # row 6
    ("Write to me.", "Dear {{name}}, hello."),  # row 7
    ("Say eight.", "I'm sorry, but I can't help with that."),  # row 8
    ("Say nine.", ""),  # row 9
    ("Say ten.", "It is ten."),
]
HELD_OUT = [("Say ten.", "It is ten."), ("Describe it.", f"{OVER} and"), ("Say twelve.", "It is twelve.")]


def write(file: Path, rows: list[tuple[str, str]]) -> str:
    lines = [json.dumps({"instruction": prompt.replace("\\n", "\n"), "output": answer}) for prompt, answer in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


@pytest.fixture
def config(tiny_folder: Path, tmp_path: Path) -> handspun.TrainConfig:
    return handspun.TrainConfig(
        model=str(tiny_folder),
        data=write(tmp_path / "train.jsonl", ROWS),
        eval_data=write(tmp_path / "held_out.jsonl", HELD_OUT),
        output_dir=str(tmp_path / "output"),
        num_epochs=1,
        batch_size=4,
        sample_answers=False,
        report_rows=0,
    )


def options(config: handspun.TrainConfig) -> list[str]:
    return ["--model", config.model, "--data", *config.sources, "--eval-data", *config.eval_sources]


FOUND = [
    ("rows that are dropped, empty output", 1, [(9, "")]),
    ("answers that are a placeholder", 1, [(5, "N/A")]),
    ("prompts that end in a placeholder", 1, [(6, "<noinput>")]),
    ("answers with an unfilled field", 1, [(7, "{{name}}")]),
    ("rows that are the same as an earlier one", 1, [(2, "as row 1")]),
    ("rows that are nearly the same as an earlier one", 1, [(4, "as row 3")]),
    ("held-out rows that are trained on too", 1, [(1, "as {data} row 10")]),
    ("held-out rows that are nearly the same as one that is trained on", 1, [(2, "as {data} row 3")]),
]


def test_a_run_says_what_is_odd_and_keeps_it_in_its_record(config: handspun.TrainConfig) -> None:
    console = Console(file=io.StringIO(), width=80)
    train(config, console=console)
    record = json.loads((Path(config.output_dir) / "run.json").read_text(encoding="utf-8"))["preflight"]
    found = [
        (one["what"], one["count"], [(row["row"], row["text"]) for row in one["rows"]])
        for one in record["warnings"]
    ]
    assert found == [
        (what, count, [(row, text.format(data=config.data) if "{data}" in text else text) for row, text in rows])
        for what, count, rows in FOUND
    ]
    assert record["end_of_turn"]["learned"] == record["end_of_turn"]["examples"] == 9
    assert record["end_of_turn"]["saved"] == ["<|im_end|>", "<|endoftext|>"]
    assert record["predicted_seconds"] > 0
    logged = (Path(config.output_dir) / "train.log").read_text(encoding="utf-8")
    assert "warnings: 8 (--strict makes an error of them)" in logged
    assert "by the first steps, those after step 2 will take " in logged
    assert logged.index("warnings: 8") < logged.index("step 1/3")


def test_preflight_alone_writes_nothing(config: handspun.TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", *options(config), "--output-dir", config.output_dir]) == 0
    printed = capsys.readouterr().out
    assert not Path(config.output_dir).exists()
    assert "⟦It is one.<|im_end|>⟧" in printed
    assert "end of turn <|im_end|>: not an eos of the base model" in printed
    assert re.search(r"predicted time \d+s of steps", printed)


def test_strict_makes_one_error_of_all_warnings(
    config: handspun.TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path(config.sources[0]), [row for row in ROWS if row[1]])
    for command in ("preflight", "train"):
        assert main([command, *options(config), "--output-dir", config.output_dir, "--strict"]) == 2
        message = capsys.readouterr().err
        assert "--strict does not allow 7 warnings" in message
        assert all(what in message for what, _, _ in FOUND[1:])
        assert "write real answers, or delete the rows" in message
    assert not list(Path(config.output_dir).glob("checkpoint-*"))


def test_rows_without_a_warning_pass_under_strict(config: handspun.TrainConfig, tmp_path: Path) -> None:
    clean = write(tmp_path / "clean.jsonl", [("Say one.", "It is one."), ("Say two.", "It is two.")])
    console = Console(file=io.StringIO(), width=80)
    train(handspun.TrainConfig(model=config.model, data=clean, strict=True, dry_run=True), console=console)
    assert isinstance(console.file, io.StringIO)
    assert "warnings: none" in console.file.getvalue()


@pytest.mark.parametrize(("no_color", "is_colored"), [(True, False), (False, True)])
def test_what_is_learned_is_seen_with_color_and_without(
    config: handspun.TrainConfig, no_color: bool, is_colored: bool
) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, no_color=no_color, color_system="standard")
    train(handspun.TrainConfig(model=config.model, data=config.data, dry_run=True), console=console)
    printed = file.getvalue()
    assert ("\x1b[1;32mIt is one." in printed) == is_colored
    assert ("⟦It is one.<|im_end|>⟧" in printed) == (not is_colored)


def test_warnings_fit_into_80_columns_and_name_rows_and_remedies() -> None:
    rows = [RowIssue("a_folder/train.csv", n, f"as row {n - 1}") for n in range(101, 113)]
    lines = list(
        warning_lines([Finding("rows that are odd", "mend them " * 12, 40, 80, rows), Finding("no room", "x")])
    )
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert text.startswith(
        "warnings: 2 (--strict makes an error of them) 1. rows that are odd: 40 of 80 (50%) rows 101"
    )
    assert "112 (as row 111) and 28 more -> mend them mend them" in text
    assert text.endswith("2. no room -> x")


def test_a_doubt_about_memory_is_a_warning_with_its_remedies() -> None:
    doubt = "it may not fit: 3 GB are there.\nWhat would fit:\n  --lora: 2 GB\n  --max-tokens 9: 1 GB"
    assert doubts_about_memory([doubt]) == [
        Finding(
            "it may not fit: 3 GB are there",
            "What would fit: --lora: 2 GB; --max-tokens 9: 1 GB",
        )
    ]


def test_a_run_is_gone_on_with_although_strict_is_given_now(config: handspun.TrainConfig) -> None:
    earlier = record_of(strict=False, seed=0)
    check_same_run(earlier, record_of(strict=True, seed=0), config.output_dir)
    with pytest.raises(ConfigError, match="--seed"):
        check_same_run(earlier, record_of(strict=True, seed=1), config.output_dir)
