"""Write files and folders atomically, compute checksums, and turn disk failures into readable errors."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from filelock import FileLock, Timeout

from handspun.display import describe_type
from handspun.errors import OutputError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""An errno in the text of a Rust error."""
_PARTIAL = re.compile(r"\..*\.handspun-[0-9a-f]{8}\.partial", re.DOTALL)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""Error codes of file systems that cannot fsync a folder."""


@contextmanager
def output_errors(path: Path, *, option: str = "--output-dir") -> Iterator[None]:
    """Turn disk failures while `path` is written into an OutputError. option: the option that chose the path."""
    try:
        yield
    except OSError as error:
        raise output_error(path, error, option=option) from error
    except Exception as error:
        if isinstance(error, OutputError) or not _OS_ERROR.search(str(error)):
            raise
        raise output_error(path, error, option=option) from error  # safetensors and tokenizers wrap OS errors


def output_error(path: Path, error: Exception, *, option: str = "--output-dir") -> OutputError:
    """Return the error that says why `path` cannot be written, and what to do."""
    wrapped = _OS_ERROR.search(str(error))
    code = int(wrapped[1]) if wrapped else getattr(error, "errno", None)
    if code in _NO_ROOM:
        remedy = f"Free some space, or choose another {option}"
        remedy += ", or halve the files with --save-dtype bfloat16." if option == "--output-dir" else "."
        return OutputError(f"{path} cannot be written: no space left on the disk ({_free(path)}). {remedy}")
    if code == errno.EFBIG:
        return OutputError(
            f"{path} cannot be written: the file is larger than the system allows. Raise the limit (ulimit -f), "
            f"or choose another {option} on a file system without the limit."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(f"{path} cannot be written: {reason}. Choose another {option}.")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a new file next to `path` to write to. At the end, sync it and rename it to `path`.

    `is_partial` recognizes the temporary name. If the block fails, `path` is unchanged.
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
    """Return whether `atomic_file` made this file, so that it can be deleted after its process has died."""
    return bool(_PARTIAL.fullmatch(path.name)) and path.is_file() and not path.is_symlink()


def write_text(path: Path, text: str) -> None:
    """Replace the file atomically, so that a reader never sees half of it, not even after a power cut.

    A lone surrogate, which UTF-8 cannot encode, becomes a question mark.
    """
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Replace the file atomically with the value as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in the file; None if there is no file, or if it contains anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


_Kind = TypeVar("_Kind")


def from_json(kind: type[_Kind], value: Any) -> _Kind:
    """Return JSON's value as a dataclass tree. Keys that a dataclass lacks are left out.

    A field's metadata may have a function `read` for its value. Raises ValueError that says what is wrong.
    """
    return cast(_Kind, _as_kind(kind, value, ""))


def to_json(value: Any) -> Any:
    """Return a dataclass tree as JSON's types, from which `from_json` makes it again."""
    if is_dataclass(value):
        pairs = [(field.name, field.metadata.get("write", to_json)) for field in fields(value)]
        return {name: write(getattr(value, name)) for name, write in pairs}
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def _as_kind(kind: Any, value: Any, name: str) -> Any:
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):  # `X | None`: no other is in a record
        return None if value is None else _as_kind(members[0], value, name)
    if kind is Any:
        return value
    plain: Any = dict if is_dataclass(kind) else origin or kind
    is_plain = isinstance(value, (int, float) if plain is float else plain)
    if not is_plain or (isinstance(value, bool) and plain is not bool):
        raise ValueError(f"has {describe_type(value)} as {name or 'its content'} (expected {_EXPECTED[plain]})")
    if is_dataclass(kind):
        return _as_dataclass(kind, value, name)
    if origin is dict:
        return {key: _as_kind(members[1], item, f"{name}.{key}") for key, item in value.items()}
    return [_as_kind(members[0], item, name) for item in value] if origin is list else value


def _as_dataclass(kind: Any, value: dict[str, Any], name: str) -> Any:
    hints, found, prefix = get_type_hints(kind), dict[str, Any](), f"{name}." if name else ""
    for field in fields(kind):
        if field.name in value:
            read = field.metadata.get("read")
            item = value[field.name]
            found[field.name] = read(item) if read else _as_kind(hints[field.name], item, prefix + field.name)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"lacks {prefix}{field.name}")
    return kind(**found)


_EXPECTED: dict[Any, str] = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "a boolean",
}


def sha256_of(path: Path) -> str:
    """Return the SHA-256 checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to the disk."""
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
    """Return a number of bytes with at most three digits: "0 bytes", "12 MB", "3.4 GB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {unit}"
    return f"{count:.0f} bytes"


def _partial_name(path: Path) -> Path:
    """Return a unique name, short enough for any file system that accepts the file's own name."""
    stem = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{stem}.handspun-{secrets.token_hex(4)}.partial")


