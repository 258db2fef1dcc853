"""LoRA adapters as loading and decoding see them: in a folder, and in the layers of a model.

peft takes part of a second to import, and most models have no adapter. So its layers are known by their attributes
here, and lora.py, which imports it, is imported where a model has one.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from handspun.errors import ModelError

_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"}
"""Names of the input embedding in different architectures."""


def embedding_rows(adapter: Path) -> int | None:
    """Return the number of rows of an adapter file's embedding, or None if it has no embedding.

    Raises ModelError if it is not a safetensors file.
    """
    file = adapter / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read as safetensors: {error}") from error
    rows = [
        shape[0 if name.endswith("weight") else 1]
        for name, shape in shapes.items()
        if any(part in _EMBEDDINGS for part in name.split("."))
        and ((name.endswith(".weight") and ".lora_" not in name) or name.endswith("lora_embedding_A"))
    ]
    return max(rows, default=None)


def has_adapter(module: nn.Module) -> bool:
    """Return whether peft adds something to the layer."""
    return hasattr(module, "lora_A") or hasattr(module, "token_adapter")


@torch.no_grad()
def merged_weight(module: Any) -> Tensor:
    """Return the layer's weight with its active adapters merged (a copy if there are any)."""
    if hasattr(module, "token_adapter"):  # peft's TrainableTokensWrapper
        return module.token_adapter.get_merged_weights(module.token_adapter.active_adapters)  # type: ignore
    if not hasattr(module, "lora_A"):
        return module.weight.detach()  # type: ignore[no-any-return]
    base: Any = module.get_base_layer()
    weight = base.float_weight() if hasattr(base, "float_weight") else base.weight.detach()
    for name in module.active_adapters:
        if name in module.lora_A:
            weight = weight + module.get_delta_weight(name).to(weight.dtype)
    return weight  # type: ignore[no-any-return]
