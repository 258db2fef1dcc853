"""Checkpoints: ordinary model folders, written atomically, and the training state to resume from.

A checkpoint is written under another name, synced to disk, given a manifest with checksums, and renamed. The
manifest also proves that Handspun wrote the files: files that no manifest lists are never removed.
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
from transformers import PreTrainedModel

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
from handspun.models.load import ChatModel
from handspun.models.save import save_model

_VERSION = 1
"""Version of the training state's format. Increment it when the format changes."""
_WEIGHTS, _OPTIMIZER, _FACTS = "weights.safetensors", "optimizer.safetensors", "state.json"
_MODEL = "model.safetensors"


def collect_state(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, *, keep: bool
) -> dict[str, dict[str, Tensor]]:
    """Return the training state's tensors by file, whole and on the CPU; {} without `keep`.

    If the model is sharded, all ranks must call it together.
    """
    # Nothing random has a state: row orders come from seed and epoch, dropout from seed and step, rounding from
    # seed and the optimizer's step. So a run can resume on another number of processes.
    gathered: dict[str, dict[str, Tensor]] = {_WEIGHTS: {}, _OPTIMIZER: {}}
    for name, parameter in _trained(model):
        gathered[_WEIGHTS][name] = _whole_tensor(parameter, keep=keep)
        for key, value in optimizer.state[parameter].items():
            tensor = value if isinstance(value, Tensor) else torch.tensor(value)
            gathered[_OPTIMIZER][f"{name}.{key}"] = _whole_tensor(tensor, keep=keep)
    return gathered if keep else {}


def write_state(folder: Path, gathered: dict[str, dict[str, Tensor]], facts: Mapping[str, Any]) -> None:
    """Write the training state. If the checkpoint's model file holds the same weights, it is hard-linked."""
    if not _try_link(folder.parent / _MODEL, folder / _WEIGHTS, gathered[_WEIGHTS]):
        save_file(gathered[_WEIGHTS], folder / _WEIGHTS)
    save_file(gathered[_OPTIMIZER], folder / _OPTIMIZER)
    text = json.dumps({"version": _VERSION, **facts}, indent=2)
    (folder / _FACTS).write_text(text + "\n", encoding="utf-8")


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that `write_state` wrote. Raises OutputError if another version of Handspun wrote them."""
    facts = read_json_object(folder / _FACTS)
    if facts is None:
        raise OutputError(f"{folder / _FACTS} cannot be read: expected a JSON object. Was it edited by hand?")
    version = facts.get("version", _VERSION)
    if version != _VERSION:
        raise OutputError(
            f"{folder / _FACTS}: saved by another version of Handspun (expected format {_VERSION}, got "
            f"{version!r}). Resume with that version, or choose another --output-dir."
        )
    return facts


def read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load the trained weights into the model, in place, before it is sharded."""
    with _open(folder / _WEIGHTS) as file, torch.no_grad():
        for name, parameter in _trained(model):
            parameter.copy_(_read(file, name, like=parameter))


def read_optimizer(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, folder: Path | None, device: torch.device
) -> None:
    """Load the optimizer's states, in place. All ranks must call it together.

    Args:
        model: the model that the optimizer trains.
        optimizer: the optimizer, with its states already created.
        folder: the training state; None on all ranks but the first.
        device: where to put tensors before they are sharded.
    """
    # Not torch's load_state_dict: it casts states to the type of their weights, which low-bit states do not have.
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


def _try_link(model_file: Path, weights_file: Path, weights: dict[str, Tensor]) -> bool:
    """Return whether the checkpoint's model file holds these float32 weights and could be linked."""
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
        raise OutputError(f"{path} cannot be read: {error}. Was it edited by hand?") from error


def _read(file: Any, name: str, *, like: Tensor) -> Tensor:
    """Return a tensor of the file, whose checksum was right: a wrong shape means another configuration."""
    try:
        read: Tensor = file.get_tensor(name)
    except SafetensorError as error:
        raise OutputError(f"the training state has no {name}: it belongs to another model. {error}") from error
    if read.shape != like.shape or read.dtype != like.dtype:
        raise OutputError(
            f"the training state belongs to another run: {name} is {tuple(read.shape)} {read.dtype} "
            f"(expected {tuple(like.shape)} {like.dtype})."
        )
    return read


MANIFEST = "manifest.json"
TRAINING_STATE = "training_state"
"""Folder in a checkpoint to resume from. It has its own manifest, since it is removed earlier than the model."""
_NAME = re.compile(r"checkpoint-(best|epoch-[0-9]+|step-[0-9]+)")
_CHECKSUM = re.compile(r"[0-9a-f]{64}")
_SMALL = 16 * 2**20
"""Files up to this many bytes are always read to find edits, whatever their modification time is."""

