"""Checkpoints: ordinary model folders, written so that a folder with its final name is whole.

A checkpoint is written to a temporary folder beside its place, synced to the disk, given a manifest with
checksums, and renamed.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from handspun.errors import OutputError
from handspun.models.save import save_model

MANIFEST = "manifest.json"
_PARTIAL = ".partial"


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    dtype: torch.dtype,
    facts: Mapping[str, object],
    state: dict[str, Tensor] | None = None,
) -> None:
    """The model as `folder`, replacing an earlier one there; `facts` (step, loss) go into its manifest.

    state: its weights, where the model itself does not hold all of them.

    Raises OutputError if it cannot be written; `folder` is then as it was.
    """
    with errors_for_people(folder):
        partial = _fresh_partial(folder)
        try:
            save_model(model, tokenizer, partial, dtype=dtype, state=state)
            _finish(partial, folder, facts)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def link_checkpoint(source: Path, folder: Path) -> None:
    """The checkpoint `source` under a second name, without a second copy where the disk can link files."""
    with errors_for_people(folder):
        partial = _fresh_partial(folder)
        try:
            shutil.copytree(source, partial, copy_function=_link_or_copy, dirs_exist_ok=True)
            _replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder's files are all there and are those of its manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return all(_sha256(folder / name) == checksum for name, checksum in manifest["files"].items())
    except (OSError, ValueError, KeyError):
        return False


@contextmanager
def errors_for_people(folder: Path) -> Iterator[None]:
    """Failures of the disk while writing `folder`, as OutputErrors that say what to do."""
    try:
        yield
    except OSError as error:
        raise output_error(folder, error) from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError" or "os error" not in str(error).lower():
            raise
        raise output_error(folder, error) from error  # safetensors wraps the system's error in its own


def output_error(path: Path, error: Exception) -> OutputError:
    """The error that says why `path` cannot be written, and what to do."""
    code = getattr(error, "errno", None)
    if code in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error).lower():
        free = shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free
        return OutputError(
            f"{path} cannot be written: no room left on the disk ({free / 1e9:.1f} GB free). Free some, choose "
            "another --output-dir, or halve the files with --save-dtype bfloat16."
        )
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return OutputError(f"{path} cannot be written: {reason}. Choose another --output-dir.")


def _fresh_partial(folder: Path) -> Path:
    partial = folder.with_name(f".{folder.name}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def _finish(partial: Path, folder: Path, facts: Mapping[str, object]) -> None:
    """Syncs the files, writes the manifest last, and gives the folder its name."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    checksums = {str(path.relative_to(partial)): _sha256(path) for path in files}
    manifest = partial / MANIFEST
    manifest.write_text(json.dumps({**facts, "files": checksums}, indent=2) + "\n", encoding="utf-8")
    _sync(manifest)
    _sync(partial)
    _replace(partial, folder)


def _replace(partial: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old)
    else:
        partial.rename(folder)
    _sync(folder.parent)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
