"""Read the rows of a file, a folder, or a hub data set."""

import difflib
import errno
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal

from handspun.config.rows_in_memory import RowsInMemory
from handspun.data.readers import SUFFIXES, check_depth, read_file, with_known_names, without_nulls
from handspun.display import file_name, join_names, logger, printable
from handspun.errors import DataError, check_installed


class DroppedRow(Exception):  # noqa: N818
    """A row that cannot be trained on, or that is misleading. str() is a short, readable reason."""


def stay_offline_if_unreachable(name: str, *, repo_type: Literal["model", "dataset"] = "model") -> None:
    """Ask the hub for a file of the repository. If nothing answers, use only the hub's cache from then on.

    This sets the library's own switch (HF_HUB_OFFLINE) for the whole process. Anything that is not in the cache is
    then an error at once.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return
    try:
        url = hf_hub_url(name, "README.md", repo_type=repo_type)
        get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        # An answer (no such file, no access), or that of a proxy that cannot reach the hub.
        if error.response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
            return
        reason = f"status {error.response.status_code}"
    except Exception as error:  # httpx's many kinds, and the errors of proxies and certificates
        reason = str(error) or type(error).__name__
    else:
        return
    constants.HF_HUB_OFFLINE = True
    logger.warning(f"the hub does not answer ({reason}): using only its cache")


FileNotes = dict[str, list[str]]
"""File or folder -> what was skipped in it, or changed when it was read."""

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[^:/]+)(?=:))?(:(?P<split>[^:/]+))?")
# Files that `datasets` writes next to the data.
_NOT_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SPLIT = re.compile(r"(train|test|valid|validation|val|dev|eval)(?![a-z])")


@dataclass(frozen=True)
class Row:
    """One record of the user's data.

    file: path (or hub id) it came from, as the user would type it.
    number: 1 for the first data row of that file (a csv header is not counted).
    values: column name -> cell; csv and tsv cells are untouched strings.
    """

    file: str
    number: int
    values: dict[str, Any]


def check_data_exists(*sources: str | None) -> None:
    """Raise DataError for a missing file or folder, as `read_rows` would, before a model is downloaded.

    This does not ask the hub.
    """
    for source in sources:
        try:
            if source is not None and not isinstance(source, RowsInMemory):
                _path_or_hub(source)
        except OSError:  # read_rows raises the proper error
            return


def read_rows(source: str, notes: FileNotes | None = None, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return all rows of a file, of the files in a folder, of a hub dataset, or of a caller; at least one.

    A folder means the csv, tsv, json, jsonl, ndjson and parquet files directly in it, sorted by name. If there are
    none, it means the files in its folder `train`, or else `data`. Hidden files and `datasets`' own metadata are
    ignored. In a folder, only links that stay inside it are followed (or inside the hub's cache that it belongs
    to). A hub dataset is `org/name`, `org/name:split` or `org/name:config:split`; the default split is train.
    `notes` is filled, per file, with what was skipped or changed when it was read. `columns` are columns that the
    user has named: column -> its name in the file. Raises DataError.
    """
    columns = columns or {}
    notes = {} if notes is None else notes
    try:
        if isinstance(source, RowsInMemory):
            return _rows_in_memory(source, notes, columns)
        path = _path_or_hub(source)
        if isinstance(path, re.Match):
            return _hub_rows(source, path, notes, columns)
        files = _folder_files(path, notes) if path.is_dir() else [path]
        return [row for file in files for row in _file_rows(file, notes, columns)]
    except OSError as error:
        raise DataError(
            f"the system cannot read it ({error.strerror or error}). Check its permissions and the disk.",
            file=printable(str(error.filename or source), most=4096),
        ) from error
    except MemoryError as error:
        raise DataError(
            "there is not enough memory to read it, because all rows are loaded at once. Split it, or use a part "
            "of it.",
            file=printable(source, most=4096),
        ) from error


def read_sources(
    sources: Sequence[str],
    notes: FileNotes | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Return all rows of several files, folders, or hub datasets, in order. Raises DataError.

    Args:
        sources: what to read, each as for `read_rows`.
        notes: as for `read_rows`. A limit is noted too.
        columns: as for `read_rows`.
        limit: most rows in all; the first ones.
    """
    rows: list[Row] = []
    sources_of: dict[str, str] = {}
    for source in sources:
        found = read_rows(source, notes, columns)
        for file in dict.fromkeys(row.file for row in found):
            if sources_of.setdefault(file, source) != source:
                raise DataError(
                    f"--data reads this file twice, by {printable(sources_of[file])} and by {printable(source)}. "
                    "Remove one of them.",
                    file=file,
                )
        rows += found
    if limit is None or limit >= len(rows):
        return rows
    if notes is not None:
        notes[f"--limit {limit}"] = [f"the first {limit} of {len(rows)} rows are used"]
    return rows[:limit]


def _path_or_hub(source: str) -> Path | re.Match[str]:
    """Return the existing file or folder, or the parts of a hub dataset's name."""
    if not source.strip() or "\0" in source:
        raise DataError(f"{source!r} names no data. Expected a file, a folder, or a hub dataset (org/name).")
    path = Path(os.path.expanduser(source))  # Path.expanduser raises for an unknown user
    if path.exists():
        return path
    hub = _HUB_ID.fullmatch(source)
    if hub and path.suffix.lower() not in SUFFIXES and not path.parent.is_dir():
        return hub
    raise _missing(path)


def _file_rows(path: Path, notes: FileNotes, columns: Mapping[str, str]) -> list[Row]:
    file, status = file_name(path), path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(
            "expected a regular file, found a device, a pipe or a socket. Save the data to a file first.",
            file=file,
        )
    if not status.st_size:  # includes files in /proc, where reading may block forever
        raise DataError("the file is empty; at least one row is expected.", file=file)
    noted: list[str] = []
    rows = [Row(file, number, values) for number, values in enumerate(read_file(path, noted, columns), 1)]
    if noted:
        notes.setdefault(file, []).extend(dict.fromkeys(noted))
    return rows


def _folder_files(folder: Path, notes: FileNotes) -> list[Path]:
    for candidate in (folder, folder / "train", folder / "data"):
        files = _data_files(candidate) if candidate.is_dir() else []
        if files:
            _check_splits(files, candidate)
            _check_links(files, folder)
            others = sorted(
                entry.name + "/" * entry.is_dir() for entry in candidate.iterdir() if entry not in files
            )
            if others := [name for name in others if not name.startswith(".")]:
                notes.setdefault(file_name(candidate), []).append(f"not read in this folder: {join_names(others)}")
            return files
    found = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    raise DataError(
        f"expected files ending in {', '.join(SUFFIXES)} in this folder, found "
        f"{join_names(found) if found else 'nothing'}. Name the folder that contains the data, or a file.",
        file=file_name(folder),
    )


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in SUFFIXES
        and not file.name.startswith(".")
        and file.name not in _NOT_ROWS
        and not file.is_dir()
    )


