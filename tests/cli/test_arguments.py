# ruff: noqa: E501  (a table)
"""Arguments without an option's name, and what is said of those that are wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from handspun import __version__
from handspun.cli import main
from small_runs import ROWS


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Return the lines of an error, without the hint to --help."""
    assert main(arguments) == 2
    lines = capsys.readouterr().err.removeprefix("error: ").splitlines()
    return [line for line in lines if not line.startswith("See handspun ")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tickets.csv").write_text(ROWS, encoding="utf-8")


@pytest.mark.parametrize("command", ["preview", "preflight", "eval"])
def test_rows_need_no_option_name(capsys: pytest.CaptureFixture[str], tiny_folder: Path, command: str) -> None:
    assert main([command, "--no-strict", "tickets.csv", "--model", str(tiny_folder)]) == 0
    assert "rows: 20 read, 20 kept" in capsys.readouterr().out


def test_export_and_chat_take_a_model_without_an_option_name(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["export", str(tiny_folder), "--merge", "--output-dir", "merged"]) == 0
    assert Path("merged/config.json").exists()
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    assert main(["chat", "merged"]) == 0


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["train"], ["no rows are named, and there is no train.csv here. Name a file, as in handspun train tickets.csv."]),
        (["eval", "a.csv", "--data", "b.csv"], ["a.csv and --data b.csv both name rows. Use one of them."]),
        (["chat", "a", "--model", "b"], ["a and --model b both name a model. Use one of them."]),
        (["compare", "a"], ["a model is missing. Usage: handspun compare MODEL_A MODEL_B [OPTIONS]."]),
        (["export"], ["--model is missing. Usage: handspun export MODEL [OPTIONS]."]),
        (["train", "--data"], ["--data has no value. Write one after it."]),
        (["demo", "x"], ["x: no option, and demo takes no such argument. Write a value right after its option."]),
        (["generate", "smollm2-135m", "Hi"], ["smollm2-135m is a model, not a prompt: write -m before it, as in -m smollm2-135m."]),
        (["train", "--foo", "--epochs", "a"], ["there is no option --foo.", "--num-epochs is 'a': expected a whole number."]),
        (["train", "--lora-r=4", "--prompt", "x"], ["there is no option --lora-r. Here it is --lora-rank.", "there is no option --prompt. Here it is --sample-prompts."]),
    ],
)  # fmt: skip
def test_wrong_arguments_are_told_what_to_write(
    capsys: pytest.CaptureFixture[str], arguments: list[str], lines: list[str]
) -> None:
    assert told(capsys, *arguments) == lines


def test_a_misspelt_command_is_told_all_commands_in_the_order_of_work(capsys: pytest.CaptureFixture[str]) -> None:
    [line] = told(capsys, "trian")
    assert line.startswith(
        "there is no command trian. Did you mean train? Commands: demo, preview, preflight, train,"
    )
    assert line.endswith("verify, verify-resume.")


def test_help_is_a_word_and_v_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "export"]) == 0
    assert "Usage: handspun export" in capsys.readouterr().out
    assert main(["-V"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_is_installed_by_one_command(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    environment.pop("XDG_DATA_HOME", None)
    command = [sys.executable, "-m", "handspun", "--install-completion"]
    assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
    asked = (
        'source ~/.bashrc; COMP_WORDS=(handspun train --lora-r); COMP_CWORD=2; _handspun; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", asked], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "--lora-rank\n"
