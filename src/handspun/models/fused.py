"""A model's weights laid out for decoding: layers with the same input are fused into one matrix.

Supports Llama's architecture (RMSNorm, rotary positions, grouped queries, SwiGLU): Llama, SmolLM2, Qwen2/2.5,
Qwen3, Mistral. Other models are decoded through transformers' own forward.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handspun.kernels import kernels_for
from handspun.kernels.cpu import has_bfloat16
from handspun.kernels.onednn import linear_padded_rows
from handspun.models.adapters import has_adapter, merged_weight
from handspun.models.int8 import check_exact, quantize_channels

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class InferenceLinear(Protocol):
    """The weights of one linear layer, or of several with the same input. Arrays are (tokens, ...), float32."""

    def __call__(self, x: Tensor) -> Tensor:
        """Map (tokens, in) to (tokens, out)."""

    def after_rms_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """Apply RMSNorm, then the layer: (tokens, in) to (tokens, out). norm: (in,)."""

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        """Apply SwiGLU, then the layer: (tokens, 2 * in) to (tokens, out)."""

    def embed(self, rows: Tensor) -> Tensor:
        """Look up rows of the matrix, as an embedding: (tokens,) to (tokens, in)."""


_FLOAT32_ROWS, _BFLOAT16_ROWS, _EMULATED_ROWS = 4, 2, 32
"""Most rows for which our kernel is the fastest: float32, and bfloat16 with and without the CPU's instructions.

For 2 to 4 rows of float32 on a Sapphire Rapids, MKL and oneDNN take 1.3 to 2.5 times as long.
"""


class FloatProduct:
    """An `InferenceLinear` in the weights' own float type."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Keep the weights. weight: (out, in). bias: (out,)."""
        self.weight, self._bias = weight, bias
        self._kernels = kernels_for(weight.device)
        self._dtype = weight.dtype
        self._own_rows = 0
        if weight.device.type == "cpu" and self._kernels.can_multiply_floats(weight.shape[1]):
            if weight.dtype == torch.float32:
                self._own_rows = _FLOAT32_ROWS
            elif weight.dtype == torch.bfloat16:
                # On a CPU without instructions for bfloat16, PyTorch takes 1.3 times as long as our kernel for one
                # row, and 2.3 times for 4 to 32. It also rounds activations.
                self._own_rows = _BFLOAT16_ROWS if has_bfloat16() else _EMULATED_ROWS
                self._dtype = torch.bfloat16 if has_bfloat16() else torch.float32

    def __call__(self, x: Tensor) -> Tensor:
        """Map (tokens, in) to (tokens, out)."""
        if len(x) <= self._own_rows:
            bias = None if self._bias is None else self._bias.float()
            return self._kernels.float_matmul(x.float(), self.weight, bias)
        bias = None if self._bias is None else self._bias.to(self._dtype)
        return linear_padded_rows(x.to(self._dtype), self.weight.to(self._dtype), bias).float()

    def after_rms_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """Apply RMSNorm, then the layer."""
        return self(F.rms_norm(x, norm.shape, norm, eps))

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        """Apply SwiGLU, then the layer."""
        return self(_gated(gate_up))

    def embed(self, rows: Tensor) -> Tensor:
        """Look up rows of the matrix."""
        return F.embedding(rows, self.weight).float()