WriteFiles = Callable[[Path], None]
"""Writes files into a folder, without its manifest."""


def save_checkpoint(
    chat: ChatModel,
    folder: Path,
    *,
    dtype: torch.dtype,
    facts: Mapping[str, object],
    card: str | None = None,
    state: dict[str, Tensor] | None = None,
    training_state: WriteFiles | None = None,
    more: WriteFiles | None = None,
) -> None:
    """Save the model as `folder`, atomically, replacing an earlier checkpoint there.

    Raises OutputError if it cannot be written; `folder` is then unchanged.

    Args:
        chat: the model and its tokenizer.
        folder: the checkpoint's final path.
        dtype: type of the saved weights.
        facts: entries for the manifest, such as step and loss.
        card: text of README.md, if any.
        state: the weights, if the model itself does not hold all of them.
        training_state: writes what resuming needs; None if the run will not resume from here.
        more: writes further files of the checkpoint.
    """
    with _atomic_dir(folder) as partial:
        save_model(chat.model, chat.tokenizer, partial, dtype=dtype, state=state)
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
    """Give the checkpoint `source` a second name, with hard links instead of copies where possible.

    Args:
        source: an existing checkpoint.
        folder: the second path.
        facts: entries for the manifest of the training state.
        training_state: writes what resuming needs; None if the run will not resume from here.
    """
    with _atomic_dir(folder) as partial:
        manifest = read_manifest(source)
        assert manifest is not None
        for name in (*manifest["files"], MANIFEST):  # not files that a user has added
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(source / name, partial / name)
        if training_state is not None:
            _add_training_state(partial, training_state, facts)


def is_checkpoint_name(name: str) -> bool:
    """Return whether runs give checkpoints this name."""
    return bool(_NAME.fullmatch(name))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint or a training state, unless it holds files that Handspun did not write.

    Raises OutputError.
    """
    is_state = folder.name == TRAINING_STATE
    # It is renamed before it is deleted, so a partly deleted folder never has a checkpoint's name.
    if not unknown_files(folder):
        remove_folder(folder, work=work_folder(folder.parent) if is_state else None)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest (facts and checksums), or None if there is none or it is invalid."""
    manifest = read_json_object(folder / MANIFEST)
    files = (manifest or {}).get("files")
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        return None
    return manifest if all(map(_CHECKSUM.fullmatch, files.values())) else None


def step_of(folder: Path) -> int | None:
    """Return the step after which the checkpoint was saved, if its manifest has it."""
    step = (read_manifest(folder) or {}).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def unknown_files(folder: Path) -> list[Path]:
    """Return the folder's files that no manifest lists. Without a manifest, that is all of them."""
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
    """Return the nonempty files that changed since Handspun saved them."""
    edited = []
    for place in (folder, folder / TRAINING_STATE):
        manifest = read_manifest(place)
        for name, checksum in manifest["files"].items() if manifest else ():
            path = place / name
            if not path.is_file() or not (status := path.stat()).st_size:
                continue
            # The manifest was written last: a large file that is older has not changed, and need not be read.
            untouched = status.st_mtime_ns <= (place / MANIFEST).stat().st_mtime_ns
            if not (untouched and status.st_size > _SMALL) and sha256_of(path) != checksum:
                edited.append(path)
    return edited


def find_corruption(folder: Path) -> str | None:
    """Return a description of the folder's first damaged file, or None if all match the manifest."""
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
    """Return whether all files of the folder's manifest are there and undamaged."""
    return find_corruption(folder) is None


@contextmanager
def _atomic_dir(folder: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `folder`, atomically, at the end of the block."""
    # An existing folder with a user's files in it is not replaced but renamed.
    if folder.exists() and unknown_files(folder):
        keep_aside(folder, "kept")
    with atomic_folder(folder) as new:
        yield new


def keep_aside(folder: Path, why: str) -> Path:
    """Rename a folder, for example to `kept-checkpoint-best`, to free its name. Return the new path."""
    names = (f"{why}-{folder.name}{number}" for number in ("", *(f"-{n}" for n in range(2, 1000))))
    place = next(place for name in names if not os.path.lexists(place := folder.with_name(name)))
    with output_errors(folder):
        folder.rename(place)
        sync(folder.parent)
    return place


def write_manifest(folder: Path, facts: Mapping[str, object]) -> None:
    """Sync the folder's files, then write their checksums and the facts as its manifest."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = folder / MANIFEST
    # All files get the mode that the umask gives a new file: libraries write through temporary files, which only
    # their owner may read.
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
