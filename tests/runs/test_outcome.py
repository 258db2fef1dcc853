"""The verdict on a run by hand-made losses, exact matches, the next commands, and the end of a run's log."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from handspun.config import DataConfig, TrainConfig
from handspun.data.rows import read_rows
from handspun.errors import OutputError
from handspun.evaluation.score import score
from handspun.models.load import load
from handspun.runs.artifacts import allowed_seconds
from handspun.runs.metrics import Metrics, RunFiles, read_run
from handspun.runs.outcome import (
    Matches,
    checkpoint,
    end_lines,
    epoch_losses,
    matches,
    next_commands,
    perplexity,
    verdict,
)
from handspun.runs.replacing import check_no_foreign_files, earlier_run
from handspun.runs.train import train
from records import record_of
from small_runs import config, printed_to, quiet_console

SHORT = "instruction,input,output\n" + "".join(f"Is {n} even?,,{'no' if n % 2 else 'yes'}\n" for n in range(20))


def run_of(
    training: list[float], held_out: list[float], kept: dict[str, Any] | None = None, **options: Any
) -> RunFiles:
    """A run of one step per epoch with these losses; those of held-out rows begin before the first step."""
    record = record_of(num_epochs=len(training), learning_rate=5e-5, model="m", **options)
    record.status, record.checkpoints, record.best_checkpoint = (
        "finished",
        ["checkpoint-epoch-1"],
        "checkpoint-best",
    )
    steps = [
        {"step": n, "epoch": n, "loss": loss, "learned_tokens": 10, "seconds": 1.0}
        for n, loss in enumerate(training, 1)
    ]
    found = [{"step": n, "epoch": n, "loss": loss} for n, loss in enumerate(held_out)]
    assert record.plan is not None
    return RunFiles(Path("my runs/one"), record, record.plan, Metrics(steps, found), kept or {})


@pytest.mark.parametrize(
    ("training", "held_out", "begins", "advice"),
    [
        (
            [2.0, 1.0, 0.5],
            [2.0, 1.5, 1.4, 1.45],
            "Overfitted: the held-out loss rose from 1.4000 (step 2)",
            "fewer",
        ),
        ([2.0, 2.5, 3.0], [2.0, 1.5, 1.6, 1.9], "Unstable: the held-out loss rose from 1.5000", "Lower"),
        ([2.0, 3.0], [2.0, 2.5, 3.0], "Worse than before: the held-out loss rose", "--learning-rate 1e-05"),
        ([2.0, 1.9], [2.0, 1.99, 1.98], "Nothing learned: the held-out loss stayed", "raise the learning rate"),
        (
            [2.0, 1.5],
            [2.0, 1.6, 1.4],
            "Still falling: the held-out loss fell by 30%, and from 1.6000",
            "-epochs 4",
        ),
        ([2.0, 0.5], [2.0, 1.25, 1.2], "Learned: the held-out loss fell by 40%. The training rows", "varied"),
        ([2.0, 1.1], [2.0, 1.22, 1.2], "Learned: the held-out loss fell by 40%, and has leveled off.", ""),
        ([1.5], [2.0, 1.2], "Learned: the held-out loss fell by 40% in one epoch.", "--num-epochs 3"),
        (
            [1.5, 0.1],
            [2.0, 0.2, 0.04],
            "Learned: the held-out loss fell from 2.0000 to 0.0400, which is nearly none.",
            "",
        ),
        ([2.0, 1.0], [], "The training loss fell from 2.0000 in the first epoch to 1.0000", "--eval-ratio 0.05"),
        ([2.0, 1.99], [], "Nothing learned: the training loss did not fall", "preview"),
        ([2.0], [], "Nothing learned: the training loss did not fall (from 2.0000 in the first steps", "preview"),
    ],
)
def test_verdict_of_losses(training: list[float], held_out: list[float], begins: str, advice: str) -> None:
    found = verdict(run_of(training, held_out))
    assert found is not None
    assert found.text.startswith(begins)
    assert advice in found.advice
    assert bool(found.advice) == bool(advice)


@pytest.mark.parametrize(
    ("training", "lost", "text"),
    [
        (
            [2.0, 1.0],
            [0],
            "The held-out loss went from 1.5000 (step 1) to 1.4000 (step 2); the one before training",
        ),
        (
            [2.0, 1.0],
            [0, 1],
            "The held-out loss was 1.4000 after step 2; the one before training was not recorded.",
        ),
        ([2.0, 1.0], [1, 2], "The held-out loss was 2.0000 before training; none after it was recorded."),
        ([2.0, 1.0, 0.5], [0], "Overfitted: the held-out loss rose from 1.4000 (step 2) to 1.9000"),
    ],
)
def test_verdict_of_lost_evaluations_says_what_is_known(training: list[float], lost: list[int], text: str) -> None:
    run = run_of(training, [2.0, 1.5, 1.4, 1.9][: len(training) + 1])
    kept = [event for event in run.metrics.evaluations if event["step"] not in lost]
    run = replace(run, metrics=replace(run.metrics, evaluations=kept))
    found = verdict(run)
    assert found.text.startswith(text)
    assert "held-out rows" not in found.text + found.advice
    assert not any("1.5000 before" in line for line in end_lines(run))


def test_verdict_of_a_run_that_max_steps_has_cut_names_that_option() -> None:
    run = run_of([2.0, 1.5], [2.0, 1.6, 1.4], max_steps=2)
    found = verdict(run)
    assert found is not None
    assert found.advice == "Train for longer (--max-steps 4)."


def test_verdict_of_a_run_that_did_not_finish() -> None:
    stopped = run_of([2.0, 1.0], [2.0, 1.0])
    stopped.record.status = "stopped"
    assert verdict(stopped) is None
    assert verdict(run_of([], [2.0])) is None


def test_epoch_losses_are_means_over_tokens() -> None:
    steps = [
        {"epoch": 1, "loss": 1.0, "learned_tokens": 30},
        {"epoch": 1, "loss": 3.0, "learned_tokens": 10},
        {"epoch": 2, "loss": 0.5, "learned_tokens": 5},
    ]
    assert epoch_losses(steps) == {1: 1.5, 2: 0.5}


def test_perplexity_is_short() -> None:
    assert [perplexity(loss) for loss in (0.0, 1.0, 7.0, 800.0)] == ["1.00", "2.72", "1,097", "infinite"]


def test_matches_are_of_rows_that_were_answered_both_times() -> None:
    def answers(right: list[bool]) -> list[dict[str, Any]]:
        return [{"file": "a", "row": n, "is_right": is_right} for n, is_right in enumerate(right)]

    kept = {"row_answers": {"before": answers([True, False, False]), "after": answers([True, True])}}
    assert matches(run_of([1.0], [], kept)) == Matches(before=1, after=2, asked=2, of=10)
    assert matches(run_of([1.0], [], {"row_answers": {"before": answers([True])}})) is None
    assert matches(run_of([1.0], [])) is None


def test_a_run_of_a_few_steps_is_not_called_an_epoch() -> None:
    found = verdict(run_of([1.5], [2.0, 1.2], max_steps=1))
    assert found is not None
    assert found.text == "Learned: the held-out loss fell by 40% in 1 step."
    assert "--max-steps 2" in found.advice


def test_next_commands_have_the_runs_paths() -> None:
    run = run_of([1.0], [], eval_data="held out.csv")
    assert checkpoint(run) == "my runs/one/checkpoint-best"
    assert [command for _, command in next_commands(run, ".venv/bin/handspun")] == [
        ".venv/bin/handspun chat --model 'my runs/one/checkpoint-best'",
        ".venv/bin/handspun eval --model 'my runs/one/checkpoint-best' --data 'held out.csv' --generate",
        ".venv/bin/handspun export --model 'my runs/one/checkpoint-best' --gguf q8_0 --output-dir "
        "'my runs/one/export'",
    ]
    run.record.checkpoints, run.record.best_checkpoint = [], None
    assert next_commands(run) == []


def test_allowed_seconds_are_a_tenth_of_the_steps_within_limits() -> None:
    assert allowed_seconds(600) == 60
    assert allowed_seconds(20) == 30
    assert allowed_seconds(10**6) == 600


@pytest.fixture(scope="module")
def said(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run on short answers says, and its folder."""
    data = tmp_path_factory.mktemp("outcome") / "train.csv"
    data.write_text(SHORT, encoding="utf-8")
    console = quiet_console()
    run = train(config(tiny_folder, data), console=console)
    return printed_to(console), run.output_dir


