"""Decoder layers of a packed model on a CPU, with native kernels for what lies between their matmuls.

Supports Llama's architecture, as fused decoding does. Linear layers stay what they are: peft's, int8, or sharded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from handspun.kernels import kernels_for, onednn
from handspun.kernels.between_matmuls import RMSNorm, add_norm, rotate_heads, swiglu
from handspun.kernels.packed_attention import PackedHeads, packed_attention
from handspun.models.fused import fusing_unsupported_reason


def can_compute_layers(config: PreTrainedConfig, device: torch.device) -> bool:
    """Return whether our forward pass supports a text model's layers, and is worth using on the device."""
    if device.type != "cpu" or fusing_unsupported_reason(config) is not None or config.attention_dropout:
        return False
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return kernels_for(device).can_attend_packs(heads, kv_heads, head_size)


@contextmanager
def packed_layers(model: PreTrainedModel) -> Iterator[None]:
    """Give the model's decoder layers our forward pass within the block, if they are supported."""
    if not can_compute_layers(model.config.get_text_config(), model.device):
        yield
        return
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "peft_config") else wrapped
    layers: list[Any] = list(base.get_decoder().layers)
    kinds: list[Any] = [type(layer) for layer in layers]
    # A subclass, not another `forward` of the instance: transformers adds activation checkpointing to the class's.
    for layer, kind in zip(layers, kinds, strict=True):
        layer.__class__ = _with_our_forward(kind)
    try:
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            if type(layer) is _with_our_forward(kind):  # FSDP2 has classes of its own, and stays
                layer.__class__ = kind


@cache
def _with_our_forward(kind: Any) -> Any:
    if issubclass(kind, _PackedLayer):  # in a block within a block
        return kind
    # By its name, `shard` finds a layer.
    return type(kind.__name__, (_PackedLayer, kind), {"__doc__": kind.__doc__})


class _PackedLayer:
    def forward(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        if _can_compute(hidden_states, options.get("masks")):
            return _layer(self, hidden_states[0], options["position_embeddings"], options["masks"].edges)[None]
        return super().forward(hidden_states, *arguments, **options)  # type: ignore[misc]


def _can_compute(x: Tensor, masks: Any) -> bool:
    """Return whether our kernels can compute a layer of this input: not if it is not packed, or not in float32."""
    if masks is None or masks.dense is not None or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == torch.bfloat16


def _layer(layer: Any, x: Tensor, positions: tuple[Tensor, Tensor], edges: list[int]) -> Tensor:
    """Return the layer's output, (tokens, hidden). positions: cosines and sines, (1, tokens, size)."""
    attention, mlp, kernels = layer.self_attn, layer.mlp, kernels_for(x.device)
    norm, dtype = _norm(layer.input_layernorm), _input_dtype(attention.q_proj)
    x, *inputs = add_norm(kernels, x, None, norm, dtype=dtype, consumers=3)
    queries, keys, values = (
        _apply(linear, y).unflatten(1, (-1, attention.head_dim))
        for linear, y in zip((attention.q_proj, attention.k_proj, attention.v_proj), inputs, strict=True)
    )
    if hasattr(attention, "q_norm"):
        queries, keys = _normed(queries, attention.q_norm), _normed(keys, attention.k_norm)
    cosines, sines = positions[0][0], positions[1][0]
    queries, keys = (rotate_heads(kernels, heads, cosines, sines) for heads in (queries, keys))
    with torch.autocast("cpu", enabled=False):  # attention is in float32, and so is its plain form
        heads = PackedHeads(queries, keys, values.float(), edges, attention.scaling)
        attended = packed_attention(kernels, heads).flatten(1)
    norm, dtype = _norm(layer.post_attention_layernorm), _input_dtype(mlp.gate_proj)
    x, *inputs = add_norm(kernels, x, _apply(attention.o_proj, attended), norm, dtype=dtype, consumers=2)
    gate, up = _apply(mlp.gate_proj, inputs[0]), _apply(mlp.up_proj, inputs[1])
    return x + _apply(mlp.down_proj, swiglu(kernels, gate, up))


def _apply(layer: Any, x: Tensor) -> Tensor:
    """Return the output of a linear layer, (tokens, out)."""
    if type(layer) is nn.Linear and onednn.beats_mkl(x.device) and not torch.is_autocast_enabled("cpu"):
        return onednn.linear(x, layer.weight, layer.bias)
    y: Tensor = layer(x)
    return y


def _norm(norm: Any) -> RMSNorm:
    return RMSNorm(norm.weight, norm.variance_epsilon)


def _normed(heads: Tensor, norm: Any) -> Tensor:
    """Normalize each head, (tokens, heads, size)."""
    rows = heads.flatten(0, 1).float()
    _, normed = add_norm(kernels_for(rows.device), rows, None, _norm(norm), dtype=torch.float32, consumers=1)
    return normed.view(heads.shape)


def _input_dtype(linear: Any) -> torch.dtype:
    """Return the type of a linear layer's matmul, to which its input is rounded."""
    float_matmul = isinstance(getattr(linear, "base_layer", linear), nn.Linear)  # not int8, which rounds by itself
    in_autocast = float_matmul and torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if in_autocast else torch.float32
