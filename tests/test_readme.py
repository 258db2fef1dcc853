"""The commands in README.md run as they stand there, and those in docs/ have options that exist."""

import re
import shlex
from pathlib import Path

import pytest

from handspun.cli import main
from handspun.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROWS = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n}.\n" for n in range(10))


def commands(page: Path) -> list[list[str]]:
    """Lines of a page's code blocks that begin with `handspun`, continued lines joined."""
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    blocks += re.findall(r"^(?: {4}.*\n)+", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"handspun [a-z]", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_have_options_that_exist(page: Path) -> None:
    for arguments in commands(page):
        app.parse_args(arguments, exit_on_error=False, print_error=False)


@pytest.mark.embedded
def test_the_readme_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, in a folder with rows and prompts alone; the hub's model is the embedded one here."""
    monkeypatch.chdir(tmp_path)
    Path("train.csv").write_text(ROWS, encoding="utf-8")
    Path("held_out.csv").write_text(ROWS, encoding="utf-8")
    Path("prompts.txt").write_text("Say 3.\n", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "/quit")
    found = commands(ROOT / "README.md")
    assert len(found) >= 5
    for arguments in found:
        if arguments[0] == "demo":
            continue  # minutes; `make demo` is this command
        tokens = ["--max-new-tokens", "8"]
        shorter = dict.fromkeys(("generate", "eval", "compare", "verify"), tokens) | {
            "train": ["--no-sample-answers"]
        }
        given = [argument.replace("Qwen/Qwen2.5-0.5B", "smollm2-135m") for argument in arguments]
        assert main([*given, *shorter.get(arguments[0], [])]) == 0, arguments
        capsys.readouterr()
