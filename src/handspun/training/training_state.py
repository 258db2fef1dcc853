"""What resuming needs, as files: the trained weights in float32, the optimiser's states, and the rest as JSON.

No random state is among it: the order of the rows is a function of seed and epoch, dropout of seed and step, the
rounding of short states of seed and the optimiser's step.
"""

import json
import os
from collections.abc import Iterator, Mapping
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
from handspun.files import read_json_object

_VERSION = 1
"""Of what is saved. One that reads otherwise gets the next number."""
_WEIGHTS, _OPTIMIZER, _FACTS = "weights.safetensors", "optimizer.safetensors", "state.json"
_MODEL = "model.safetensors"


def gather(
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
    """Puts the optimiser's states back, in place. Of several ranks the first has the folder, and all must ask.

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
