"""Text that others wrote is harmless where it is shown; streams that fail raise one error, or none."""

import io
import json
import os
import pty
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from handspun import display
from handspun.display import (
    HarmlessConsole,
    ProtectedStream,
    UnprintedError,
    captured_log,
    command_here,
    count_of,
    escaped,
    join_names,
    json_line,
    log_lines_to,
    logger,
    prefixed_log,
    print_error_line,
    print_line,
    printable,
    progress,
    protected_streams,
    unfailing,
    visible,
    write_text,
)

ANY_TEXT = st.text(st.characters())  # lone surrogates included
TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def acts(c: str) -> bool:
    """Return whether a character changes more than the cells it is drawn in, by Unicode's own tables."""
    is_control = unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in "\n\t"
    return is_control or unicodedata.bidirectional(c) in TURNS or c in "\u200e\u200f\u061c\u200b\ufeff"


def test_visible_leaves_no_character_that_acts() -> None:
    acting = [c for c in map(chr, range(sys.maxunicode + 1)) if acts(c)]
    assert len(acting) > 2048 + 60
    assert not [c for c in acting if any(map(acts, visible(c)))]


@given(ANY_TEXT)
def test_visible_can_be_encoded_and_keeps_what_is_harmless(text: str) -> None:
    seen = visible(text)
    seen.encode("utf-8")
    assert visible(seen) == seen
    harmless = "".join(c for c in text if ord(c) not in display.VISIBLE)
    assert visible(harmless) == harmless


def test_visible_shows_what_was_there() -> None:
    assert visible("a\x1b[2Jb\x7f\x9b31m\u202ec\ud800") == "a␛[2Jb␡[U+009B]31m[U+202E]c[U+D800]"
    for kept in ("a\tb\n", "👩‍👩‍👧", "می‌خواهم", "क्‍ष", "❤️", "🏴\U000e0067\U000e007f"):
        assert visible(kept) == kept


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m.csv", "x\u202ey", "bad\udcff", "zero\u200bwidth", "a\x85b"])
def test_printable_is_one_line_of_printable_characters(name: str) -> None:
    assert printable(name).isprintable()
    assert escaped(name).encode().decode("unicode_escape").encode("utf-16", "surrogatepass") == name.encode(
        "utf-16", "surrogatepass"
    )


def test_join_names_cuts_both_ways() -> None:
    assert join_names(["a", "b\x07"]) == r"a, b\x07"
    assert join_names(list("abcd"), most=2) == "a, b and 2 more"
    assert join_names(["x" * 70]) == "x" * 60 + "… (70 characters)"


@given(ANY_TEXT)
def test_json_line_reads_back_and_acts_on_no_terminal(text: str) -> None:
    line = json_line({"text": text})
    assert json.loads(line) == {"text": text}
    assert visible(line) == line


def test_json_line_is_ascii_where_the_console_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    assert json_line({"text": "é👧"}) == r'{"text": "\u00e9\ud83d\udc67"}'


def printed(*things: object, width: int = 60) -> str:
    stream = io.StringIO()
    console = HarmlessConsole(file=stream, width=width, force_terminal=True, color_system=None)
    console.print(*things, soft_wrap=True)
    return stream.getvalue()


@pytest.mark.parametrize("raw", ["\x1b[2J", "\x9b2J", "\u202e", "\x1b]8;;http://x\x1b\\"])
def test_a_console_shows_escapes_wherever_they_stand(raw: str) -> None:
    table = Table("name")
    table.add_column(Text(f"head{raw}"))
    table.add_row(f"cell{raw}", Text(f"text{raw}", style="bold"))
    for thing in (
        f"line{raw}",
        Text(f"text{raw}", "red"),
        table,
        Rule(f"r{raw}"),
        Panel(f"p{raw}", title=Text(raw)),
    ):
        out = printed(thing)
        assert raw not in out
        assert not [c for c in out if acts(c)]


def test_a_console_keeps_styles_beside_a_replaced_character() -> None:
    stream = io.StringIO()
    HarmlessConsole(file=stream, force_terminal=True, color_system="standard").print(
        Text.assemble("a\x1bb", ("red", "red"))
    )
    assert stream.getvalue() == "a␛b\x1b[31mred\x1b[0m\n"


def test_markup_and_emoji_codes_stay_text() -> None:
    table = Table.grid()
    table.add_row("[link=x]cell[/link] :smile:")
    assert printed("[bold]a[/] :smile: [/nothing]") == "[bold]a[/] :smile: [/nothing]\n"
    assert printed(table).rstrip() == "[link=x]cell[/link] :smile:"


@contextmanager
def terminal() -> Iterator[tuple[TextIO, int]]:
    """Yield (a stream that is a real terminal, the descriptor that what it shows can be read from)."""
    shown, device = pty.openpty()
    stream = os.fdopen(device, "w", encoding="utf-8")
    try:
        yield stream, shown
    finally:
        stream.close()
        os.close(shown)


def test_write_text_is_exact_in_a_file_and_harmless_on_a_terminal(tmp_path: Path) -> None:
    text = "a\tb\r\x1b[2J\x07 [bold]x[/] :smile: \u202e"
    with (tmp_path / "answer").open("w", encoding="utf-8", newline="") as file:
        write_text(HarmlessConsole(file=file), text)
    assert (tmp_path / "answer").read_bytes() == f"{text}\n".encode()
    with terminal() as (stream, shown):
        write_text(HarmlessConsole(file=stream), "a\x1b[2J [bold]x[/]")
        assert os.read(shown, 1000).decode() == "a␛[2J [bold]x[/]\r\n"