def _free(path: Path) -> str:
    with suppress(OSError):
        there = next(parent for parent in path.absolute().parents if parent.exists())
        return f"{readable_size(shutil.disk_usage(there).free)} free"
    return "free space unknown"


NO_CACHE = Path(os.devnull) / "no-home-folder"
"""A folder that cannot be created, so that nothing is cached."""


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/handspun, by default ~/.cache/handspun; NO_CACHE for a user without a home folder.

    A relative $XDG_CACHE_HOME is ignored, as its specification says, because it would depend on the working
    folder.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if named.is_absolute():
        return named / "handspun"
    home = Path(os.path.expanduser("~"))  # Path.home() raises if there is neither HOME nor a user entry
    return home / ".cache" / "handspun" if home.is_absolute() else NO_CACHE


_MARKER = "ABOUT"
_ABOUT = "This folder belongs to Handspun. It holds what is not finished yet, and goes by itself.\n"
_LOCK, _OWNER = "lock", "owner"
_NEW, _OLD, _DELETED = "new", "old", "deleted"


def work_folder(path: Path) -> Path:
    """Return the folder next to `path` for its unfinished files."""
    return path.with_name(f".{path.name}.handspun")


def make_work_folder(work: Path) -> None:
    """Create a folder that `is_work_folder` recognizes. Raises OutputError if the name is taken."""
    work.mkdir(parents=True, exist_ok=True)
    if not is_work_folder(work):
        raise OutputError(f"{work} was not made by Handspun, which needs a folder of this name. Move it away.")
    (work / _MARKER).write_text(_ABOUT, encoding="utf-8")


def is_work_folder(work: Path) -> bool:
    """Return whether the folder is marked as Handspun's. A new folder may not be marked yet."""
    if work.is_symlink() or not work.is_dir():
        return False
    names = set(os.listdir(work))
    try:
        text = (work / _MARKER).read_text(encoding="utf-8") if _MARKER in names else ""
    except (OSError, ValueError):
        return False
    return text == _ABOUT or (names <= {_MARKER} and _ABOUT.startswith(text))


def remove_work_folder(work: Path) -> None:
    """Delete the folder and its unfinished files, the marker last. Other programs' files stay."""
    for name in (_NEW, _OLD, _DELETED):
        _remove(work / name)
    if set(os.listdir(work)) <= {_MARKER}:
        (work / _MARKER).unlink(missing_ok=True)
        with suppress(OSError):  # another program just put a file into it
            work.rmdir()


@contextmanager
def exclusive(work: Path, *, busy: Callable[[str], str]) -> Iterator[None]:
    """Hold an exclusive lock in a work folder. The OS releases it if the process dies.

    busy: returns the error message, given what is known about the process that holds the lock. Raises OutputError.
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
        with suppress(OSError):  # Windows cannot delete an open file
            (work / _LOCK).unlink()  # before the release, or the next process could lock a deleted file
        lock.release()


@contextmanager
def locked(path: Path, *, busy: Callable[[str], str]) -> Iterator[None]:
    """Hold the lock for writing `path`, and first clean up what a killed process left."""
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
    """Yield an empty folder that is renamed to `path` at the end of the block.

    An earlier folder of that name is deleted only after that; the caller has checked that it may be. If the block
    fails, `path` is unchanged. Raises OutputError.
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
                with suppress(OSError):  # an error here would hide the block's error; `recover` tries again
                    remove_work_folder(work)


def remove_folder(path: Path, *, work: Path | None = None) -> None:
    """Delete a folder of ours. It is renamed first, so that half of it never has its name.

    work: its work folder, if not the one next to it. Raises OutputError.
    """
    with output_errors(path):
        work = work or work_folder(path)
        make_work_folder(work)
        _remove(work / _DELETED)
        path.rename(work / _DELETED)
        remove_work_folder(work)


def recover(path: Path) -> None:
    """Restore or delete what a killed process left unfinished for `path`.

    Raises OutputError if another `path` has been created meanwhile.
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
                f"{path} was being replaced when the process was killed, and is now in {work / _OLD}. Another "
                f"{path.name} has been created since. Move one of them away."
            )
        remove_work_folder(work)


def recover_all(folder: Path, *, is_ours: Callable[[str], bool]) -> None:
    """Call `recover` for every name in the folder that is ours."""
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
    """Yield a file next to `path` to write to, which atomically replaces `path` at the end.

    Missing folders are created, and a path that cannot be written fails at once. Raises OutputError, which names
    the option that chose the path; `path` is then unchanged.
    """
    with output_errors(path, option=option):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        with atomic_file(path) as partial:
            yield partial
