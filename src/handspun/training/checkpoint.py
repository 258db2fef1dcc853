"""Checkpoints: ordinary model folders, written so that a folder with its final name is whole.

A checkpoint is written to a temporary folder beside its place, synced to the disk, given a manifest with
checksums, and renamed. What was half done when a process was killed has another name, and is cleared away by the
next run (`clear_leftovers`).
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from handspun.files import output_errors, sha256_of, sync
from handspun.models.save import save_model

MANIFEST = "manifest.json"
TRAINING_STATE = "training_state"
"""Of a checkpoint that can be resumed from: a folder in it, with a manifest of its own, since it goes first."""
_PARTIAL, _OLD, _DELETED = ".partial", ".old", ".deleted"

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
) -> None:
    """The model as `folder`, replacing an earlier one there; `facts` (step, loss) go into its manifest.

    card: the text of its README.md, if it is to have one.
    state: its weights, where the model itself does not hold all of them.
    training_state: writes what resuming needs, if it is to be resumed from here.

    Raises OutputError if it cannot be written; `folder` is then as it was.
    """
    with _whole(folder) as partial:
        save_model(model, tokenizer, partial, dtype=dtype, state=state)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        write_manifest(partial, facts)
        if training_state is not None:
            _add_training_state(partial, training_state, facts)


def link_checkpoint(
    source: Path, folder: Path, *, facts: Mapping[str, object], training_state: Fill | None = None
) -> None:
    """The checkpoint `source` under a second name, without a second copy where the disk can link files."""
    with _whole(folder) as partial:
        shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)
        if training_state is not None:
            _add_training_state(partial, training_state, facts)


def remove_checkpoint(folder: Path) -> None:
    """The folder goes, or stays whole: what is being deleted does not have its name any more."""
    with output_errors(folder):
        doomed = folder.with_name(f".{folder.name}{_DELETED}")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def clear_leftovers(output_dir: Path) -> None:
    """What a process that was killed while it wrote, replaced or deleted checkpoints has left half done."""
    with output_errors(output_dir):
        for old in output_dir.glob(f".checkpoint-*{_OLD}"):
            name = old.with_name(old.name.removeprefix(".").removesuffix(_OLD))
            if not name.exists():  # killed between the two renames that replace it
                old.rename(name)
        for suffix in (_PARTIAL, _OLD, _DELETED):
            for leftover in [*output_dir.glob(f".checkpoint-*{suffix}"), *output_dir.glob(f"*/.*{suffix}")]:
                shutil.rmtree(leftover)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Facts and checksums; None without one that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


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
    """An empty folder that gets the name `folder`, all at once, when the block has filled it."""
    with output_errors(folder):
        partial = folder.with_name(f".{folder.name}{_PARTIAL}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            sync(partial)
            _replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path, facts: Mapping[str, object]) -> None:
    """Syncs the folder's files and writes their checksums, last of all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    checksums = {str(path.relative_to(folder)): sha256_of(path) for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": checksums}, indent=2) + "\n", encoding="utf-8")
    sync(manifest)


def _add_training_state(partial: Path, fill: Fill, facts: Mapping[str, object]) -> None:
    (partial / TRAINING_STATE).mkdir()
    fill(partial / TRAINING_STATE)
    write_manifest(partial / TRAINING_STATE, facts)
    sync(partial / TRAINING_STATE)


def _replace(partial: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}{_OLD}")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            old.rename(folder)
            raise
        sync(folder.parent)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
        sync(folder.parent)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
