"""What a new run may replace: files that an earlier run wrote, and that can be shown to be its own."""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from handspun.data.readers import SUFFIXES
from handspun.display import join_names, logger
from handspun.errors import OutputError
from handspun.files import (
    is_partial,
    is_work_folder,
    output_errors,
    read_json_object,
    recover_all,
    remove_work_folder,
    sha256_of,
    sync,
)
from handspun.runs.metrics import HARDEST, HELD_OUT, KEPT, METRICS, REPORT, is_report
from handspun.runs.record import RUN_FILE, is_finished
from handspun.runs.resume import checkpoints_in, resumable
from handspun.runs.trackers import TRACKERS
from handspun.training.checkpoint import (
    TRAINING_STATE,
    edited_files,
    is_checkpoint_name,
    read_manifest,
    unknown_files,
)

WORK = ".handspun"
"""The work folder of an output folder: its lock, and what is described above."""
LOG = "train.log"
_TABLES = (HARDEST, HELD_OUT)
_RECORDS = (RUN_FILE, LOG, METRICS, REPORT, KEPT, *_TABLES)
_REPLACING, _REPLACED, _DELETED, _PENDING = "replacing", "replaced-", "deleted", "pending"
_NONFINITE = re.compile(r"nonfinite-step-[0-9]+\.jsonl")
_LOG_LINE = re.compile(r"[0-9]{2}:[0-9]{2}:[0-9]{2} ")
_ENOUGH = 4096
"""Bytes of a file from which it is known what it is."""


def tidy(folder: Path) -> None:
    """Finish what a killed process has left half done in an output folder, which is locked.

    Nothing goes that does not say that it is Handspun's.
    """
    with output_errors(folder):
        work = folder / WORK
        _delete(work / _DELETED)
        _delete(work / _PENDING)
        if (work / _REPLACING).exists():
            _move_back(folder)
            logger.warning(
                f"the earlier run in {folder} is back in its place: the run that was to replace it had not begun"
            )
        if any(_replaced(folder)) and _is_whole(folder):
            drop_replaced(folder)
        recover_all(folder, is_ours=is_checkpoint_name)
        for path in folder.glob(".*.partial"):
            if is_partial(path):
                path.unlink()


def leave(folder: Path) -> None:
    """Remove the output folder's work folder if nothing is in it that is still needed."""
    work = folder / WORK
    if is_work_folder(work):
        _delete(work / _PENDING)
        remove_work_folder(work)


def pending(folder: Path) -> Path:
    """Return a folder for the log of a run that has not begun yet."""
    with output_errors(folder):
        (folder / WORK / _PENDING).mkdir(exist_ok=True)
    return folder / WORK / _PENDING


def earlier_run(folder: Path) -> list[Path]:
    """Return what an earlier run wrote into the folder, as far as that can be shown."""
    return [path for path in _names_of_a_run(folder) if _is_proven(path)]


def check_no_foreign_files(folder: Path, *, names: Collection[str] | None = None) -> None:
    """Raise OutputError if something has a name that a run writes to (or one of these), and no run wrote it."""
    found = [path for path in _names_of_a_run(folder) if names is None or path.name in names]
    if strangers := [path for path in found if not _is_proven(path)]:
        named = [f"{path.name}{_why_not(path)}" for path in strangers]
        raise OutputError(
            f"{folder} holds what Handspun did not write, or not like that, under names that a run writes to: "
            f"{join_names(named)}. Move it away, or choose another --output-dir."
        )


def check_inputs_outside(
    models: Iterable[str | Path], data: Iterable[str | Path], doomed: Iterable[Path], remedy: str
) -> None:
    """Raise OutputError if a model or data are, or are read from, anything that would be replaced.

    Links are followed, from the input and from the files in its folder.
    """
    places = [Path(os.path.realpath(path)) for path in doomed]
    read = [
        *((given, _model_files(given, places)) for given in models),
        *((given, _data_files(given)) for given in data),
    ]
    for given, files in read:
        for path in files:
            if inside := [place for place in places if path == place or place in path.parents]:
                raise OutputError(f"{given} is read from {inside[0]}, which would be replaced. {remedy}")


def move_aside(folder: Path, items: Iterable[Path]) -> None:
    """Move an earlier run's files out of the way. Until `commit` they come back if the process dies."""
    replacing = folder / WORK / _REPLACING
    with output_errors(folder):
        replacing.mkdir()
        try:
            for path in items:
                path.rename(replacing / path.name)
            sync(replacing)
            sync(folder)
        except BaseException:  # a mount point, or a folder of a container's image: neither can be renamed
            _move_back(folder)
            raise


def commit(folder: Path) -> Path:
    """Say that the new run has begun: run.json is its own. Return where the earlier one is until then."""
    place = folder / WORK / f"{_REPLACED}{max(map(_number, _replaced(folder)), default=0) + 1}"
    with output_errors(folder):
        (folder / WORK / _REPLACING).rename(place)
        sync(folder / WORK)
    return place


def undo(folder: Path) -> None:
    """Bring back what was moved aside last; what the new run has written in its place goes."""
    with output_errors(folder):
        if not (folder / WORK / _REPLACING).exists():
            max(_replaced(folder), key=_number).rename(folder / WORK / _REPLACING)
        for name in _RECORDS:
            (folder / name).unlink(missing_ok=True)
        _move_back(folder)


