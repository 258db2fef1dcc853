"""A file's bytes to text: which encoding, and what to do if it is no text."""

import codecs
import shlex
from pathlib import Path

from handspun.data.memory_limit import memory_limit
from handspun.data.naming import file_name
from handspun.errors import DataError

# Longest first: UTF-32's mark begins with UTF-16's.
_BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_OTHER_KINDS = {
    b"version https://git-lfs": "this is a Git LFS pointer, not the data. Fetch the data with: git lfs pull",
    b"PAR1": "this is a parquet file. Give it the suffix .parquet.",
    b"PK\x03\x04": "this is a zip archive or an Excel workbook. Unpack it, or save it as CSV UTF-8.",
    b"\x1f\x8b": "this is a gzip file. Unpack it with gunzip.",
    b"\x28\xb5\x2f\xfd": "this is a zstd file. Unpack it with unzstd.",
}


def read_text(path: Path) -> str:
    """The file as text: UTF-8, or UTF-16 and UTF-32 with a byte order mark. Line ends stay as they are."""
    file = file_name(path)
    _refuse_if_larger_than_memory(path, file)
    data = path.read_bytes()
    check_kind(data[:32], file)
    mark = next((mark for mark in _BYTE_ORDER_MARKS if data.startswith(mark)), b"")
    encoding = _BYTE_ORDER_MARKS.get(mark, "utf-8")
    data = data[len(mark) :]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(
            f"the byte 0x{data[error.start]:02X} at offset {error.start + len(mark)} is not {encoding.upper()}. "
            f"Convert the file from the encoding it was saved in, for example: {_iconv(path, 'WINDOWS-1252')}",
            file=file,
            line=data[: error.start].decode(encoding, errors="replace").count("\n") + 1,
        ) from error
    if "\0" in text:
        raise DataError(
            "there is a NUL character in the text. If the file is UTF-16 without a byte order mark, convert it: "
            f"{_iconv(path, 'UTF-16LE')}; otherwise remove it.",
            file=file,
            line=text.count("\n", 0, text.index("\0")) + 1,
        )
    if not text.strip():
        raise DataError("the file is empty; at least one row is expected.", file=file)
    return text


def check_kind(head: bytes, file: str, *, but: bytes = b"") -> None:
    """Raises DataError if a file begins like one of another kind than its suffix says."""
    if not head:
        raise DataError("the file is empty; at least one row is expected.", file=file)
    for start, message in _OTHER_KINDS.items():
        if start != but and head.startswith(start):
            raise DataError(message, file=file)


def _refuse_if_larger_than_memory(path: Path, file: str) -> None:
    """A file with holes in it has any size that it likes."""
    size, most = path.stat().st_size, memory_limit()
    if most is not None and size > most:
        raise DataError(
            f"the file has {size / 1e9:.0f} GB, and there are {most / 1e9:.0f} GB of memory here, where its rows "
            "are held. Split it, or take a part of it.",
            file=file,
        )


def _iconv(path: Path, encoding: str) -> str:
    converted = path.with_name(f"{path.stem}.utf8{path.suffix}")
    return f"iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > {shlex.quote(str(converted))}"
