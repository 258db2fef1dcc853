"""Files that a reader never sees half of."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handspun.errors import OutputError


@contextmanager
def whole_file(path: Path, *, option: str) -> Iterator[Path]:
    """A name beside `path` to write to; what stands there at the end takes the place of `path` in one move.

    Folders that are missing are made, and a place that cannot be written to is found out at once. Raises
    OutputError, which names the option that chose the place; `path` is then as it was.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        partial.touch()
    except OSError as error:
        raise _output_error(path, option, error) from error
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise _output_error(path, option, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _output_error(path: Path, option: str, error: OSError) -> OutputError:
    return OutputError(f"{option}: {path} cannot be written: {error.strerror or error}. Name another place.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
