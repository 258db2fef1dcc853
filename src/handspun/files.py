"""Files written whole or not at all, their checksums, the cache folder, and disk failures as errors for people."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

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


_MARKER = "ABOUT"
_ABOUT = "This folder belongs to Handspun. It holds what is not finished yet, and goes by itself.\n"
_LOCK, _OWNER = "lock", "owner"
_NEW, _OLD, _DELETED = "new", "old", "deleted"


def work_folder(path: Path) -> Path:
    """Return the folder next to `path` for what is unfinished about it."""
    return path.with_name(f".{path.name}.handspun")


def make_work_folder(work: Path) -> None:
    """Make a folder that `is_work_folder` knows again. Raises OutputError if a stranger's has the name."""
    work.mkdir(parents=True, exist_ok=True)
    if not is_work_folder(work):
        raise OutputError(f"{work} was not made by Handspun, which needs a folder of this name. Move it away.")
    (work / _MARKER).write_text(_ABOUT, encoding="utf-8")


def is_work_folder(work: Path) -> bool:
    """Return whether the folder says that it is Handspun's. One that was just made may not say so yet."""
    if work.is_symlink() or not work.is_dir():
        return False
    names = set(os.listdir(work))
    try:
        text = (work / _MARKER).read_text(encoding="utf-8") if _MARKER in names else ""
    except (OSError, ValueError):
        return False
    return text == _ABOUT or (names <= {_MARKER} and _ABOUT.startswith(text))


def remove_work_folder(work: Path) -> None:
    """Remove the folder with what is unfinished in it, its marker last. What somebody else put in stays."""
    for name in (_NEW, _OLD, _DELETED):
        _remove(work / name)
    if set(os.listdir(work)) <= {_MARKER}:
        (work / _MARKER).unlink(missing_ok=True)
        with suppress(OSError):  # something was put into it just now
            work.rmdir()


@contextmanager
def exclusive(work: Path, *, busy: Callable[[str], str]) -> Iterator[None]:
    """Hold a lock in a work folder. The system releases it if the process dies.

    busy: makes a message of what is known of another process that holds it. Raises OutputError.
    """
    make_work_folder(work)
    lock = FileLock(work / _LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise OutputError(busy(_owner(work))) from None
    try:
        (work / _OWNER).write_text(f"{os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        (work / _OWNER).unlink(missing_ok=True)
        with suppress(OSError):  # Windows keeps what is open
            (work / _LOCK).unlink()  # while it is held, or the next one could lock a file that is gone
        lock.release()


@contextmanager
def locked(path: Path, *, busy: Callable[[str], str]) -> Iterator[None]:
    """Hold the lock of whoever makes `path`, with what a killed process has left of it put right."""
    with ExitStack() as stack:
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(_tidy_up, work_folder(path))
            stack.enter_context(exclusive(work_folder(path), busy=busy))
            recover(path)
        yield


def _tidy_up(work: Path) -> None:
    with suppress(OSError):
        if is_work_folder(work) and not (work / _OLD).exists():
            remove_work_folder(work)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that gets the name `path`, all at once, at the end of the block.

    An earlier folder of that name goes only after that. If the block fails, `path` is as it was. The caller has
    made sure that the earlier one may go. Raises OutputError.
    """
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        work = work_folder(path)
        make_work_folder(work)
        try:
            (work / _NEW).mkdir()
            yield work / _NEW
            sync(work / _NEW)
            _take_the_name(path, work)
        finally:
            if not (work / _OLD).exists() or path.exists():
                with suppress(OSError):  # an error of its own would hide the block's; `recover` comes back to it
                    remove_work_folder(work)


def remove_folder(path: Path, *, work: Path | None = None) -> None:
    """Remove a folder that the caller knows to be ours. What is being deleted does not have its name any more.

    work: its work folder, if that is not the one next to it. Raises OutputError.
    """
    with output_errors(path):
        work = work or work_folder(path)
        make_work_folder(work)
        _remove(work / _DELETED)
        path.rename(work / _DELETED)
        remove_work_folder(work)


def recover(path: Path) -> None:
    """Put back or clear away what a killed process has left unfinished about `path`.

    Raises OutputError if somebody has made another `path` meanwhile.
    """
    work = work_folder(path)
    if not is_work_folder(work):
        return
    with output_errors(path):
        if (work / _OLD).exists() and not os.path.lexists(path):  # killed between the two renames
            (work / _OLD).rename(path)
            sync(path.parent)
        elif (work / _OLD).exists() and (work / _NEW).exists():
            raise OutputError(
                f"{path} was being replaced when the process was killed, and is in {work / _OLD}; another "
                f"{path.name} has been made since. Move one of them away."
            )
        remove_work_folder(work)


def recover_all(folder: Path, *, is_ours: Callable[[str], bool]) -> None:
    """Do so for every name in the folder that is ours."""
    for work in sorted(folder.glob(".*.handspun")):
        name = work.name.removeprefix(".").removesuffix(".handspun")
        if is_ours(name):
            recover(work.with_name(name))


def _take_the_name(path: Path, work: Path) -> None:
    if os.path.lexists(path):
        path.rename(work / _OLD)
        try:
            (work / _NEW).rename(path)
        except OSError:
            (work / _OLD).rename(path)
            raise
    else:
        (work / _NEW).rename(path)
    sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _owner(work: Path) -> str:
    try:
        return f" (process {(work / _OWNER).read_text(encoding='utf-8').strip()})"
    except (OSError, ValueError):
        return ""


@contextmanager
def whole_file(path: Path, *, option: str) -> Iterator[Path]:
    """Yield a name next to `path` to write to; at the end that file takes the place of `path` in one move.

    Missing folders are made, and a place that cannot be written to is found out at once. Raises OutputError, which
    names the option that chose the place; `path` is then as it was.
    """
    with output_errors(path, option=option):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with atomic_file(path) as partial:
            yield partial