def test_phases_are_announced_and_the_last_line_is_the_time(said: tuple[str, Path]) -> None:
    lines = [line.strip() for line in said[0].splitlines()]
    announced = [
        "answering 3 prompts with the untrained model ...",
        "counting the untrained model's exact matches on 4 short held-out answers ...",
        "held-out loss",
        "answering 3 prompts with the trained model ...",
        "counting the trained model's exact matches on 4 short held-out answers ...",
        "computing the losses of 20 rows ...",
        "exact matches: ",
        f"report: {said[1] / 'report.html'}",
        f"hardest rows: {said[1] / 'hardest_rows.csv'}",
        "talk to it:",
        f"handspun chat --model {said[1] / 'checkpoint-best'}",
        "finished in ",
    ]
    places = [next(i for i, line in enumerate(lines) if line.startswith(text)) for text in announced]
    assert places == sorted(places)
    assert lines[-1].startswith("finished in ")


def test_sample_prompts_are_three_held_out_rows_with_what_they_expect(said: tuple[str, Path]) -> None:
    run = read_run(said[1])
    held_out = {(one["file"], one["row"]) for one in run.kept["row_answers"]["before"]}
    assert len(held_out) == 4
    assert len(run.kept["prompts"]) == 3
    for prompt in run.kept["prompts"]:
        number = int(prompt["text"].split()[1])
        assert prompt["expected"] == ("no" if number % 2 else "yes")
        assert any(prompt["source"] == f"{file}, row {row}, held out" for file, row in held_out)
    text = "\n".join(end_lines(run))
    assert f"> {run.kept['prompts'][0]['text']}\n  expected  " in text
    assert "\n  before  " in text
    assert "\n  after  " in text
    assert text in said[0]