def closed_pipe() -> TextIO:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def closed_file() -> TextIO:
    file = Path(os.devnull).open("w")  # noqa: SIM115
    file.close()
    return file


FAILING = {
    "reader gone": closed_pipe,
    "full": lambda: Path("/dev/full").open("w"),  # noqa: SIM115
    "closed at the start": lambda: None,
    "closed since": closed_file,
}


@pytest.fixture(params=FAILING)
def failing(request: pytest.FixtureRequest) -> Iterator[TextIO | None]:
    stream = FAILING[request.param]()
    yield stream
    try:
        if stream is not None:
            stream.close()
    except OSError:  # what it could not write is still in its buffer
        pass


def test_an_unfailing_stream_ignores_every_failure(failing: TextIO | None) -> None:
    stream = unfailing(failing)
    assert stream.write("a\n") == 2
    stream.flush()
    assert not stream.isatty()
    HarmlessConsole(file=stream).print("b")


def test_a_protected_stream_raises_one_error(failing: TextIO | None, request: pytest.FixtureRequest) -> None:
    stream = ProtectedStream(failing, "standard output", is_ignored=False)
    with pytest.raises(UnprintedError, match="^standard output cannot be written: .+ is lost.$") as raised:
        print("a", file=stream, flush=True)
    assert raised.value.is_unread == ("reader gone" in request.node.name)


def test_error_lines_that_cannot_be_printed_go_nowhere(
    failing: TextIO | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`print(..., file=None)` would print them on standard output, among the answers."""
    monkeypatch.setattr(sys, "stderr", failing)
    print_error_line("error")
    assert capsys.readouterr().out == ""


def test_a_narrow_encoding_gets_escapes_and_our_own_signs_in_ascii() -> None:
    buffer = io.BytesIO()
    stream = unfailing(io.TextIOWrapper(buffer, encoding="ascii"))
    stream.write("⟦Привет⟧ …\n")
    stream.flush()
    assert buffer.getvalue() == rb"[[\u041f\u0440\u0438\u0432\u0435\u0442]] ..." + b"\n"


def test_protected_streams_are_put_back(failing: TextIO | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", failing)
    with pytest.raises(UnprintedError), protected_streams():
        print("a")
    assert sys.stdout is failing


def test_log_lines_appear_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    logger.info("5 %s rows\x1b[2J")
    assert capsys.readouterr() == ("", "5 %s rows␛[2J\n")


def test_log_lines_appear_once_if_a_program_shows_them_itself(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    with log_lines_to(lines.append):
        logger.info("a")
    logger.info("b")
    assert (lines, capsys.readouterr().err) == (["a"], "b\n")


def test_log_lines_that_cannot_be_printed_end_nothing(
    failing: TextIO | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", failing)
    logger.info("a")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("before", "shown"),
    [
        ("", "info\nwarning\n"),
        ("logging.basicConfig()", "info\nwarning\n"),
        ("logging.getLogger('handspun').setLevel(logging.WARNING)", "warning\n"),
        ("logging.getLogger('handspun').addHandler(logging.NullHandler())", ""),
    ],
)
@pytest.mark.parametrize("is_before_the_import", [True, False])
def test_a_program_that_configures_the_log_has_its_way(
    before: str, shown: str, is_before_the_import: bool
) -> None:
    steps = [before, "from handspun.display import logger"]
    lines = ["import logging", *(steps if is_before_the_import else reversed(steps))]
    code = "\n".join([*lines, "logger.info('info')", "logger.warning('warning')"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", shown)


def test_the_innermost_block_has_the_log_lines() -> None:
    with captured_log() as outer:
        with captured_log() as inner:
            logger.info("a")
        with prefixed_log("tiny: "):
            logger.info("b")
    assert (inner, outer) == (["a"], ["tiny: b"])


def test_captured_log_has_the_lines_of_its_own_thread(capsys: pytest.CaptureFixture[str]) -> None:
    with captured_log() as lines:
        logger.info("here")
        other = threading.Thread(target=logger.info, args=("there",))
        other.start()
        other.join()
    logger.info("later")
    assert (lines, capsys.readouterr().err) == (["here"], "there\nlater\n")


def test_command_here_is_a_path_where_the_shell_finds_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / ".venv" / "bin" / "handspun"
    own.parent.mkdir(parents=True)
    own.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(own)])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert command_here() == ".venv/bin/handspun"
    monkeypatch.setenv("PATH", str(own.parent))
    assert command_here() == "handspun"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(tmp_path / "train_inference.py")])
    assert command_here() == "handspun"
    monkeypatch.setattr("sys.argv", [str(own)])
    monkeypatch.chdir("/")
    assert command_here() in (str(own), str(own.relative_to("/")))


def test_count_of() -> None:
    assert [count_of(number, "epoch") for number in (0, 1, 2, 1234)] == [
        "0 epochs", "1 epoch", "2 epochs", "1,234 epochs",
    ]  # fmt: skip


def test_progress_without_a_terminal_is_a_line_every_ten_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 4.0, 11.0, 11.0, 15.0, 30.0])
    with progress("answering 1,200 prompts", 1200, clock=times.__next__) as on_done:
        for done in (100, 1100, 1150, 1200):
            on_done(done)
    assert capsys.readouterr().err == "answering 1,200 prompts ...\n  1,100 of 1,200\n"


def test_print_line_breaks_between_words_on_a_terminal_alone() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    printed = []
    for stream in (Terminal(), io.StringIO()):
        print_line(HarmlessConsole(file=stream, width=12, color_system=None), "some [bold] words")
        printed.append(stream.getvalue())
    assert printed == ["some [bold] \nwords\n", "some [bold] words\n"]
