"""Folders that get their name when they are whole, and what a killed process leaves of them.

Whatever is unfinished about `NAME` is in the folder `.NAME.handspun` next to it, which holds a file that says
whose it is. Nothing else is ever cleared away by its name alone.

    new/      is being written; it becomes NAME in one move
    old/      had the name NAME before; it goes once the new one has it
    deleted/  is being deleted
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from handspun.errors import OutputError
from handspun.files import output_errors, sync

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
