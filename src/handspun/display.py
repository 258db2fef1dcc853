"""Text for a terminal: printable characters, lists of names, durations, the log, and streams that may close."""

import errno
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from handspun.errors import OutputError

_INVISIBLE = [
    *range(0x80, 0xA0),  # C1 controls: U+009B alone begins an escape sequence
    *(0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)),  # change the direction of text
    *(0x180E, 0x200B, *range(0x2060, 0x2066), *range(0x206A, 0x2070), 0xFEFF),  # zero width
    *(0x2028, 0x2029, *range(0xFFF9, 0xFFFC)),  # separators and annotations
    *range(0xD800, 0xE000),  # lone surrogates, which no encoding supports
]
# Not included: U+200C, U+200D, variation selectors and tags, which Persian, Hindi and emoji need.

VISIBLE = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: "\u2421",
    **{code: f"[U+{code:04X}]" for code in _INVISIBLE},
}
"""For `str.translate`: control characters as Unicode's pictures of them (␛), others as their codes."""

_OURS_IN_ASCII = str.maketrans(
    {**dict(zip("⟦⟧…→█", ("[[", "]]", "...", "->", "#"), strict=True)), **dict(zip("─└├│", "-`||", strict=True))}
)
"""ASCII replacements for characters in our own messages, for a console without Unicode."""

_ONE_FOR_ONE = {code: seen if len(seen) == 1 else "\ufffd" for code, seen in VISIBLE.items()}
_ACTS = re.compile(f"[{re.escape(''.join(map(chr, VISIBLE)))}]")


def visible(text: str) -> str:
    """Return the text with control characters made visible, so that they cannot act on a terminal."""
    return text.translate(VISIBLE)


