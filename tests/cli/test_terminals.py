"""Commands whose output is a terminal, a closed or full stream, a narrow console, or a reader that goes away."""

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import pytest

import handspun
from handspun.cli import main

ROWS = "instruction,input,output\n" + "".join(f"Say {n}.,,It is {n} ⟦x⟧ 👧.\n" for n in range(4))
RAW = "\x1b[2J\x9b31m [bold]x[/]"
"""What a model must not do to a terminal."""


class Terminal:
    """A real terminal of 100 columns as standard output, and what it was sent."""

    def __init__(self) -> None:
        self._shown, device = pty.openpty()
        self.stream = os.fdopen(device, "w", encoding="utf-8")
        self._sent = b""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        with suppress(OSError):  # the other end is closed
            while part := os.read(self._shown, 4096):
                self._sent += part

    def close(self) -> str:
        """Return all that was sent."""
        self.stream.close()
        self._reader.join()
        os.close(self._shown)
        return self._sent.decode()


def shown_by(monkeypatch: pytest.MonkeyPatch, command: Callable[[], object]) -> str:
    """Return what a command sends to a terminal."""
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    try:
        command()
    finally:
        sent = terminal.close()
    return sent


ANSWERS = {
    "generate": [],
    "several prompts": ["Again?"],
    "explained": ["--explain"],
    "json": ["--json"],
    "beams": ["--num-beams", "2", "--show-tree"],
}


@pytest.mark.parametrize("case", ANSWERS)
def test_answers_do_not_act_on_a_terminal(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    arguments = ["generate", "--model", str(tiny_folder), "--choice", RAW, f"Hi {RAW}", *ANSWERS[case]]
    sent = shown_by(monkeypatch, lambda: main(arguments))
    assert "[2J" in sent
    assert "[bold]x[/]" in sent.replace("\r\n", "") or case == "explained"
    assert "\x1b[2J" not in sent
    assert "\x9b" not in sent


def test_an_answer_in_a_file_is_what_the_model_wrote(tiny_folder: Path, tmp_path: Path) -> None:
    answer = f"a\tb{RAW} :smile:"
    with (tmp_path / "answer").open("w", encoding="utf-8") as file, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        assert main(["generate", "--model", str(tiny_folder), "--choice", answer, "Hi"]) == 0
    assert (tmp_path / "answer").read_text(encoding="utf-8") == f"{answer}\n"


def test_names_and_errors_do_not_act_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RAW.replace("/", "")).mkdir()
    for name in (RAW.replace("/", ""), f"no{RAW}", "\u202egnp.csv"):
        assert main(["generate", "--model", str(tmp_path / name), "Hi"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert not {"\x1b", "\x9b", "\u202e"} & set(error)


def gone() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


STREAMS: dict[str, Callable[[], TextIO | None]] = {
    "reader gone": gone,
    "full": lambda: Path("/dev/full").open("w"),  # noqa: SIM115
    "closed": lambda: None,
    "ascii": lambda: Path(os.devnull).open("w", encoding="ascii"),  # noqa: SIM115
}


@contextmanager
def standard(name: str, stream: TextIO | None) -> Iterator[None]:
    """Within the block, a standard stream is another."""
    before = getattr(sys, name)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        setattr(sys, name, before)
        with suppress(OSError):  # what could not be written is still in its buffer
            if stream is not None:
                stream.close()


@pytest.mark.parametrize("case", STREAMS)
def test_a_run_does_not_end_by_its_own_printing(tiny_folder: Path, tmp_path: Path, case: str) -> None:
    (tmp_path / "train.csv").write_text(ROWS, encoding="utf-8")
    config = handspun.TrainConfig(
        model=str(tiny_folder), data=str(tmp_path / "train.csv"), output_dir=str(tmp_path / "output"),
        num_epochs=1, dtype="float32", sample_answers=False, report_rows=0,
    )  # fmt: skip
    with standard("stdout", STREAMS[case]()), standard("stderr", STREAMS[case]()):
        handspun.train(config)
    log = (tmp_path / "output" / "train.log").read_text(encoding="utf-8")
    assert "report: " in log
    assert log.splitlines()[-1][9:].startswith("finished in ")


def test_a_run_of_the_command_line_ends_with_its_own_exit_code(tiny_folder: Path, tmp_path: Path) -> None:
    """Its log on a full disk is no failure; an output folder that is taken is."""
    (tmp_path / "train.csv").write_text(ROWS, encoding="utf-8")
    arguments = ["train", "--model", str(tiny_folder), "--data", str(tmp_path / "train.csv"), "--dtype", "float32"]
    arguments += ["--output-dir", str(tmp_path / "output"), "--num-epochs", "1", "--no-sample-answers"]
    for expected in (0, 2):
        with standard("stdout", STREAMS["full"]()), standard("stderr", STREAMS["full"]()):
            assert main(arguments) == expected


@pytest.mark.parametrize("command", ["generate", "preview", "preflight"])
@pytest.mark.parametrize(("case", "code"), [("reader gone", 0), ("full", 2), ("closed", 2), ("ascii", 0)])
def test_an_answer_that_cannot_be_printed_is_an_error_unless_nobody_reads_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, case: str, code: int
) -> None:
    (tmp_path / "train.csv").write_text(ROWS, encoding="utf-8")
    arguments = {
        "generate": ["--choice", "👧", "Hi"],
        "preview": ["--data", str(tmp_path / "train.csv")],
        "preflight": ["--data", str(tmp_path / "train.csv"), "--dtype", "float32"],
    }[command]
    with standard("stdout", STREAMS[case]()):
        assert main([command, "--model", str(tiny_folder), *arguments]) == code
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == (code == 2)
    assert not errors or errors[0].startswith("error: standard output cannot be written: ")


SHELL = {  # of processes: what Python does when it ends is part of it
    "--version >/dev/full": 2,
    "--help >&-": 2,
    "--version 2>&- >/dev/null": 0,
    "train --num-epochs x 2>/dev/full": 2,
    "train --num-epochs x <&- >&- 2>&-": 2,
    "train --help | head -1": 0,
}


@pytest.mark.parametrize("line", SHELL)
def test_exit_codes_of_processes(line: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m handspun {line}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == SHELL[line]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_closed_stream_gives_its_number_to_no_file(tmp_path: Path) -> None:
    """What C libraries print on 1 and 2 would be written into the next file that is opened."""
    code = (
        "import os; from handspun.display import open_missing_streams; open_missing_streams()\n"
        f"file = open({str(tmp_path / 'file')!r}, 'w'); file.write(str(file.fileno())); os.system('echo no')"
    )
    subprocess.run(["bash", "-c", f"{sys.executable} - >&- 2>&-"], input=code, text=True, timeout=60, check=False)
    assert int((tmp_path / "file").read_text()) > 2
