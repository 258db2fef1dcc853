"""Files that are written whole or not at all, their checksums, and failures of the disk in words for people."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from handspun.errors import OutputError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How Rust writes an errno."""
_PARTIAL = re.compile(r"\..*\.handspun-[0-9a-f]{8}\.partial", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""What file systems answer that have no fsync of a folder."""


@contextmanager
def output_errors(path: Path, *, option: str = "--output-dir") -> Iterator[None]:
    """Raise failures of the disk while `path` is written as an OutputError that names the option behind it."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error, option=option) from error
    except Exception as error:
        if isinstance(error, OutputError) or not _OS_ERROR.search(str(error)):
            raise
        raise output_error(path, error, option=option) from error  # safetensors and tokenizers wrap the system's


def output_error(path: Path, error: Exception, *, option: str = "--output-dir") -> OutputError:
    """Return the error that says why `path` cannot be written, and what to do."""
    wrapped = _OS_ERROR.search(str(error))
    code = int(wrapped[1]) if wrapped else getattr(error, "errno", None)
    if code in _NO_ROOM:
        remedy = f"Free some, or choose another {option}"
        remedy += ", or halve the files with --save-dtype bfloat16." if option == "--output-dir" else "."
        return OutputError(f"{path} cannot be written: no room left on the disk ({_free(path)}). {remedy}")
    if code == errno.EFBIG:
        return OutputError(
            f"{path} cannot be written: the file is larger than the system allows here. Raise the "
            f"limit (ulimit -f), or choose another {option} on a file system without it."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(f"{path} cannot be written: {reason}. Choose another {option}.")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a new name next to `path` to write to. The file gets the name `path` at the end, synced, in one move.

    Nobody's file has the new name, and `is_partial` knows it again. If the block fails, `path` is as it was.
    """
    partial = _partial_name(path)
    partial.open("xb").close()
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def is_partial(path: Path) -> bool:
    """Return whether `atomic_file` made this name, so that it may go once its process is gone."""
    return bool(_PARTIAL.fullmatch(path.name)) and path.is_file() and not path.is_symlink()


def write_text(path: Path, text: str) -> None:
    """Replace the file in one move, so that a reader never sees half of it, not even after a power cut.

    Half of a surrogate pair, which UTF-8 cannot hold, becomes a question mark.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one move by the value as JSON, readable for people."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object that the file holds; None if there is no file, or anything else in it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sha256_of(path: Path) -> str:
    """Return the checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Put a file's content, or a folder's list of names, on the disk before anything that follows."""
    is_folder = path.is_dir()
    if os.name == "nt" and is_folder:
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def readable_size(count: float) -> str:
    """Return a number of bytes with three digits at most: "0 bytes", "12 MB", "3.4 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {unit}"
    return f"{count:.0f} bytes"


def _partial_name(path: Path) -> Path:
    """Return a name that nobody else has, short enough for every file system that took the file's own."""
    stem = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{stem}.handspun-{secrets.token_hex(4)}.partial")


def _free(path: Path) -> str:
    with suppress(OSError):
        there = next(parent for parent in path.absolute().parents if parent.exists())
        return f"{readable_size(shutil.disk_usage(there).free)} free"
    return "and how much is free cannot be asked"


NO_CACHE = Path(os.devnull) / "no-home-folder"
"""A folder that cannot be made: whatever would be kept in it is not."""


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/handspun, by default ~/.cache/handspun; NO_CACHE for a user without a home.

    A relative $XDG_CACHE_HOME is ignored, as its specification says: it would be another folder in every place.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "handspun"
    home = Path(os.path.expanduser("~"))  # Path.home() raises where there is neither HOME nor a user's entry
    return home / ".cache" / "handspun" if home.is_absolute() else NO_CACHE
