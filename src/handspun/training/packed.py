"""The packed runner: rows are concatenated, and each attends only to itself and the shared prefix.

The LM head sees only positions that predict a target token, in chunks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from handspun.data.examples import Example
from handspun.kernels import kernels_for
from handspun.kernels.onednn import without_cudnn
from handspun.kernels.packed_attention import PackedHeads
from handspun.kernels.packed_attention import packed_attention as attend_in_kernels
from handspun.training.batching import Batching, Pack
from handspun.training.objectives import (
    CallInForward,
    call_directly,
    dense_gradient,
    head_logits,
    linear_cross_entropy,
    linear_cross_entropy_backward,
)
from handspun.training.packed_layers import packed_layers

_ATTENTION = "handspun_packed"
MAX_DENSE_MASK_TOKENS = 8192
"""On a GPU, packs of up to this many tokens use one dense (tokens, tokens) mask."""


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Give the model packed attention within the block, through transformers' AttentionInterface.

    Layers that our kernels support are computed by `packed_layers`, and do not come to that.
    """
    AttentionInterface.register(_ATTENTION, _attend)
    # No square mask of transformers': sequences are sliced instead.
    AttentionMaskInterface.register(_ATTENTION, lambda *_, **__: None)
    with attention_of(model, _ATTENTION), packed_layers(model):
        yield


@contextmanager
def attention_of(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Switch the model to another of transformers' attention implementations within the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(frozen=True)
class Masks:
    """A pack and its attention masks, made once for all layers.

    dense: one mask for the pack, (tokens, tokens), 0 where a position attends and -inf elsewhere. Without it,
    a kernel attends, or each sequence has a mask of its own.
    """

    pack: Pack
    dense: Tensor | None

    @cached_property
    def per_sequence(self) -> list[Tensor | None]:
        """One mask per sequence, (rest, prefix + rest), true where a position attends; None means causal."""
        pack = self.pack
        prefix, device = pack.shared_prefix_length, pack.input_ids.device
        return [_mask(stop - start, prefix, device) for start, stop in pack.sequence_bounds]

    @property
    def edges(self) -> list[int]:
        """Where the prefix ends, and then where each sequence ends."""
        return [self.pack.shared_prefix_length, *(stop for _, stop in self.pack.sequence_bounds)]


def masks_of(packing: Pack, dtype: torch.dtype) -> Masks:
    """Return the masks of a pack. dtype: type of the matmuls."""
    tokens, device = packing.input_ids.shape[1], packing.input_ids.device
    # On a GPU, an attention call costs more than its work: one call per pack made a step of SmolLM2 take 77 ms
    # instead of 256. On a CPU, one call per sequence computes nothing that a mask would hide, and nothing is
    # quadratic in the packed length.
    if device.type == "cuda" and tokens <= MAX_DENSE_MASK_TOKENS:
        return Masks(packing, whole_mask(packing, dtype))
    return Masks(packing, None)


def _mask(length: int, prefix: int, device: torch.device) -> Tensor | None:
    """Return a mask, (length, prefix + length): all of the prefix, and the sequence up to each position."""
    if not prefix:
        return None
    return torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)


def whole_mask(packing: Pack, dtype: torch.dtype) -> Tensor:
    """Return the dense mask, (tokens, tokens). The prefix is sequence 0, which all others attend to."""
    lengths = [packing.shared_prefix_length, *(end - start for start, end in packing.sequence_bounds)]
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    sequence = sequence.to(packing.input_ids.device)
    attends = (sequence == 0) | (sequence[:, None] == sequence)
    return torch.zeros_like(attends, dtype=dtype).masked_fill_(~attends.tril(), -torch.inf)


