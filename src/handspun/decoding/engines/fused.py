"""The forward pass of Llama-like models over rows of any lengths, concatenated without padding.

Prompts and single tokens share one pass. Linear layers see all tokens at once. Attention is computed row by row,
over exactly that row's keys, so with int8 weights a row's logits do not depend on the other rows. The native
kernel attends all tokens in one call, each by itself: nor do logits depend on how a prompt was cut, or on draft
tokens. On a GPU, tokens that are not part of a prompt are attended in one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from handspun.decoding.engines.base import ModelInput
from handspun.decoding.engines.kv_cache import KVCache
from handspun.kernels import kernels_for
from handspun.kernels.native import DecoderShape
from handspun.kernels.onednn import without_cudnn
from handspun.kernels.reference import AttendedSpan, HeadNorms, Rotation
from handspun.models.fused import FusedLayer, FusedWeights

_MASK_MULTIPLE = 64
"""The longest row is rounded up to a multiple of this, since attention kernels need aligned masks."""


@dataclass(frozen=True)
class KVRange:
    """The keys that one token attends to: `length` slots of the pool from `start`, or those where mask is true.

    mask: (length,), bool.
    """

    start: int
    length: int
    mask: Tensor | None


@dataclass(frozen=True)
class GatheredKV:
    """The keys that several tokens attend to, the same for all layers.

    slot_mapping: (tokens, longest), slots of the pool. mask: (tokens, 1, 1, longest), 0 where a token attends and
    -inf elsewhere.
    """

    slot_mapping: Tensor
    mask: Tensor


def gather(tokens: Sequence[KVRange], pool: Tensor) -> GatheredKV:
    """Return slots and mask for tokens that are attended in one call.

    pool: (2 * kv_heads, slots, size), of any layer.
    """
    longest = max(token.length for token in tokens)
    longest += -longest % _MASK_MULTIPLE
    reach = torch.arange(longest, device=pool.device)
    numbers = torch.tensor([[token.start, token.length] for token in tokens], device=pool.device)
    starts, lengths = numbers.split(1, dim=1)
    sees = reach < lengths
    places = torch.where(sees, starts + reach, starts)  # slots past the row may hold NaN, and 0 * NaN is NaN
    for row, token in zip(sees, tokens, strict=True):
        if token.mask is not None:
            row[: token.length] = token.mask
    mask = torch.zeros_like(sees, dtype=pool.dtype).masked_fill_(~sees, -torch.inf)
    return GatheredKV(places, mask[:, None, None])


def attend(queries: Tensor, pool: Tensor, gathered: GatheredKV) -> Tensor:
    """Attend over gathered keys in one layer: (tokens, heads, size) to (tokens, heads * size), float32."""
    count, heads, size = queries.shape
    kv_heads = len(pool) // 2
    both = pool.index_select(1, gathered.slot_mapping.flatten()).view(2, kv_heads, count, -1, size).transpose(1, 2)
    grouped = queries.to(pool.dtype).view(count, kv_heads, heads // kv_heads, size)
    with without_cudnn():  # the queries that share a key head are rows of one matmul
        output = F.scaled_dot_product_attention(grouped, both[0], both[1], attn_mask=gathered.mask)
    return output.reshape(count, heads * size).float()


_MAX_GATHERED_TOKENS = 16
"""Maximum number of a row's tokens whose keys are gathered: each token needs its own copy of them."""


@dataclass(frozen=True)
class TokenSpan:
    """The tokens from start to stop of a step, all of one row, which attend to its first `length` keys.

    mask: as in ModelInput, but also None for a prompt in an empty row, which is causal.
    """

    row: int
    start: int
    stop: int
    length: int
    mask: Tensor | None

    @property
    def is_prompt(self) -> bool:
        """True for several tokens with causal attention."""
        return self.mask is None and self.stop - self.start > 1


@dataclass(frozen=True)
class StepLayout:
    """The layout of one step's tokens, shared by all layers.

    spans: all tokens, if a kernel of ours attends them; the next three are empty then. parts: spans that are
    attended one after another. alone: the keys of each token that is attended in one call with others. at:
    (alone,), indices of these tokens, None if they are all. rotation: the tokens' positions and key slots.
    """

    spans: list[AttendedSpan]
    parts: list[TokenSpan]
    alone: list[KVRange]
    at: Tensor | None
    gathered: GatheredKV | None
    rotation: Rotation


