"""Read text files: encodings, byte order marks, line ends, and a limit on their size."""

import codecs
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from handspun.display import file_name
from handspun.errors import DataError

_CGROUP = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_limit() -> int | None:
    """Return the machine's memory in bytes, or the container's limit if lower; None if unknown."""
    limits = [int(text) for file in _CGROUP if (text := _text(file)).isdigit()]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return min(limits, default=None)


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="ascii").strip()
    except OSError:
        return ""


# Longest first: UTF-32's mark begins with UTF-16's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
BYTE_ORDER_MARK = "\ufeff"
_OTHER_KINDS = {
    b"version https://git-lfs": "this is a Git LFS pointer, not the data. Fetch the data with: git lfs pull",
    b"PAR1": "this is a parquet file. Give it the suffix .parquet.",
    b"PK\x03\x04": "this is a zip archive or an Excel workbook. Unpack it, or save it as CSV UTF-8.",
    b"\xd0\xcf\x11\xe0": "this is an old Excel workbook. Save it as CSV UTF-8.",
    b"\x1f\x8b": "this is a gzip file. Unpack it with gunzip.",
    b"\x28\xb5\x2f\xfd": "this is a zstd file. Unpack it with unzstd.",
    b"\xfd7zXZ": "this is an xz file. Unpack it with unxz.",
    b"BZh": "this is a bzip2 file. Unpack it with bunzip2.",
    b"ARROW1": "this is an Arrow file. Save it as parquet or JSON Lines.",
    b"SQLite format 3": "this is an SQLite database. Export its table as CSV.",
    b"%PDF": "this is a PDF document. Save its text as CSV or JSON Lines.",
}
_WEB_PAGE = re.compile(rb"\s*<(?:!doctype html|html)\b", re.IGNORECASE)
_LINE_END = re.compile(r"\r\n?|\n")
_LINE = re.compile(r"[^\r\n]*+(?:\r\n?|\n)|[^\r\n]++")
# Encodings that can decode anything come last. If none can, the first one is named.
_GUESSED_ENCODINGS = ("windows-1252", "gb18030", "shift_jis", "windows-1251")


def read_text(path: Path) -> str:
    """Return the file's text with its line ends unchanged. Raises DataError, or OSError if it cannot be read."""
    file = file_name(path)
    _check_fits_in_memory(path, file)
    data = path.read_bytes()
    if data:
        check_kind(data[:200], file)
    return decode_text(data, file, path)


def read_text_of_rows(path: Path) -> str:
    """Return the text of a file of rows. Raises DataError if the file is blank."""
    text = read_text(path)
    if not text.strip():
        raise DataError("the file is empty; at least one row is expected.", file=file_name(path))
    return text


def decode_text(data: bytes, name: str, path: Path | None = None) -> str:
    """Return the bytes as text.

    Raises DataError, which names the first invalid byte and how to convert the file.

    Args:
        data: all bytes of the file.
        name: the file's name in messages.
        path: the file's path, for a command that converts it.
    """
    mark = next((mark for mark in _BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    encoding = _BYTE_ORDER_MARKS.get(mark, "utf-8")
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line, column = line_and_column(data[: error.start].decode(encoding, errors="replace"))
        raise DataError(
            f"the byte 0x{data[error.start]:02X} at character {column} of the line (offset "
            f"{error.start + len(mark)}) is not {encoding.upper()}. {_remedy(data, path)}",
            file=name,
            line=line,
        ) from error
    if "\0" in text:
        line, column = line_and_column(text, text.index("\0"))
        raise DataError(
            f"there is a NUL character in the text, at character {column} of the line. If the file is UTF-16 "
            f"without a byte order mark, convert it{_command(path, _utf16_of(data))}; otherwise remove it.",
            file=name,
            line=line,
        )
    return text.lstrip(BYTE_ORDER_MARK)


def split_lines(text: str, start: int = 0) -> Iterator[str]:
    r"""Yield the lines from `start` on, each with its end (`\n`, `\r\n` or `\r`)."""
    # io.StringIO would store the text again, at four bytes per character.
    return (match[0] for match in _LINE.finditer(text, start))


def line_and_column(text: str, position: int | None = None) -> tuple[int, int]:
    """Return the line and column of a position (default: the end of the text), both counted from 1."""
    position = len(text) if position is None else position
    line, start = 1, 0
    for match in _LINE_END.finditer(text, 0, position):
        line, start = line + 1, match.end()
    return line, position - start + 1


def check_kind(head: bytes, file: str, *, but: bytes = b"") -> None:
    """Raise DataError if a file begins like another kind of file than its suffix says."""
    if not head:
        raise DataError("the file is empty; at least one row is expected.", file=file)
    for start, message in _OTHER_KINDS.items():
        if start != but and head.startswith(start):
            raise DataError(message, file=file)
    if _WEB_PAGE.match(head):
        raise DataError(
            "this is a web page, not the data. Download the file itself (on the hub: `download`, or the address "
            "with /resolve/ instead of /blob/).",
            file=file,
        )


def _check_fits_in_memory(path: Path, file: str) -> None:
    """Raise DataError if the file is larger than memory, as a sparse file may be."""
    size, most = path.stat().st_size, memory_limit()
    if most is not None and size > most:
        raise DataError(
            f"the file has {size / 1e9:.0f} GB, but this machine has {most / 1e9:.0f} GB of memory to load its "
            "rows. Split it, or use a part of it.",
            file=file,
        )


def _remedy(data: bytes, path: Path | None) -> str:
    encoding = _utf16_of(data) if b"\0" in data else _guessed_encoding(data)
    return f"Convert it from the encoding that it was saved in to UTF-8, for example{_command(path, encoding)}"


def _guessed_encoding(data: bytes) -> str:
    for encoding in _GUESSED_ENCODINGS:
        try:
            data.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding.upper()
    return _GUESSED_ENCODINGS[0].upper()


def _utf16_of(data: bytes) -> str:
    """Return the UTF-16 encoding with the byte order that the data has."""
    # High bytes of ASCII characters are zero: the second of each pair (LE), or the first (BE).
    return "UTF-16LE" if data[1::2].count(0) >= data[::2].count(0) else "UTF-16BE"


def _command(path: Path | None, encoding: str) -> str:
    if path is None:
        return f" with: iconv -f {encoding} -t UTF-8"
    converted = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return f": iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(converted))}"
