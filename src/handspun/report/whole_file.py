"""Files that a user named, which a reader never sees half of."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handspun.files import atomic_file, output_errors


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
