"""A model's weights as decoding multiplies by them: fused where one input feeds several layers, and nothing else.

For the families whose layers are Llama's: RMSNorm, rotary positions, grouped queries, SwiGLU (Llama, SmolLM2,
Qwen2/2.5, Qwen3, Mistral). Other models are decoded through transformers' own forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from handspun.models.lora import has_adapter, merged_weight
from handspun.models.products import FloatProduct, Int8Product, Product

_FAMILIES = {"llama", "qwen2", "qwen3", "mistral"}
_ROTATIONS = {"default", "linear", "llama3", "yarn"}
"""Whose frequencies do not change with the length."""


@dataclass(frozen=True)
class LeanLayer:
    """One decoder layer. qkv: queries, keys and values end to end; gate_up: gate, then up."""

    attention_norm: Tensor
    qkv: Product
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


@dataclass(frozen=True)
class LeanModel:
    """All layers, and the numbers that the forward pass needs."""

    heads: int
    kv_heads: int
    head_size: int
    norm_eps: float
    embedding: Callable[[Tensor], Tensor]
    """Token ids, (tokens,), to (tokens, hidden), float32."""
    frequencies: Tensor
    """(head_size / 2,): angle of a rotation by one position."""
    attention_scaling: float
    """What cosines and sines are multiplied by (YaRN)."""
    layers: list[LeanLayer]
    norm: Tensor
    head: Product
    device: torch.device
    cache_dtype: torch.dtype
    is_int8: bool


def cannot_be_lean(config: PretrainedConfig) -> str | None:
    """Why a model is decoded through transformers' forward; None if it need not be."""
    if config.model_type not in _FAMILIES:
        return f"{config.model_type} is not one of {', '.join(sorted(_FAMILIES))}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "some of its layers have a sliding window"
    if config.model_type == "mistral" and config.sliding_window is not None:
        return f"it has a sliding window of {config.sliding_window} tokens"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}"
    rotation = (config.rope_parameters or {}).get("rope_type", "default")
    if rotation not in _ROTATIONS:
        return f"its positions are rotated by {rotation}"
    return None


@torch.inference_mode(False)  # the model's weights stay tensors that can be trained
@torch.no_grad()
def lean_model(model: PreTrainedModel, *, int8: bool = False) -> LeanModel:
    """The model's weights for decoding; its LoRA adapters (peft's), if it has some, are merged into copies.

    In float, fused weights replace the layers' own, which become views of them: nothing is held twice. With int8
    they are rounded one after another, and the layers' own are given up: they are moved to the meta device.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "peft_config") else wrapped
    fuse = _fused_int8 if int8 else _fused_float
    body, config, device, dtype = base.model, base.config, base.device, base.dtype
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tied = config.tie_word_embeddings
    embedding = fuse([body.embed_tokens])
    head = embedding if tied else fuse([base.lm_head])
    return LeanModel(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
        norm_eps=config.rms_norm_eps,
        embedding=embedding.rows_of_weight,
        frequencies=body.rotary_emb.inv_freq.float(),
        attention_scaling=body.rotary_emb.attention_scaling,
        layers=[_layer(layer, fuse) for layer in body.layers],
        norm=body.norm.weight.detach().float(),
        head=head,
        device=device,
        cache_dtype=torch.float32 if int8 else dtype,
        is_int8=int8,
    )


def _layer(layer: Any, fuse: Callable[[Sequence[Any]], Product]) -> LeanLayer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return LeanLayer(
        attention_norm=_norm(layer.input_layernorm),
        qkv=fuse([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=None if q_norm is None else _norm(q_norm),
        k_norm=None if k_norm is None else _norm(k_norm),
        o=fuse([attention.o_proj]),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=fuse([mlp.gate_proj, mlp.up_proj]),
        down=fuse([mlp.down_proj]),
    )


def _norm(norm: nn.Module) -> Tensor:
    weight = norm.weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()


def _fused_float(linears: Sequence[Any]) -> Product:
    if any(has_adapter(linear) for linear in linears):
        weight = torch.cat([merged_weight(linear) for linear in linears])
    else:
        weight = _side_by_side([linear.weight for linear in linears])
    return FloatProduct(weight, _fused_bias(linears))


def _fused_int8(linears: Sequence[Any]) -> Product:
    weight = torch.cat([merged_weight(linear) for linear in linears])
    product = Int8Product(weight, _fused_bias(linears), is_embedding=isinstance(linears[0], nn.Embedding))
    for linear in linears:
        linear.to("meta")  # the float weights are given up
    return product


def _fused_bias(linears: Sequence[Any]) -> Tensor | None:
    biases = [getattr(linear, "bias", None) for linear in linears]
    if all(bias is None for bias in biases):
        return None
    return torch.cat(
        [
            torch.zeros(linear.out_features, device=linear.weight.device) if bias is None else bias.detach()
            for linear, bias in zip(linears, biases, strict=True)
        ]
    )


def own_weights(model: PreTrainedModel) -> None:
    """Gives each weight memory of its own again, after `lean_model` made them views of fused ones."""
    for weight in model.parameters():
        if weight.untyped_storage().nbytes() != weight.nbytes:
            weight.data = weight.detach().clone()


def _side_by_side(weights: Sequence[nn.Parameter]) -> Tensor:
    """One matrix with the rows of all of them, of which they become views."""
    first, rows = weights[0].detach(), sum(len(weight) for weight in weights)
    end, apart = first.data_ptr(), False
    for weight in weights:
        apart = apart or weight.data_ptr() != end or not weight.is_contiguous()
        apart = apart or weight.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        end += weight.nbytes
    if not apart:
        return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())
    whole = torch.cat([weight.detach() for weight in weights])
    for weight, part in zip(weights, whole.split([len(weight) for weight in weights]), strict=True):
        weight.data = part
    return whole