class Int8Product:
    """An `InferenceLinear` in int8, with one scale per output channel and one per token."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Quantize the weights. weight: (out, in), float. bias: (out,)."""
        matrix, self.scale = quantize_channels(weight)
        self.bias = None if bias is None else bias.float()
        self._kernels = kernels_for(weight.device)
        self.matrix = self._kernels.int8_weight(matrix)

    def __call__(self, x: Tensor) -> Tensor:
        """Map (tokens, in) to (tokens, out)."""
        return self._matmul(*self._kernels.quantize(x))

    def after_rms_norm(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """Apply RMSNorm, then the layer."""
        return self._matmul(*self._kernels.norm_quantize(x, norm, eps))

    def after_swiglu(self, gate_up: Tensor) -> Tensor:
        """Apply SwiGLU, then the layer."""
        return self._matmul(*self._kernels.gate_quantize(gate_up))

    def embed(self, rows: Tensor) -> Tensor:
        """Look up rows of the matrix."""
        return self._kernels.hadamard(self.matrix.rows(rows).float().mul_(self.scale[rows, None]))

    def _matmul(self, rows: Tensor, row_scale: Tensor) -> Tensor:
        """Multiply quantized rows. rows: (tokens, in), int8. row_scale: (tokens, 1)."""
        return self.matrix.matmul(rows, row_scale, self.scale, self.bias)


def check_exact_decoding(device: torch.device) -> None:
    """Raise ModelError if the int8 matmuls of decoding are missing on the device, or not exact.

    Runs these matmuls with the largest values.
    """
    check_exact([decoded_sums], device, remedy="--weights float32")


def decoded_sums(rows: Tensor, weight: Tensor) -> Tensor:
    """Return rows @ weight.T as decoding computes it: (count, out), float32.

    rows: (count, in), int8. weight: (out, in), int8.
    """
    ones = torch.ones(len(weight), device=rows.device)
    row_scale = torch.ones(len(rows), 1, device=rows.device)
    return kernels_for(weight.device).int8_weight(weight).matmul(rows, row_scale, ones, None)


def _gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


_FAMILIES = {"llama", "qwen2", "qwen3", "mistral"}
_ROTATIONS = {"default", "linear", "llama3", "yarn"}
"""Types of rotary positions whose frequencies do not depend on the length."""


@dataclass(frozen=True)
class FusedLayer:
    """The weights of one decoder layer. qkv: queries, keys, and values concatenated. gate_up: gate, then up."""

    attention_norm: Tensor
    qkv: InferenceLinear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: InferenceLinear
    mlp_norm: Tensor
    gate_up: InferenceLinear
    down: InferenceLinear


@dataclass(frozen=True)
class FusedWeights:
    """The weights of all layers, and the constants of the forward pass."""

    heads: int
    kv_heads: int
    head_size: int
    norm_eps: float
    embedding: Callable[[Tensor], Tensor]
    """Maps token ids, (tokens,), to (tokens, hidden), float32."""
    frequencies: Tensor
    """(head_size / 2,): rotation angle per position."""
    attention_scaling: float
    """Factor of the cosines and sines (YaRN)."""
    layers: list[FusedLayer]
    norm: Tensor
    head: InferenceLinear
    device: torch.device
    cache_dtype: torch.dtype
    is_int8: bool


def fusing_unsupported_reason(config: "PretrainedConfig") -> str | None:
    """Return why a model must be decoded through transformers' forward, or None if its weights can be fused."""
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
        return f"its rotary positions are of type {rotation}"
    return None


# The model's weights stay tensors that can be trained, whatever mode the caller is in.
@torch.inference_mode(False)
@torch.no_grad()
def fused_weights(model: "PreTrainedModel", *, int8: bool = False) -> FusedWeights:
    """Return the model's weights laid out for decoding. LoRA adapters (peft's) are merged into copies.

    In float, the layers' own weights become views of the fused ones. With int8, their float weights are moved to
    the meta device.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "peft_config") else wrapped
    fuse = _fused_int8 if int8 else _fused_float
    body, config, device, dtype = base.model, base.config, base.device, base.dtype
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tied = config.tie_word_embeddings
    embedding = fuse([body.embed_tokens])
    head = embedding if tied else fuse([base.lm_head])
    if int8 and tied:  # the head holds the embedding's weights, too
        base.lm_head.to("meta")
    return FusedWeights(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=head_size,
        norm_eps=config.rms_norm_eps,
        embedding=embedding.embed,
        frequencies=body.rotary_emb.inv_freq.float(),
        attention_scaling=body.rotary_emb.attention_scaling,
        layers=[_layer(layer, fuse) for layer in body.layers],
        norm=_norm(body.norm),
        head=head,
        device=device,
        cache_dtype=_cache_dtype(device, dtype, int8=int8),
        is_int8=int8,
    )


def _cache_dtype(device: torch.device, dtype: torch.dtype, *, int8: bool) -> torch.dtype:
    """Return the dtype of the KV cache."""
    if device.type != "cpu":
        return torch.float32 if int8 else dtype
    # Beside rows rounded to int8, float16 costs less than 0.06 % in perplexity and is read in half the time.
    # Attention computes in float32, in which it is faster on a CPU than in bfloat16.
    return torch.float16 if int8 else torch.float32


def _layer(layer: Any, fuse: Callable[[Sequence[Any]], InferenceLinear]) -> FusedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return FusedLayer(
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
    return weight.detach().to(torch.float32, copy=True)  # a view of the model's file would keep it in memory


def _fused_float(linears: Sequence[Any]) -> InferenceLinear:
    if any(has_adapter(linear) for linear in linears):
        weight = torch.cat([merged_weight(linear) for linear in linears])
    else:
        weight = _fuse_in_place([linear.weight for linear in linears])
    return FloatProduct(weight, _fused_bias(linears))


def _fused_int8(linears: Sequence[Any]) -> InferenceLinear:
    weights = [merged_weight(linear) for linear in linears]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)  # a head is not copied
    matmul = Int8Product(weight, _fused_bias(linears))
    for linear in linears:
        # Layer by layer, so that the model is never held twice.
        linear.to("meta")
    return matmul


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


def unfuse_weights(model: "PreTrainedModel") -> None:
    """Give each weight its own memory again, after `fused_weights` made it a view of a fused one."""
    # So a run makes the same steps with and without answers before training.
    for weight in model.parameters():
        if weight.untyped_storage().nbytes() != weight.nbytes:
            weight.data = weight.detach().clone()


def _fuse_in_place(weights: Sequence[nn.Parameter]) -> Tensor:
    """Concatenate the weights' rows into one matrix, and turn the weights into views of it."""
    first, rows = weights[0].detach(), sum(len(weight) for weight in weights)
    # Weights that lie one after another, as after an earlier call, are not copied again.
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
