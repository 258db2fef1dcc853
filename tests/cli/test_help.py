"""The help pages: every option is in one group, commands stand in the order of work, texts fill the window."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from handspun.cli.app import app
from handspun.cli.entry import expand_aliases, expand_commands
from handspun.cli.views.help import COMMANDS, EXAMPLES, GROUPS, groups_of


def options_of(command: str) -> list[str]:
    collection = app[command].assemble_argument_collection()
    return [argument.name.removeprefix("--").lower() for argument in collection if argument.show]


@pytest.mark.parametrize("command", COMMANDS)
def test_groups_of_has_each_option_of_a_command_once(command: str) -> None:
    names = options_of(command)
    listed = [name for group in groups_of(names).values() for name in group]
    assert sorted(listed) == sorted(names)
    assert names


def test_groups_of_names_options_that_exist() -> None:
    known = {name for command in COMMANDS for name in options_of(command)}
    assert {name for listed in GROUPS.values() for name in listed.split()} | {
        "batch-size",
        "seed",
        "max-tokens",
    } == known


def test_groups_of_an_option_without_a_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="no group of the help has speed"):
        groups_of(["speed", "model"])


def test_commands_are_all_there() -> None:
    assert set(COMMANDS) == {name for name in app if not name.startswith("-")}


def test_help_shows_groups_in_order_and_wraps_at_the_window() -> None:
    """--weights' docstring ends its first line after "float16", or": no line of the page may end there."""
    command = [sys.executable, "-m", "handspun", "chat", "--help"]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    page = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    titles = [line.split()[1] for line in page.splitlines() if line.startswith("╭─")]
    assert titles[:5] == ["Arguments", "Prompts", "Model", "Length", "Sampling"]
    assert page.index("--model STR") < page.index("--device STR")
    text = " ".join(line.strip("│ ") for line in page.splitlines())
    assert '"float16", or "int8" (a third' in " ".join(text.split())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("generate", r"--choice STR .*Constrain answers to one of these texts\. Repeatable\."),
        ("train", "--data STR --no-data .*Training rows"),
    ],
)
def test_help_shows_repeatable_options_without_dots(command: str, expected: str) -> None:
    """`--choice STR...` would invite several values after one option, which become prompts."""
    arguments = [sys.executable, "-m", "handspun", "help", command]
    environment = {**os.environ, "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
    page = subprocess.run(arguments, capture_output=True, text=True, check=True, env=environment).stdout
    assert re.search(expected, page)
    assert "..." not in page.replace("[ARGS...]", "")


def test_examples_of_the_help_are_commands_that_can_be_parsed() -> None:
    examples = [shlex.split(example) for listed in EXAMPLES.values() for example in listed]
    for arguments in examples:
        given = [one for one in arguments if one not in ("--config", "run.yaml")]
        app.parse_args(expand_aliases(expand_commands(given)), exit_on_error=False, print_error=False)
    assert len(examples) > 10


def test_help_ends_with_examples_on_lines_of_their_own() -> None:
    command = [sys.executable, "-m", "handspun", "train", "--help"]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    page = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    end = page[page.index("Examples:") :].splitlines()
    assert [line.rstrip() for line in end[1:4]] == [f"  handspun {example}" for example in EXAMPLES["train"]]
    assert "--traceback" in page[page.index("Examples:") :]