def drop_replaced(folder: Path) -> None:
    """Remove what was replaced: the new run is whole."""
    with output_errors(folder):
        for place in _replaced(folder):
            _delete(folder / WORK / _DELETED)
            place.rename(folder / WORK / _DELETED)
            _delete(folder / WORK / _DELETED)


def _move_back(folder: Path) -> None:
    work = folder / WORK
    for path in sorted((work / _REPLACING).iterdir(), key=lambda path: path.name == RUN_FILE):  # it last
        if os.path.lexists(folder / path.name):
            _delete(work / _DELETED)
            (folder / path.name).rename(work / _DELETED)
        path.rename(folder / path.name)
    _delete(work / _DELETED)
    (work / _REPLACING).rmdir()
    sync(folder)


def _replaced(folder: Path) -> list[Path]:
    return [
        path for path in (folder / WORK).glob(f"{_REPLACED}*") if path.name.removeprefix(_REPLACED).isdecimal()
    ]


def _number(path: Path) -> int:
    return int(path.name.removeprefix(_REPLACED))


def _is_whole(folder: Path) -> bool:
    return bool(resumable(folder)) or is_finished(folder)


def _delete(path: Path) -> None:
    """Remove what lies in a work folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _names_of_a_run(folder: Path) -> list[Path]:
    """Return what is there under a name that a run writes to, run.json first."""
    nonfinite = sorted(path for path in folder.glob("nonfinite-step-*.jsonl") if _NONFINITE.fullmatch(path.name))
    trackers = [folder / TRACKERS] if _has_trackers(folder) else []
    paths = [*(folder / name for name in _RECORDS), *nonfinite, *checkpoints_in(folder), *trackers]
    return [path for path in paths if os.path.lexists(path)]


def _has_trackers(folder: Path) -> bool:
    """Return whether the folder `trackers` is a run's own: it alone says so, and holds their folders alone."""
    record = read_json_object(folder / RUN_FILE) or {}
    config = record.get("config")
    place = folder / TRACKERS
    if not isinstance(config, dict) or not config.get("log_to") or place.is_symlink() or not place.is_dir():
        return False
    return set(os.listdir(place)) <= {"tensorboard", "wandb"}


def _is_proven(path: Path) -> bool:
    """Return whether a run wrote it, by its content; of a damaged file, by the run that it lies in."""
    if path.is_symlink():
        return False
    if path.is_dir():
        if path.name == TRACKERS:
            return True
        return read_manifest(path) is not None and not unknown_files(path) and not edited_files(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(_ENOUGH)
    if not start.strip(b"\0"):
        return True  # nothing can be lost
    return _looks_like_ours(path, start) or (path.name not in (REPORT, *_TABLES) and _has_run(path.parent))


def _looks_like_ours(path: Path, start: bytes) -> bool:
    if path.name == REPORT:
        return is_report(path)
    if path.name in _TABLES:  # they are there to be edited, and then they are the user's
        written = (read_json_object(path.parent / KEPT) or {}).get(path.name)
        return isinstance(written, dict) and written.get("sha256") == sha256_of(path)
    text = start.decode("utf-8", "replace")
    lines = text.splitlines()[: None if len(start) < _ENOUGH else -1]
    if path.name == LOG:
        return bool(lines) and all(map(_LOG_LINE.match, lines))
    if path.name == METRICS:
        return '"event": ' in text.splitlines()[0]
    if path.name == RUN_FILE:
        return (
            text.startswith('{\n  "started": "')
            or {"config", "environment"} <= (read_json_object(path) or {}).keys()
        )
    if path.name == KEPT:
        return (
            text.startswith('{\n  "model": {') or {"lengths", "prompts"} <= (read_json_object(path) or {}).keys()
        )
    return text.startswith('{"messages": ') and _is_row_of_ours(path)


def _is_row_of_ours(path: Path) -> bool:
    """Return whether the file of a batch names file and row of each of its rows, as a run writes them."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return False
    return all(isinstance(row, dict) and {"messages", "file", "row"} <= row.keys() for row in rows)


def _has_run(folder: Path) -> bool:
    """Return whether a run has been at work here: it would not have begun beside somebody else's files."""
    record = folder / RUN_FILE
    if record.is_file() and not record.is_symlink():
        with record.open("rb") as file:
            if _looks_like_ours(record, file.read(_ENOUGH)):
                return True
    return any(read_manifest(path) and read_manifest(path / TRAINING_STATE) for path in checkpoints_in(folder))


def _why_not(path: Path) -> str:
    if path.is_symlink():
        return " (a link)"
    if not path.is_dir():
        return ""
    if read_manifest(path) is None:
        return " (no manifest)"
    names = [str(file.relative_to(path)) for file in (unknown_files(path) or edited_files(path))]
    return f" (with {join_names(names)})"


def _model_files(given: str | Path, places: list[Path]) -> list[Path]:
    """Return where a model's files lie. A run's own files beside them are not read."""
    folder = Path(os.path.realpath(Path(given).expanduser()))
    inside = [file for file in folder.iterdir() if file.is_file()] if folder.is_dir() else []
    return [folder, *(Path(os.path.realpath(file)) for file in inside if file not in places)]


def _data_files(given: str | Path) -> list[Path]:
    """Return where rows lie: a file, or the files of a folder that are data by their names."""
    path = Path(given).expanduser()
    files = [path]
    for folder in (path, path / "train", path / "data"):
        if folder.is_dir():
            files += [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES]
    return [Path(os.path.realpath(file)) for file in files]
