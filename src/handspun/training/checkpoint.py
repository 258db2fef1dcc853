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
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from handspun.errors import OutputError
from handspun.files import (
    atomic_folder,
    output_errors,
    read_json_object,
    remove_folder,
    sha256_of,
    sync,
    work_folder,
)
from handspun.models.save import save_model

_VERSION = 1
"""Of what is saved. One that reads otherwise gets the next number."""
_WEIGHTS, _OPTIMIZER, _FACTS = "weights.safetensors", "optimizer.safetensors", "state.json"
_MODEL = "model.safetensors"


def collect_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, keep: bool
) -> dict[str, dict[str, Tensor]]:
    """The files' tensors, whole and on the CPU. If the model is cut over the ranks, all must ask for them. Empty
    without `keep`."""
    gathered: dict[str, dict[str, Tensor]] = {_WEIGHTS: {}, _OPTIMIZER: {}}
    for name, parameter in _trained(model):
        gathered[_WEIGHTS][name] = _whole_tensor(parameter, keep=keep)
        for key, value in optimizer.state[parameter].items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            gathered[_OPTIMIZER][f"{name}.{key}"] = _whole_tensor(tensor, keep=keep)
    return gathered if keep else {}


def write_state(folder: Path, gathered: dict[str, dict[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Fills the folder; weights that lie beside it in the same form are linked, not written again."""
    if not _linked(folder.parent / _MODEL, folder / _WEIGHTS, gathered[_WEIGHTS]):
        save_file(gathered[_WEIGHTS], folder / _WEIGHTS)
    save_file(gathered[_OPTIMIZER], folder / _OPTIMIZER)
    text = json.dumps({"version": _VERSION, **facts}, indent=2)
    (folder / _FACTS).write_text(text + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what was given to `write_state`, and the version. Raises OutputError if a newer one wrote it."""
    facts = read_json_object(folder / _FACTS)
    if facts is None:
        raise OutputError(f"{folder / _FACTS} cannot be read: expected a JSON object. Was it changed by hand?")
    version = facts.get("version", _VERSION)
    if version != _VERSION:
        raise OutputError(
            f"{folder / _FACTS} is of version {version!r} (expected {_VERSION}): another version of Handspun "
            "saved "
            "it. Resume with that one, or choose another --output-dir."
        )
    return facts


def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Puts the trained weights back into the model, in place, before it is cut over the ranks."""
    with _open(folder / _WEIGHTS) as file, torch.no_grad():
        for name, parameter in _trained(model):
            parameter.copy_(_read(file, name, like=parameter))


def read_optimizer(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path | None, device: torch.device
) -> None:
    """Puts the optimizer's states back, in place. Of several ranks the first has the folder, and all must ask.

    torch's `load_state_dict` is not used: it casts states to the type of their weights, and short ones are none.
    """
    several = dist.is_initialized() and dist.get_world_size() > 1
    file = _open(folder / _OPTIMIZER) if folder is not None else None
    for name, parameter in _trained(model):
        state = optimizer.state[parameter]
        for key, value in state.items():
            now = value if isinstance(value, Tensor) else torch.tensor(value)
            read = (
                _read(file, f"{name}.{key}", like=now)
                if file is not None
                else torch.empty(now.shape, dtype=now.dtype)
            )
            if isinstance(now, DTensor):
                now.copy_(distribute_tensor(read.to(device), now.device_mesh, now.placements))
                continue
            now.copy_(read)
            if several:
                dist.broadcast(now, src=0)
            if not isinstance(value, Tensor):
                state[key] = type(value)(now.item())


def _trained(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _whole_tensor(tensor: Tensor, *, keep: bool) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous() if keep else torch.empty(0)


def _linked(model_file: Path, weights_file: Path, weights: dict[str, Tensor]) -> bool:
    """Whether the checkpoint's own file holds the weights as they are, and the disk could link it."""
    try:
        with safe_open(model_file, framework="pt") as file:
            for name, tensor in weights.items():
                part = file.get_slice(name)
                if part.get_dtype() != "F32" or part.get_shape() != list(tensor.shape):
                    return False
        os.link(model_file, weights_file)
    except (OSError, SafetensorError):
        return False
    return True


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{path} cannot be read: {error}. Was it changed by hand?") from error


def _read(file: Any, name: str, *, like: Tensor) -> Tensor:
    """A tensor of the file; its checksum was right, so another shape is another configuration's."""
    try:
        read: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise OutputError(f"the training state holds no {name}: it is another model's. {error}") from error
    if read.shape != like.shape or read.dtype != like.dtype:
        raise OutputError(
            f"the training state holds {name} as {tuple(read.shape)} {read.dtype}, and this run has "
            f"{tuple(like.shape)} {like.dtype}: it is another run's."
        )
    return read


MANIFEST = "manifest.json"
TRAINING_STATE = "training_state"
"""Of a checkpoint that can be resumed from: a folder in it, with a manifest of its own, since it goes first."""
_NAME = re.compile(r"checkpoint-(best|epoch-[0-9]+|step-[0-9]+)")
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_SMALL = 16 * 2**20
"""Bytes up to which a file that somebody may have edited is read again, whatever its times say."""

WriteFiles = Callable[[Path], None]
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
    training_state: WriteFiles | None = None,
    more: WriteFiles | None = None,
) -> None:
    """The model as `folder`, replacing an earlier one there; `facts` (step, loss) go into its manifest.

    card: the text of its README.md, if it is to have one.
    state: its weights, where the model itself does not hold all of them.
    training_state: writes what resuming needs, if it is to be resumed from here.
    more: writes other files, which belong to it.

    Raises OutputError if it cannot be written; `folder` is then as it was.
    """
    with _atomic_dir(folder) as partial:
        save_model(model, tokenizer, partial, dtype=dtype, state=state)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
        if more is not None:
            more(partial)
        write_manifest(partial, facts)
        if training_state is not None:
            _add_training_state(partial, training_state, facts)


def link_checkpoint(
    source: Path, folder: Path, *, facts: Mapping[str, object], training_state: WriteFiles | None = None
) -> None:
    """The checkpoint `source` under a second name, without a second copy where the disk can link files."""
    with _atomic_dir(folder) as partial:
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


def find_corruption(folder: Path) -> str | None:
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
    return find_corruption(folder) is None


@contextmanager
def _atomic_dir(folder: Path) -> Iterator[Path]:
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


def _add_training_state(partial: Path, fill: WriteFiles, facts: Mapping[str, object]) -> None:
    (partial / TRAINING_STATE).mkdir()
    fill(partial / TRAINING_STATE)
    write_manifest(partial / TRAINING_STATE, facts)
    sync(partial / TRAINING_STATE)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