def _check_splits(files: list[Path], folder: Path) -> None:
    """Raise DataError if a folder contains both training and test files: both would be trained on."""
    splits = {file.name: match[1] for file in files if (match := _SPLIT.match(file.name.lower()))}
    held_out = [name for name, split in splits.items() if split != "train"]
    if held_out and "train" in splits.values():
        raise DataError(
            f"this folder contains both training files and test files ({join_names(held_out)}), and all of them "
            "would be trained on. Name one file, or move the test files to another folder.",
            file=file_name(folder),
        )


def _check_links(files: list[Path], folder: Path) -> None:
    """Raise DataError for a link that leaves the folder."""
    # A downloaded folder must not name files of this machine.
    root = folder.resolve()
    # The hub's cache consists of links from `snapshots` to its `blobs`.
    blobs = [parent.with_name("blobs") for parent in root.parents if parent.name == "snapshots"]
    for file in files:
        target = Path(os.path.realpath(file))  # works for a loop too
        if not any(target.is_relative_to(allowed) for allowed in (root, *blobs)):
            raise DataError(
                f"it is a link to {file_name(target)}, which is not in this folder. To use its rows, name that "
                "file, or copy it here.",
                file=file_name(file),
            )


def _missing(path: Path) -> DataError:
    missing = path
    while not missing.is_symlink() and not missing.parent.exists():
        missing = missing.parent
    if missing.is_symlink():
        leads = "which leads back to itself" if _is_loop(missing) else "which does not exist"
        return DataError(f"it is a link to {file_name(missing.readlink())}, {leads}.", file=file_name(missing))
    siblings = (
        {entry.name.lower(): entry.name for entry in missing.parent.iterdir()} if missing.parent.is_dir() else {}
    )
    close = [siblings[name] for name in difflib.get_close_matches(missing.name.lower(), siblings)]
    hint = f" Did you mean {' or '.join(file_name(missing.with_name(name)) for name in close)}?" if close else ""
    what = "no such file or folder" if missing == path else f"no file or folder {file_name(missing)}"
    return DataError(
        f"there is {what}.{hint} Expected a file ({', '.join(SUFFIXES)}), a "
        "folder of such files, or a dataset on the hub, which would look like org/name.",
        file=file_name(path),
    )


def _is_loop(link: Path) -> bool:
    try:
        link.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _hub_rows(source: str, hub: re.Match[str], notes: FileNotes, columns: Mapping[str, str]) -> list[Row]:
    """Return the rows of a hub dataset as `datasets` reads them. It turns csv cells into numbers if it can."""
    check_installed("datasets", "hub", f"{source}: a hub dataset")
    import datasets

    name, config, split = hub["name"], hub["config"], hub["split"] or "train"
    stay_offline_if_unreachable(name, repo_type="dataset")
    try:
        dataset = datasets.load_dataset(name, config, split=split)
        found = [_values(values) for values in dataset]
    except Exception as error:  # anything that the network, the hub or the dataset's files can raise
        raise DataError(
            f"there is no such file or folder here, and the hub dataset {name!r} (split {split!r}) cannot be "
            f"loaded: {_first_line(error)} Check the spelling and the network. Write a split as org/name:split, "
            "and a configuration as org/name:config:split. Or download the files and name them.",
            file=source,
        ) from error
    if not found:
        raise DataError(f"the split {split!r} has no rows; at least one is expected.", file=source)
    return _named_rows(found, source, notes, columns)


def _rows_in_memory(given: RowsInMemory, notes: FileNotes, columns: Mapping[str, str]) -> list[Row]:
    name = str.__str__(given)
    check_depth(given.rows, name)
    found = [_values(values) for values in given.rows] if given.is_from_arrow else given.rows
    return _named_rows(found, name, notes, columns)


def _named_rows(
    found: list[dict[str, Any]], source: str, notes: FileNotes, columns: Mapping[str, str]
) -> list[Row]:
    noted: list[str] = []
    found = with_known_names(found, noted, columns, source)
    if noted:
        notes[source] = noted
    return [Row(source, number, values) for number, values in enumerate(found, 1)]


def _values(values: dict[str, Any]) -> dict[str, Any]:
    return {name: without_nulls(value) for name, value in values.items()}


def _first_line(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if line.endswith((".", "!", "?")) else f"{line}."