def _attend(
    _module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    masks: Masks,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return (1, tokens, heads, size), as transformers expects. query: (1, heads, tokens, size)."""
    options = {"scale": scaling, "dropout_p": dropout}
    if masks.dense is not None:
        return _attend_dense(query, key, value, masks.dense, **options).transpose(1, 2), None
    dtype = value.dtype
    if query.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # On a CPU, attention is slower in bfloat16 than in float32; backward takes three times as long.
        query, key, value = (x.float() for x in (query, key, value))
    with torch.autocast("cpu", enabled=False):
        if not dropout and _kernels_attend(query, key, value):
            output = _attend_in_kernels(query, key, value, masks, scaling)
        else:
            output = _attend_per_sequence(query, key, value, masks, **options).transpose(1, 2)
    return output.to(dtype), None


def _kernels_attend(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether the device's kernels support these heads and their type."""
    floats = all(x.dtype == torch.float32 for x in (query, key, value))
    kernels = kernels_for(query.device)
    return floats and kernels.can_attend_packs(query.shape[1], key.shape[1], query.shape[3])


def _attend_in_kernels(query: Tensor, key: Tensor, value: Tensor, masks: Masks, scaling: float | None) -> Tensor:
    """Attend the whole pack in one call: (1, tokens, heads, size)."""
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    factor = query.shape[3] ** -0.5 if scaling is None else scaling
    heads = PackedHeads(queries, keys, values, masks.edges, factor)
    return attend_in_kernels(kernels_for(query.device), heads)[None]


def _attend_dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """Attend all sequences in one call."""
    # One key and value per query head: no fused kernel supports a mask and grouped queries at once.
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    with without_cudnn():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)


