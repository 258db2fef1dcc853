"""A model cut over the ranks (PyTorch's FSDP2): each holds its share of all weights, gradients, optimiser states.

A layer's weights are put together when it is computed and let go of afterwards, by hooks of the module's forward
and backward. So whatever looks at weights runs inside the forward of one root module, on all ranks at once.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_Result = TypeVar("_Result")


class _Root(nn.Module):
    """A module whose forward is any computation on the model in it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[..., _Result], *arguments: object) -> _Result:
        return compute(*arguments)


def shard(model: PreTrainedModel, device: torch.device) -> nn.Module:
    """Cuts the model over all ranks, in place, and moves it to the device: a decoder layer is a unit, and what is
    outside of the layers another. Returns the root: `root(compute, *arguments)` is `compute(*arguments)` with
    whole weights.

    Gradients are summed over the ranks, not averaged.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    root = _Root(model)
    units = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    for unit in [*units, root]:
        fully_shard(unit, mesh=mesh)
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return root


def whole_state(model: PreTrainedModel, *, keep: bool) -> dict[str, Tensor]:
    """The model's state on the CPU, put together from all ranks, which must all ask for it; empty without `keep`.

    Tied weights are one tensor. Of a model with adapters, only what is trained.
    """
    state: dict[str, Tensor] = {}
    whole: dict[int, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if hasattr(model, "peft_config") and not tensor.requires_grad:
            continue
        if id(tensor) not in whole:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole[id(tensor)] = full.detach().cpu() if keep else torch.empty(0)
        state[name] = whole[id(tensor)]
    return state if keep else {}
