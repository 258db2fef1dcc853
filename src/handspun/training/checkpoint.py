"""Checkpoints: ordinary model folders, written so that a folder with its final name is whole.

A checkpoint is written under another name, synced to the disk, given a manifest with checksums, and renamed
(`staging.py`). Its manifest is also the proof that this program wrote it: what no manifest names is never removed.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from handspun.files import output_errors, read_json_object, sha256_of, sync
from handspun.models.save import save_model
from handspun.training.staging import atomic_folder, remove_folder, work_folder

MANIFEST = "manifest.json"
TRAINING_STATE = "training_state"
"""Of a checkpoint that can be resumed from: a folder in it, with a manifest of its own, since it goes first."""
_NAME = re.compile(r"checkpoint-(best|epoch-[0-9]+|step-[0-9]+)")
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_SMALL = 16 * 2**20
"""Bytes up to which a file that somebody may have edited is read again, whatever its times say."""

Fill = Callable[[Path], None]
"""Writes files into a folder; the folder's manifest is not its business."""


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    facts: Mapping[str, object],
    card: str | None = None,
    state: dict[str, Tensor] | None = None,
    training_state: Fill | None = None,
    more: Fill | None = None,
) -> None:
    """The model as `folder`, replacing an earlier one there; `facts` (step, loss) go into its manifest.

    card: the text of its README.md, if it is to have one.
    state: its weights, where the model itself does not hold all of them.
    training_state: writes what resuming needs, if it is to be resumed from here.
    more: writes other files, which belong to it.

    Raises OutputError if it cannot be written; `folder` is then as it was.
    """
    with _whole(folder) as partial:
        save_model(model, tokenizer, partial, dtype=dtype, state=state)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if more is not None:
            more(partial)
        write_manifest(partial, facts)
        if training_state is not None:
            _add_training_state(partial, training_state, facts)


def link_checkpoint(
    source: Path, folder: Path, *, facts: Mapping[str, object], training_state: Fill | None = None
) -> None:
    """The checkpoint `source` under a second name, without a second copy where the disk can link files."""
    with _whole(folder) as partial:
        manifest = read_manifest(source)
        assert manifest is not None
        for name in (*manifest["files"], MANIFEST):  # and nothing that somebody has put beside them
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source / name, partial / name)
        if training_state is not None:
            _add_training_state(partial, training_state, facts)


def is_checkpoint_name(name: str) -> bool:
    """Return whether a run gives this name to a checkpoint."""
    return bool(_NAME.fullmatch(name))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, or its training state; one that holds anything of somebody else's stays.

    It goes, or stays whole: what is being deleted does not have its name any more. Raises OutputError.
    """
    is_state = folder.name == TRAINING_STATE
    if not unknown_files(folder):
        remove_folder(folder, work=work_folder(folder.parent) if is_state else None)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return facts and checksums; None without a manifest that can be read."""
    manifest = read_json_object(folder / MANIFEST)
    files = (manifest or {}).get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        return None
    return manifest if all(map(_CHECKSUM.fullmatch, files.values())) else None


def step_of(folder: Path) -> int | None:
    """Return the optimizer step after which the checkpoint was saved, if its manifest says so."""
    step = (read_manifest(folder) or {}).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def unknown_files(folder: Path) -> list[Path]:
    """Return what is in the folder and in no manifest: somebody else's. All of a folder without a manifest."""
    if folder.is_symlink() or not folder.is_dir():
        return [folder]
    manifest = read_manifest(folder)
    known = {folder / name for name in manifest["files"]} | {folder / MANIFEST} if manifest else set()
    state = folder / TRAINING_STATE
    unknown = []
    for place, folders, files in os.walk(folder):
        if Path(place) == folder and state.is_dir() and not state.is_symlink():
            folders.remove(TRAINING_STATE)
            unknown += unknown_files(state)
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        unknown += [path for name in [*files, *links] if (path := Path(place) / name) not in known]
    return sorted(unknown)


def edited_files(folder: Path) -> list[Path]:
    """Return the files that are not as this program saved them, and hold something that could be lost.

    A large file is read only if it is younger than the manifest, which was written last.
    """
    edited = []
    for place in (folder, folder / TRAINING_STATE):
        manifest = read_manifest(place)
        for name, checksum in manifest["files"].items() if manifest else ():
            path = place / name
            if not path.is_file() or not (status := path.stat()).st_size:
                continue
            untouched = status.st_mtime_ns <= (place / MANIFEST).stat().st_mtime_ns
            if not (untouched and status.st_size > _SMALL) and sha256_of(path) != checksum:
                edited.append(path)
    return edited


def damage(folder: Path) -> str | None:
    """What is wrong with a folder, in words; None if all files of its manifest are as they were saved."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{folder / MANIFEST} is missing or cannot be read"
    for name, checksum in manifest["files"].items():
        try:
            if sha256_of(folder / name) != checksum:
                return f"{folder / name} is not as it was saved"
        except OSError as error:
            return f"{folder / name} cannot be read: {error.strerror}"
    return None


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder's files are all there and are those of its manifest."""
    return damage(folder) is None


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that gets the name `folder`, all at once, when the block has filled it.

    If somebody has put files into the folder that has the name now, it is kept under another one.
    """
    if folder.exists() and unknown_files(folder):
        keep_aside(folder, "kept")
    with atomic_folder(folder) as new:
        yield new


def keep_aside(folder: Path, why: str) -> Path:
    """Rename a folder to `kept-checkpoint-best` or the like, so that its name is free. Return where it is."""
    names = (f"{why}-{folder.name}{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    place = next(place for name in names if not os.path.lexists(place := folder.with_name(name)))
    with output_errors(folder):
        folder.rename(place)
        sync(folder.parent)
    return place


def write_manifest(folder: Path, facts: Mapping[str, object]) -> None:
    """Sync the folder's files and write their checksums, last of all.

    All get the mode that the umask gives a new file: libraries write through temporary files, which nobody else
    may read.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = folder / MANIFEST
    manifest.touch()
    mode = stat.S_IMODE(manifest.stat().st_mode)
    for path in files:
        if stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
        sync(path)
    checksums = {str(path.relative_to(folder)): sha256_of(path) for path in files}
    manifest.write_text(json.dumps({**facts, "files": checksums}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)


def _add_training_state(partial: Path, fill: Fill, facts: Mapping[str, object]) -> None:
    (partial / TRAINING_STATE).mkdir()
    fill(partial / TRAINING_STATE)
    write_manifest(partial / TRAINING_STATE, facts)
    sync(partial / TRAINING_STATE)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