class FusedEngine:
    """A fused model with its KV cache. kv_tokens: the cache's fixed size; None for one that grows."""

    def __init__(self, model: FusedWeights, kv_tokens: int | None = None) -> None:
        self.model = model
        shape = (len(model.layers), model.kv_heads, model.head_size)
        self.cache = KVCache(shape, dtype=model.cache_dtype, device=model.device, fixed_tokens=kv_tokens)
        self._kernels = kernels_for(model.device)
        self._attends = model.device.type == "cpu" and self._kernels.can_attend(
            model.heads, model.kv_heads, model.head_size
        )
        form = DecoderShape(model.heads, model.kv_heads, model.head_size, model.norm_eps)
        self.decoder = self._kernels.decoder(model.layers, form) if self.is_exact else None
        """Runs all layers in one call. None: `_run_layers` goes from layer to layer."""
        # On a GPU a call costs more than its work: one call over gathered keys decodes 32 rows at 2,090 tokens per
        # second instead of 552. On a CPU, padding to the longest row would cost more than it saves.
        self._gathers = not model.is_int8 and model.device.type == "cuda"
        self._rotations = torch.empty(2, 0, model.head_size, device=model.device)  # cosines, and sines

    @property
    def is_exact(self) -> bool:
        """True if no bit of the logits depends on other rows, or on which tokens were fed together."""
        return self._attends and self.model.is_int8

    def add(self, tokens: int = 0) -> int:
        """Add an empty row and return its id. tokens: reserve room for this many."""
        return self.cache.add(tokens)

    def fork(self, row: int, tokens: int = 0) -> int:
        """Add a row with a copy of this one's tokens and return its id. tokens: reserve room for this many."""
        return self.cache.fork(row, tokens)

    def length(self, row: int) -> int:
        """Return the number of tokens in the row."""
        return self.cache.length(row)

    def truncate(self, row: int, length: int) -> None:
        """Drop all but the row's first `length` tokens."""
        self.cache.truncate(row, length)

    def free(self, row: int) -> None:
        """Delete the row."""
        self.cache.free(row)

    @torch.inference_mode()
    def forward(self, feeds: Sequence[ModelInput]) -> Tensor:
        """Append tokens to rows. Return logits, (tokens requested, vocab), float32, in the order of feeds."""
        model = self.model
        layout, ids, wanted = self._lay_out(feeds)
        x = self._run_layers(model.embedding(ids), layout)  # (tokens, hidden)
        if len(wanted) < len(x):
            x = x[wanted]
        return model.head.after_rms_norm(x, model.norm, model.norm_eps)

    def _run_layers(self, x: Tensor, layout: StepLayout) -> Tensor:
        if self.decoder is not None:
            return self.decoder.run(x, self.cache.pool, layout.rotation, layout.spans)
        for number, layer in enumerate(self.model.layers):
            attended = self._attention(number, layer, x, layout)
            x = x + layer.o(attended)
            x = x + layer.down.after_swiglu(layer.gate_up.after_rms_norm(x, layer.mlp_norm, self.model.norm_eps))
        return x

    def _lay_out(self, feeds: Sequence[ModelInput]) -> tuple[StepLayout, Tensor, Tensor]:
        """Return the layout, all token ids, and the indices of tokens whose logits are requested."""
        laid: list[TokenSpan] = []
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        wanted: list[int] = []
        for feed in feeds:
            before, start, count = self.cache.length(feed.row), len(ids), len(feed.token_ids)
            ids += feed.token_ids
            positions += range(before, before + count) if feed.positions is None else feed.positions
            places += self.cache.extend(feed.row, count)
            wanted += range(start if feed.all_logits else len(ids) - 1, len(ids))
            laid += self._spans(feed, before, start)
        device = self.model.device
        layout = self._layout(laid, positions, torch.tensor(places, device=device))
        return layout, torch.tensor(ids, device=device), torch.tensor(wanted, device=device)

    def _layout(self, laid: Sequence[TokenSpan], positions: Sequence[int], places: Tensor) -> StepLayout:
        if self._attends:
            starts = [self.cache.start(part.row) for part in laid]
            spans = [
                AttendedSpan(part.start, part.stop - part.start, start, part.length, part.mask)
                for part, start in zip(laid, starts, strict=True)
            ]
            return StepLayout(spans, [], [], None, None, self._rotation(positions, places))
        together = [part for part in laid if self._is_attended_jointly(part)]
        alone = [token for part in together for token in self._kv_ranges(part)]
        numbers = [i for part in together for i in range(part.start, part.stop)]
        at = None if len(together) == len(laid) else torch.tensor(numbers, dtype=torch.long, device=places.device)
        return StepLayout(
            spans=[],
            parts=[part for part in laid if not self._is_attended_jointly(part)],
            alone=alone,
            at=at,
            gathered=gather(alone, self.cache.layer(0)) if alone else None,
            rotation=self._rotation(positions, places),
        )

    def _is_attended_jointly(self, part: TokenSpan) -> bool:
        """Return whether the span's tokens are attended in one call with those of other rows."""
        # Gathering copies the row's keys once per token, so it only pays for few tokens.
        return self._gathers and not part.is_prompt and part.stop - part.start <= _MAX_GATHERED_TOKENS

    def _kv_ranges(self, part: TokenSpan) -> list[KVRange]:
        count, start = part.stop - part.start, self.cache.start(part.row)
        masks = [None] * count if part.mask is None else part.mask.unbind()
        return [KVRange(start, part.length, mask) for mask in masks]

    def _spans(self, feed: ModelInput, before: int, start: int) -> list[TokenSpan]:
        """Return the spans of one input."""
        count = len(feed.token_ids)
        if self._attends:
            return [TokenSpan(feed.row, start, start + count, before + count, feed.mask)]
        # With int8, draft tokens are attended one by one, so that logits equal those without drafting bit for bit:
        # SDPA over several queries rounds differently from SDPA over one, and quantization can amplify the
        # difference. In float, the matmuls differ already.
        if self.model.is_int8 and feed.all_logits and feed.mask is None and before > 0:
            return [TokenSpan(feed.row, start + i, start + i + 1, before + i + 1, None) for i in range(count)]
        return [TokenSpan(feed.row, start, start + count, before + count, self._mask(feed, before, count))]

    def _mask(self, feed: ModelInput, before: int, count: int) -> Tensor | None:
        if feed.mask is not None or count == 1 or before == 0:
            return feed.mask
        ones = torch.ones(count, before + count, dtype=torch.bool, device=self.model.device)
        return ones.tril(before)

    def _attention(self, number: int, layer: FusedLayer, x: Tensor, layout: StepLayout) -> Tensor:
        """Compute one layer's attention: (tokens, hidden) to (tokens, heads * head_size)."""
        model = self.model
        qkv = layer.qkv.after_rms_norm(x, layer.attention_norm, model.norm_eps).view(len(x), -1, model.head_size)
        if self._attends:
            pool = self.cache.layer(number)
            norms = HeadNorms(layer.q_norm, layer.k_norm, model.norm_eps)
            self._kernels.rotate(qkv, norms, layout.rotation, pool)
            return self._kernels.attend(qkv[:, : model.heads], pool, layout.spans)
        queries, keys = self._rotate(layer, qkv, layout.rotation.cosines, layout.rotation.sines)
        self.cache.write(number, layout.rotation.slot_mapping, keys, qkv[:, model.heads + model.kv_heads :])
        return self._attend_all(number, queries, layout)

    def _rotate(self, layer: FusedLayer, qkv: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries and keys, (tokens, heads, size) each, normed if the model does that, and rotated."""
        heads = self.model.heads
        both = qkv[:, : heads + self.model.kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            after_rms_norm = [
                self._normed(both[:, :heads], layer.q_norm),
                self._normed(both[:, heads:], layer.k_norm),
            ]
            both = torch.cat(after_rms_norm, dim=1)
        turned = both * cosines[:, None] + both.roll(self.model.head_size // 2, -1) * sines[:, None]
        return turned[:, :heads], turned[:, heads:]

    def _attend_all(self, number: int, queries: Tensor, layout: StepLayout) -> Tensor:
        """Attend each row over its own keys: (tokens, heads, size) to (tokens, heads * size)."""
        if layout.at is None:
            return self._attend_jointly(number, queries, layout)
        output = queries.new_empty(len(queries), queries.shape[1] * queries.shape[2])
        if layout.alone:
            output[layout.at] = self._attend_jointly(number, queries[layout.at], layout)
        for part in layout.parts:
            output[part.start : part.stop] = self._attend_span(number, queries[part.start : part.stop], part)
        return output

    def _attend_jointly(self, number: int, queries: Tensor, layout: StepLayout) -> Tensor:
        """Attend the tokens that go in one call."""
        assert layout.gathered is not None
        return attend(queries, self.cache.layer(number), layout.gathered)

    def _attend_span(self, number: int, queries: Tensor, part: TokenSpan) -> Tensor:
        """Attend one row's queries: (tokens, heads, size) to (tokens, heads * size)."""
        keys, values = self.cache.read(number, part.row, part.length)  # (kv_heads, length, size)
        if self.model.device.type == "cpu":
            keys, values = keys.float(), values.float()
        queries = queries.to(keys.dtype)
        count, heads, size = queries.shape
        if part.is_prompt:
            output = F.scaled_dot_product_attention(
                queries.transpose(0, 1)[None], keys[None], values[None], is_causal=True, enable_gqa=True
            )
            return output[0].transpose(0, 1).reshape(count, -1).float()
        # The queries that share a key head are rows of one matmul.
        groups = heads // len(keys)
        grouped = queries.view(count, len(keys), groups, size).permute(1, 2, 0, 3).reshape(len(keys), -1, size)
        mask = None if part.mask is None else part.mask.repeat(groups, 1)
        output = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask)
        output = output.view(len(keys), groups, count, size).permute(2, 0, 1, 3)
        return output.reshape(count, -1).float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.model.norm_eps)

    def _rotation(self, positions: Sequence[int], slot_mapping: Tensor) -> Rotation:
        """Return what rotates tokens at these positions. slot_mapping: (tokens,), the slots of their keys."""
        device = self.model.device
        needed = max(positions) + 1
        if needed > self._rotations.shape[1]:
            steps = torch.arange(2 * needed, device=device).float()
            angles = torch.outer(steps, self.model.frequencies)
            # Through float64, whose last bits may differ between CPUs: those of float32 hardly ever do then.
            cosines, sines = angles.double().cos().float(), angles.double().sin().float()
            # The first half of the sines is negated: rotation subtracts the second half of a head from the first.
            pairs = [torch.cat([cosines, cosines], -1), torch.cat([-sines, sines], -1)]
            self._rotations = torch.stack(pairs) * self.model.attention_scaling
        cosines, sines = self._rotations[:, torch.tensor(positions, device=device)]
        return Rotation(cosines, sines, slot_mapping)
