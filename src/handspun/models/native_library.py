"""The compiled kernels in the cache folder: built once, and loaded only where they are whole and the user's own.

A library is code that runs as the user. It is loaded only from a folder that nobody else can write, and only as a
file of the user's own. Its sha256 follows it in the same file, which loaders ignore. A library that was cut short
would end the process with SIGBUS; its checksum tells, and it is built again.
"""

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from handspun.files import atomic_file, cache_folder
from handspun.models.cpu import cpu_model

_DIGEST_BYTES = hashlib.sha256().digest_size
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_SECONDS = 120
_TRIED_AGAIN_AFTER = 24 * 3600
"""Seconds: a compiler that has failed would cost every start as long as it takes to fail."""


class LibraryError(Exception):
    """Why there is no library, in a few words."""


def load_library(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """Return the library of a C file, built if it is not in the cache folder yet. Raise LibraryError."""
    compiler = _compiler()
    try:
        file = _library_file(source, flags, compiler)
        if not _is_whole_and_own(file):
            _build(source, flags, compiler, file)
    except OSError as error:
        raise LibraryError(f"{error.filename or cache_folder()}: {error.strerror or error}") from error
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:  # a file system that is mounted noexec
        raise LibraryError(
            f"{file} cannot be loaded ({error}); XDG_CACHE_HOME names another cache folder"
        ) from error


def _compiler() -> list[str]:
    """Return the compiler's command: $CC, which may hold several words, or the first that is there."""
    try:
        words = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise LibraryError(f"CC cannot be split into words ({error})") from error
    if not words:
        words = [name for name in _COMPILERS if shutil.which(name)][:1]
        if not words:
            raise LibraryError("there is no C compiler (gcc or clang, or the one that CC names)")
    if not shutil.which(words[0]):
        raise LibraryError(f"the C compiler that CC names, {words[0]}, is not there")
    return words


def _own_folder() -> Path:
    """Return the folder of libraries, made if need be. Raise LibraryError if others can write to it."""
    folder = cache_folder().absolute() / "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise LibraryError(f"{folder} is no folder but a link or a file. Remove it")
    if found.st_uid != os.geteuid():
        raise LibraryError(f"{folder} belongs to another user. XDG_CACHE_HOME names another cache folder")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise LibraryError(f"{folder} can be written by others. Remove it")
    folder.chmod(0o700)
    for above in folder.resolve().parents:
        mode = above.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise LibraryError(f"{above} can be written by everyone. XDG_CACHE_HOME names another cache folder")
    return folder


def _library_file(source: Path, flags: Sequence[str], compiler: Sequence[str]) -> Path:
    """Return where the library is or will be. Its name says what it is made of, by what, and for which CPU."""
    programs = [Path(path).resolve() for path in map(shutil.which, compiler) if path]
    files = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in programs]
    made_from = "\0".join([source.read_text(encoding="utf-8"), *compiler, *files, cpu_model(), *flags])
    return _own_folder() / f"{source.stem}-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.so"


def _is_whole_and_own(file: Path) -> bool:
    """Return whether the file is a library that this user has written, to its end."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:  # there is none yet, or it is a link
        return False
    with open(descriptor, "rb") as opened:
        found = os.fstat(descriptor)
        is_own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
        if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
        content = opened.read()
    library, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return bool(library) and hashlib.sha256(library).digest() == digest


def _build(source: Path, flags: Sequence[str], compiler: Sequence[str], file: Path) -> None:
    """Write the library, or the reason why the compiler failed, which stands for a day. Raise LibraryError."""
    failure = file.with_suffix(".failed")
    if reason := _recent_failure(failure):
        raise LibraryError(reason)
    with tempfile.TemporaryDirectory(prefix="building.", dir=file.parent) as work:
        made = Path(work) / "library.so"
        command = [*compiler, *flags, str(source), "-o", str(made), "-lm"]
        reason = _failure_of(command)
        if reason is None and not made.is_file():
            reason = "it wrote no library"
        if reason is not None:
            text = f"the C compiler failed: {shlex.join(compiler)}: {reason}"
            _write(text.encode(), failure)
            raise LibraryError(text)
        library = made.read_bytes()
        _write(library + hashlib.sha256(library).digest(), file)


def _failure_of(command: Sequence[str]) -> str | None:
    """Run a compiler. Return what it said last if it failed; None if it did not."""
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, timeout=_COMPILE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took more than {_COMPILE_SECONDS} seconds"
    except OSError as error:
        return error.strerror or str(error)
    if done.returncode == 0:
        return None
    lines = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if "error" in line] or lines
    return errors[0][:200] if errors else f"exit code {done.returncode}"


def _recent_failure(file: Path) -> str | None:
    try:
        if time.time() - file.stat().st_mtime > _TRIED_AGAIN_AFTER:
            return None
        reason = file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
    return f"{reason} (tried again after a day, or when {file} is removed)" if reason else None


def _write(content: bytes, file: Path) -> None:
    with atomic_file(file) as partial:
        partial.chmod(0o600)
        partial.write_bytes(content)
