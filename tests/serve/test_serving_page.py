"""docs/serving.md: its commands and programs run as they stand there, against a tiny model.

Clients that are not installed here are run by PYTHON_OF_CLIENTS, the Python of an environment that has them.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from documents import ROOT, files
from handspun.cli import main
from handspun.serve.routes import ENDPOINTS

PAGE = ROOT / "docs" / "serving.md"
TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = re.findall(r"^curl .*$", TEXT, flags=re.MULTILINE)
PROGRAMS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def here(text: str, port: int) -> str:
    return text.replace("127.0.0.1:8000", f"127.0.0.1:{port}")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: re.sub(r".*8000(\S+).*", r"\1", command))
def test_a_command_of_the_page_answers(command: str, product: int) -> None:
    done = subprocess.run(
        [*shlex.split(here(command, product)), "--silent", "--show-error", "--fail-with-body"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if "stream" in command:
        assert done.stdout.endswith("data: [DONE]\n\n")
    elif "metrics" in command:
        assert "handspun_engine_up 1" in done.stdout
    else:
        assert json.loads(done.stdout)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda text: re.search(r"(?:from|import) (\w+)", text)[1])
def test_a_program_of_the_page_answers(program: str, product: int) -> None:
    package = re.search(r"(?:from|import) (\w+)", program)[1]
    python = sys.executable if find_spec(package) is not None else os.environ.get("PYTHON_OF_CLIENTS")
    if python is None:
        pytest.skip(f"{package} is not installed here")
    done = subprocess.run([python, "-c", here(program, product)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "schema" in program:
        assert json.loads(done.stdout[done.stdout.rindex("{") :])["color"] in ("red", "green")


def test_the_page_has_commands_and_programs() -> None:
    assert len(COMMANDS) > 5
    assert len(PROGRAMS) == 3


def test_the_option_file_of_the_page_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [(name, content)] = files(PAGE).items()
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert main(["serve", "--config", str(tmp_path / name), "--max-queue", "-1"]) == 2
    assert capsys.readouterr().err == "error: --max-queue is -1: expected at least 0.\n"


def test_every_path_of_the_table_is_on_the_page() -> None:
    paths = {endpoint.path.replace("/{model:path}", "/NAME") for endpoint in ENDPOINTS}
    assert {path for path in paths if f"`{path}`" not in TEXT and f" {path}`" not in TEXT} == set()