def escaped(text: str) -> str:
    """Return the text with Python escapes for unprintable characters, including line breaks."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable(name: str, *, most: int = 60) -> str:
    """Return a name on one line, cut after `most` characters, with escapes for unprintable characters."""
    cut = name if len(name) <= most else f"{name[:most]}… ({len(name)} characters)"
    return escaped(cut)


def join_names(names: Collection[str], *, most: int = 20) -> str:
    """Return the names as a list: `a, b, c and 4 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(printable(name) for name in islice(names, most)) + more


def json_line(record: Any, *, allow_nan: bool = True) -> str:
    """Return the record as one line of JSON that is safe to print.

    Characters that would act on a terminal, or cannot be encoded, are escaped. A parser reads the same values.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    text = json.dumps(record, ensure_ascii=not is_unicode(encoding), allow_nan=allow_nan)
    return _ACTS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def is_unicode(encoding: str) -> bool:
    """Return whether an encoding covers all of Unicode."""
    return encoding.lower().startswith("utf")


class HarmlessConsole(Console):
    """A rich console that ignores escapes, markup and emoji codes in the text it prints."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Return the string as a Text with control characters made visible."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments. Each character of a Text is replaced by exactly one, so that its styles still fit."""
        if isinstance(renderable, Text) and _ACTS.search(renderable.plain):
            renderable = renderable.copy()
            renderable.plain = renderable.plain.translate(_ONE_FOR_ONE)
        return super().render(renderable, options)


def write_text(console: Console, text: str, *, end: str = "\n") -> None:
    """Print a model's text: unchanged to a file or a pipe, and with control characters visible on a terminal."""
    if is_terminal(console.file):
        console.print(visible(text), end=end, markup=False, emoji=False, soft_wrap=True)
    else:
        console.file.write(text + end)
        console.file.flush()


def print_line(console: Console, line: str) -> None:
    """Print a line, broken between words on a terminal, and whole in a file or a pipe."""
    console.print(line, markup=False, soft_wrap=not is_terminal(console.file))


def unfailing(stream: IO[str] | None) -> TextIO:
    """Return the stream with write failures ignored. A run's log continues in train.log."""
    return cast(TextIO, ProtectedStream(stream, "the output", is_ignored=True))


def is_terminal(stream: IO[str] | None) -> bool:
    """Return whether the stream is an open terminal."""
    return unfailing(stream).isatty()


def print_error_line(text: str) -> None:
    """Print a line on standard error. A failure to print it is ignored."""
    print(visible(text), file=unfailing(sys.stderr), flush=True)


logger = logging.getLogger("handspun")
"""The log. Its lines appear on standard error, unless it has other handlers: a run's, or a user's own."""


class _StandardErrorHandler(logging.Handler):
    """Prints the log's lines on standard error while the log has no other handler."""

    def emit(self, record: logging.LogRecord) -> None:
        if logger.handlers == [self]:
            print_error_line(record.getMessage())


if not logger.handlers:  # else the user's own handlers are enough
    logger.addHandler(_StandardErrorHandler())
    logger.propagate = False  # a handler of the root logger would print each line again
if logger.level == logging.NOTSET:
    logger.setLevel(logging.INFO)  # the root logger's level would hide all but warnings


@contextmanager
def log_lines_to(show: Callable[[str], None]) -> Iterator[None]:
    """Within the block, call a function with each line of the log instead of printing it."""
    handler = logging.Handler()
    handler.emit = lambda record: show(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(
    text: str, total: int, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Log that work begins, and yield a function to call with the number of things done.

    On a terminal, standard error shows a bar meanwhile; elsewhere there is a line every ten seconds.
    """
    logger.info(f"{text} ...")
    console = HarmlessConsole(stderr=True)
    if console.is_interactive and is_terminal(sys.stderr):
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            console.show_cursor(True)  # a process that is killed could not bring it back
            yield lambda done: bar.update(task, completed=done)
        return
    logged_at = clock()

    def on_done(done: int) -> None:
        nonlocal logged_at
        if clock() - logged_at >= _SECONDS_BETWEEN_LINES and done < total:
            logged_at = clock()
            logger.info(f"  {done:,} of {total:,}")

    yield on_done


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Within the block, collect this thread's log lines instead of showing them."""
    lines = list[str]()

    def capture(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return False

    with _filtered_log(capture):
        yield lines


@contextmanager
def prefixed_log(prefix: str) -> Iterator[None]:
    """Within the block, begin this thread's log lines with the prefix."""

    def add_prefix(record: logging.LogRecord) -> bool:
        record.msg, record.args = prefix + record.getMessage(), ()
        return True

    with _filtered_log(add_prefix):
        yield


@contextmanager
def _filtered_log(accepts: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    thread = threading.get_ident()

    def of_this_thread(record: logging.LogRecord) -> bool:
        return record.thread != thread or accepts(record)

    logger.filters.insert(0, of_this_thread)  # the innermost block's filter is the first
    try:
        yield
    finally:
        logger.removeFilter(of_this_thread)


class UnprintedError(OutputError):
    """Standard output could not be written. is_unread: only because its reader has closed, which is no error."""

    def __init__(self, name: str, error: OSError | ValueError | None) -> None:
        self.is_unread = isinstance(error, OSError) and error.errno in (errno.EPIPE, errno.ECONNRESET)
        reason = (error.strerror if isinstance(error, OSError) else str(error or "")) or "it is closed"
        super().__init__(f"{name} cannot be written: {reason}. The output is lost.")


class ProtectedStream:
    """A standard stream (None if closed) whose failures raise UnprintedError, or are ignored.

    Characters that its encoding lacks are written as backslash escapes.
    """

    def __init__(self, stream: "IO[str] | ProtectedStream | None", name: str, *, is_ignored: bool) -> None:
        self._outer = stream if isinstance(stream, ProtectedStream) else None
        self._stream: IO[str] | None = stream._stream if isinstance(stream, ProtectedStream) else stream
        self._name, self._is_ignored = name, is_ignored

    @property
    def encoding(self) -> str:
        """The stream's encoding."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        """Write a text and return its length."""
        if self._stream is None:
            return self._fail(None) or len(text)
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                ours = text.translate(_OURS_IN_ASCII)
                self._stream.write(ours.encode(self.encoding, "backslashreplace").decode(self.encoding))
        except (OSError, ValueError) as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream's buffer."""
        if self._stream is None:
            return
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def isatty(self) -> bool:
        """Return whether the stream is an open terminal."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def _fail(self, error: OSError | ValueError | None) -> int:
        if not self._is_ignored:
            raise UnprintedError(self._name, error)
        if self._outer is not None:  # the text is still in the buffer, and would fail again
            self._outer._is_ignored = True
        return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def protected_streams() -> Iterator[None]:
    """Within the block, raise UnprintedError for failures of standard output, and ignore standard error's."""
    output, errors = sys.stdout, sys.stderr
    guarded = ProtectedStream(output, "standard output", is_ignored=False)
    sys.stdout = cast(TextIO, guarded)
    sys.stderr = unfailing(errors)
    try:
        yield
        guarded.flush()
    finally:
        sys.stdout, sys.stderr = output, errors


def open_missing_streams() -> None:
    """Occupy the file descriptors 0, 1 and 2 if they are closed.

    Otherwise the next opened file would get such a number, and C libraries would print into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(
                os.devnull, os.O_RDONLY if number else os.O_WRONLY
            )  # writing to it (or reading from it) still fails
            os.set_inheritable(opened, True)
    if sys.stdin is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  (stays open as long as the process)


def abandon_unwritten() -> None:
    """Drop output that a full or closed stream did not accept, so that Python does not fail on it at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def file_name(path: Path) -> str:
    """Return the path as a user would type it, with escapes for unprintable characters."""
    return printable(str(path), most=4096)


def describe_type(value: Any) -> str:
    """Return the type of a value in JSON's terms, for messages."""
    if isinstance(value, float) and value != value:
        return "NaN (pandas writes it for a missing cell, and for the words N/A and None)"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int | float):
        return f"the number {printable(str(value))}"
    names: dict[type, str] = {str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def duration(seconds: float) -> str:
    """Return a duration as `8s`, `3m07s` or `2h05m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def count_of(number: int, noun: str) -> str:
    """Return `1 row` or `1,234 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def command_here() -> str:
    """Return what to type in this shell for `handspun`: its path if the shell would not find this one."""
    own, found = Path(sys.argv[0]), shutil.which("handspun")
    if own.name != "handspun" or (found and Path(found).resolve() == own.resolve()):
        return "handspun"
    return os.path.relpath(own) if own.is_relative_to(Path.cwd()) else str(own)