def _attend_per_sequence(query: Tensor, key: Tensor, value: Tensor, masks: Masks, **options: Any) -> Tensor:
    end = masks.pack.shared_prefix_length
    prefix_key, prefix_value = key[:, :, :end], value[:, :, :end]
    outputs = []
    if end:
        outputs.append(_sdpa(query[:, :, :end], prefix_key, prefix_value, None, **options))
    for (start, stop), mask in zip(masks.pack.sequence_bounds, masks.per_sequence, strict=True):
        own_key, own_value = key[:, :, start:stop], value[:, :, start:stop]
        if end:
            own_key = torch.cat([prefix_key, own_key], dim=2)
            own_value = torch.cat([prefix_value, own_value], dim=2)
        outputs.append(_sdpa(query[:, :, start:stop], own_key, own_value, mask, **options))
    return torch.cat(outputs, dim=2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    options |= {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": query.shape[1] != key.shape[1]}
    return F.scaled_dot_product_attention(query, key, value, **options)


LOGITS_CHUNK_BYTES = 128 * 2**20
"""Most bytes that the float32 logits of one chunk may take."""


@dataclass(frozen=True)
class Packed:
    """The packed runner, for a model inside `packed_attention`."""

    model: PreTrainedModel
    dtype: torch.dtype
    batching: Batching
    run: CallInForward = call_directly

    def loss(self, micro_batch: Sequence[Example]) -> float:
        """Return the loss summed over the micro-batch's target tokens, without a gradient, in float32."""
        with torch.no_grad():
            return float(self.run(self._loss, micro_batch))

    def row_losses(self, micro_batch: Sequence[Example]) -> list[float]:
        """Return one loss per example, summed over its target tokens; their sum is `loss`."""
        with torch.no_grad():
            losses: list[float] = self.run(self._row_losses, micro_batch)
        return losses

    def backward(self, micro_batch: Sequence[Example], divisor: int) -> float:
        """Accumulate the gradient of loss sum / `divisor`. Return the loss sum."""
        # Two stages: from each chunk's loss to the hidden states, then from these through the body. So logits
        # exist for one chunk at a time, and a frozen head gets no weight gradient.
        total: float
        hidden, gradient, total = self.run(self._lm_head_backward, micro_batch, divisor)
        hidden.backward(gradient)
        return total

    def _loss(self, micro_batch: Sequence[Example]) -> float:
        # In float32: rounded to bfloat16, the weights would lose what small steps changed. Over 1,000 rows of
        # Alpaca, the same weights have a held-out loss of 1.7621, and of 1.7736 with matmuls in bfloat16.
        packed = self.batching.pack(micro_batch, self.model.device)
        hidden = self._hidden_states(packed, torch.float32)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        return sum(linear_cross_entropy(self._head, some, targets).item() for some, targets in chunks)

    def _row_losses(self, micro_batch: Sequence[Example]) -> list[float]:
        packed = self.batching.pack(micro_batch, self.model.device)
        hidden = self._hidden_states(packed, torch.float32)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        losses = [
            F.cross_entropy(head_logits(self._head, some), targets, reduction="none") for some, targets in chunks
        ]
        rows = torch.cat(losses).double().split([example.learned_tokens for example in micro_batch])
        return [row.sum().item() for row in rows]

    def _lm_head_backward(self, micro_batch: Sequence[Example], divisor: int) -> tuple[Tensor, Tensor, float]:
        """Run the first stage. Return (hidden states at target positions, their gradient, loss sum)."""
        packed = self.batching.pack(micro_batch, self.model.device)
        hidden = self._hidden_states(packed, self.dtype)
        chunks = _chunks(hidden, packed.targets, self._vocabulary)
        with tf32_lm_head(self.dtype, self.model.device):
            done = [linear_cross_entropy_backward(self._head, some, targets, divisor) for some, targets in chunks]
        gradient = torch.cat([gradient for _, gradient in done]).to(hidden.dtype)
        return hidden, gradient, sum(loss for loss, _ in done)

    def _hidden_states(self, packed: Pack, dtype: torch.dtype) -> Tensor:
        """Return the body's output, (targets, hidden size), at the positions that predict a target token."""
        body: Any = self._base.get_decoder()
        autocast = nullcontext() if dtype == torch.float32 else torch.autocast(self.model.device.type, dtype)
        with autocast:
            output = body(
                inputs_embeds=_embedded(body.get_input_embeddings(), packed.input_ids),
                position_ids=packed.position_ids,
                use_cache=False,
                masks=masks_of(packed, dtype),
            )
        # The head sees only these: three quarters of the tokens of a short instruction row are template and
        # prompt.
        hidden: Tensor = output.last_hidden_state[0, packed.target_positions]
        return hidden

    @property
    def _head(self) -> nn.Module:
        head: nn.Module = self._base.get_output_embeddings()
        return head

    @property
    def _base(self) -> PreTrainedModel:
        """The model inside a peft wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model  # type: ignore

    @property
    def _vocabulary(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)


@contextmanager
def tf32_lm_head(dtype: torch.dtype, device: torch.device) -> Iterator[None]:
    """Compute the head's matmuls in TF32 within the block, on a GPU with a body in bfloat16."""
    before = torch.get_float32_matmul_precision()
    # TF32 has 10-bit mantissas and float32 sums. In float32, the head would take longer than the body.
    if dtype != torch.float32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _embedded(embedding: nn.Module, input_ids: Tensor) -> Tensor:
    """Return the embedded tokens, with a sparse gradient that autograd adds in place to a dense one."""
    if type(embedding) is not nn.Embedding or not embedding.weight.requires_grad or not torch.is_grad_enabled():
        embedded: Tensor = embedding(input_ids)
        return embedded
    # Autograd would make a new dense gradient per micro-batch, of the vocabulary's size: half a gigabyte for
    # Qwen2.5. With tied weights, this one is the head's too.
    dense_gradient(embedding.weight)
    return F.embedding(input_ids, embedding.weight, embedding.padding_idx, sparse=True)


def _chunks(hidden: Tensor, targets: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of hidden states with their targets."""
    size = max(LOGITS_CHUNK_BYTES // (4 * vocabulary), 16)
    # Without targets, a single empty chunk: all ranks must have a gradient of the head, if only zeros.
    for start in range(0, max(len(targets), 1), size):
        yield hidden[start : start + size], targets[start : start + size]