def test_hardest_rows_are_a_file_that_can_be_trained_on(said: tuple[str, Path], tiny_folder: Path) -> None:
    folder = said[1]
    losses = json.loads((folder / "report_data.json").read_text(encoding="utf-8"))["row_losses"]["train"]
    lines = (folder / "hardest_rows.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "instruction,input,output,file,row"
    worst = [f",{row['file']},{row['row']}" for row in losses["worst"]]
    assert [line[line.index(",", line.index("even?,,") + 7) :] for line in lines[1:11]] == worst
    assert len(lines) == 1 + 10
    said_again = quiet_console()
    again = config(tiny_folder, folder / "hardest_rows.csv", num_epochs=1, eval_ratio=0.0, dry_run=True)
    train(again, console=said_again)
    assert "rows: 10 read, 10 kept, 0 dropped" in printed_to(said_again)


def test_held_out_rows_are_a_file_to_evaluate_on(said: tuple[str, Path]) -> None:
    folder = said[1]
    run = read_run(folder)
    lines = (folder / "held_out_rows.csv").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 4
    command = f"eval --model {folder / 'checkpoint-best'} --data {folder / 'held_out_rows.csv'} --generate"
    assert f"  handspun {command}\n" in said[0]
    scores = score(load(str(folder / "checkpoint-best")), DataConfig(data=str(folder / "held_out_rows.csv")))
    assert scores.loss == pytest.approx(run.metrics.evaluations[-1]["loss"], rel=1e-5)


def test_rows_of_conversations_are_read_again_from_csv(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f'Say {n},\n"please".'},
                {"role": "assistant", "content": str(n)},
            ]
        }
        for n in range(10)
    ]
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run = train(config(tiny_folder, data, num_epochs=1, sample_answers=False), console=quiet_console())
    again = read_rows(str(run.output_dir / "hardest_rows.csv"))
    assert len(again) == 8
    for row in again:
        assert json.loads(row.values["messages"]) == rows[int(row.values["row"]) - 1]["messages"]
    console = quiet_console()
    options = {"eval_data": str(run.output_dir / "held_out_rows.csv"), "eval_ratio": 0.0, "dry_run": True}
    train(config(tiny_folder, run.output_dir / "hardest_rows.csv", **options), console=console)
    assert "rows: 8 read, 8 kept" in printed_to(console)
    assert "rows: 2 read, 2 kept" in printed_to(console)


def test_rows_in_memory_are_written_to_evaluate_on(tiny_folder: Path, tmp_path: Path) -> None:
    rows: Any = [{"prompt": f"Say {n}.", "completion": f"It is {n}."} for n in range(8)]
    made = TrainConfig(
        model=str(tiny_folder),
        data=rows[:6],
        eval_data=rows[6:],
        output_dir=str(tmp_path / "output"),
        num_epochs=1,
    )
    console = quiet_console()
    train(made, console=console)
    written = read_rows(str(tmp_path / "output" / "held_out_rows.csv"))
    assert [row.values["completion"] for row in written] == ["It is 6.", "It is 7."]
    assert f"--data {tmp_path / 'output' / 'held_out_rows.csv'} --generate" in printed_to(console)


def test_an_edited_file_of_hardest_rows_is_the_users(said: tuple[str, Path], tmp_path: Path) -> None:
    for name in ("hardest_rows.csv", "report_data.json", "run.json"):
        shutil.copy(said[1] / name, tmp_path)
    file = tmp_path / "hardest_rows.csv"
    check_no_foreign_files(tmp_path)
    assert file in earlier_run(tmp_path)
    file.write_text(file.read_text(encoding="utf-8").replace("yes", "Yes"), encoding="utf-8")
    with pytest.raises(OutputError, match="did not write.*hardest_rows.csv"):
        check_no_foreign_files(tmp_path)


def test_end_lines_breaks_answers_within_80_columns() -> None:
    answer = {
        "prompt": "Why? " * 40,
        "expected": "Because. " * 40,
        "text": "So it is. " * 40,
        "finish_reason": "stop",
    }
    run = run_of([1.0], [], {name: {"answers": [answer]} for name in ("before", "after")})
    lines = [
        line for line in end_lines(run) if line.startswith(("> ", "  expected", "  before", "  after", " " * 12))
    ]
    assert len(lines) == 7  # one of the prompt, two of each text
    assert {len(line) for line in lines} <= {*range(70, 81)}
