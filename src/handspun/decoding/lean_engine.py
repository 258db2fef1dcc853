"""The forward pass of Llama's kind of model, over rows of any lengths laid end to end: there is no padding.

Prompts and single tokens go through together. Linear layers see all tokens at once; attention is computed row by
row, over exactly that row's keys, so that under int8 weights a row's logits do not depend on the rows beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from handspun.decoding.cache import KVCache
from handspun.decoding.engine import Feed
from handspun.models import native
from handspun.models.lean import LeanLayer, LeanModel


@dataclass(frozen=True)
class Laid:
    """Feeds laid end to end, in numbers: tokens start to stop are fed to a row, and see its first `length` keys;
    mask as in Feed, but None also where the row was empty, and plainly causal."""

    row: int
    start: int
    stop: int
    length: int
    mask: Tensor | None

    @property
    def is_prompt(self) -> bool:
        """Several tokens, each of which sees those before it."""
        return self.mask is None and self.stop - self.start > 1


class LeanEngine:
    """A lean model with its cache."""

    def __init__(self, model: LeanModel) -> None:
        self.model = model
        self.cache = KVCache(
            len(model.layers), model.kv_heads, model.head_size, dtype=model.cache_dtype, device=model.device
        )
        self._native = model.is_int8 and native.can_attend(model.head_size, model.cache_dtype, model.device)
        self._rotations = torch.empty(2, 0, model.head_size, device=model.device)  # cosines, and sines

    def add(self) -> int:
        """A new, empty row."""
        return self.cache.add()

    def fork(self, row: int) -> int:
        """A new row that goes on from where this one is."""
        return self.cache.fork(row)

    def truncate(self, row: int, length: int) -> None:
        """Forgets all but the row's first tokens."""
        self.cache.truncate(row, length)

    def free(self, row: int) -> None:
        """Forgets the row."""
        self.cache.free(row)

    @torch.inference_mode()
    def forward(self, feeds: Sequence[Feed]) -> Tensor:
        """Feeds rows. Returns logits, (tokens asked for, vocab), float32, in the feeds' order."""
        model = self.model
        laid, ids, positions, places, wanted = self._lay_out(feeds)
        cosines, sines = self._rotation(positions)
        x = model.embedding(ids)  # (tokens, hidden)
        for number, layer in enumerate(model.layers):
            attended = self._attention(number, layer, x, laid, places, cosines, sines)
            x = x + layer.o(attended)
            x = x + layer.down.gated(layer.gate_up.normed(x, layer.mlp_norm, model.norm_eps))
        if len(wanted) < len(x):
            x = x[wanted]
        return model.head.normed(x, model.norm, model.norm_eps)

    def _lay_out(self, feeds: Sequence[Feed]) -> tuple[list[Laid], Tensor, Tensor, Tensor, Tensor]:
        laid: list[Laid] = []
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
            laid += self._laid(feed, before, start)
        numbers = [torch.tensor(values, device=self.model.device) for values in (ids, positions, places, wanted)]
        return laid, *numbers  # type: ignore[return-value]

    def _laid(self, feed: Feed, before: int, start: int) -> list[Laid]:
        """Under int8 the tokens of a draft are laid one by one: each is attended as it would be alone, and its
        logits are the same, bit for bit. In float, products differ already."""
        count = len(feed.token_ids)
        if self.model.is_int8 and feed.all_logits and feed.mask is None and before > 0:
            return [Laid(feed.row, start + i, start + i + 1, before + i + 1, None) for i in range(count)]
        return [Laid(feed.row, start, start + count, before + count, self._mask(feed, before, count))]

    def _mask(self, feed: Feed, before: int, count: int) -> Tensor | None:
        if feed.mask is not None or count == 1 or before == 0:
            return feed.mask
        ones = torch.ones(count, before + count, dtype=torch.bool, device=self.model.device)
        return ones.tril(before)

    def _attention(
        self,
        number: int,
        layer: LeanLayer,
        x: Tensor,
        laid: Sequence[Laid],
        places: Tensor,
        cosines: Tensor,
        sines: Tensor,
    ) -> Tensor:
        """(tokens, hidden) to (tokens, heads * head_size)."""
        model = self.model
        qkv = layer.qkv.normed(x, layer.attention_norm, model.norm_eps).view(len(x), -1, model.head_size)
        if self._native:
            norms, pool = (layer.q_norm, layer.k_norm), self.cache.layer(number)
            native.rotate(qkv, model.heads, norms, model.norm_eps, cosines, sines, places, pool)
            queries = qkv[:, : model.heads]
        else:
            queries, keys = self._rotated(layer, qkv, cosines, sines)
            self.cache.write(number, places, keys, qkv[:, model.heads + model.kv_heads :])
        return self._attended(number, queries, laid)

    def _rotated(self, layer: LeanLayer, qkv: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, (tokens, heads, size) each, normed where the model does that, and rotated."""
        heads = self.model.heads
        both = qkv[:, : heads + self.model.kv_heads]
        if layer.q_norm is not None and layer.k_norm is not None:
            normed = [self._normed(both[:, :heads], layer.q_norm), self._normed(both[:, heads:], layer.k_norm)]
            both = torch.cat(normed, dim=1)
        turned = both * cosines[:, None] + both.roll(self.model.head_size // 2, -1) * sines[:, None]
        return turned[:, :heads], turned[:, heads:]

    def _attended(self, number: int, queries: Tensor, laid: Sequence[Laid]) -> Tensor:
        """(tokens, heads, size) to (tokens, heads * size): each row over its own keys."""
        alone = [part for part in laid if not part.is_prompt] if self._native else []
        if len(alone) == len(laid):
            return self._attended_alone(number, queries, alone)
        output = queries.new_empty(len(queries), queries.shape[1] * queries.shape[2])
        if alone:
            places = torch.tensor([place for part in alone for place in range(part.start, part.stop)])
            output[places] = self._attended_alone(number, queries[places], alone)
        for part in laid:
            if part.is_prompt or not self._native:
                output[part.start : part.stop] = self._attend(number, queries[part.start : part.stop], part)
        return output

    def _attended_alone(self, number: int, queries: Tensor, laid: Sequence[Laid]) -> Tensor:
        """Of tokens that are no prompts', all in one call of a native kernel."""
        starts, lengths, masks = list[int](), list[int](), list[Tensor | None]()
        for part in laid:
            count = part.stop - part.start
            starts += [self.cache.start(part.row)] * count
            lengths += [part.length] * count
            masks += [None] * count if part.mask is None else part.mask.unbind()
        return native.attend(queries, self.cache.layer(number), starts, lengths, masks)

    def _attend(self, number: int, queries: Tensor, part: Laid) -> Tensor:
        """One row's queries, (tokens, heads, size), to (tokens, heads * size)."""
        keys, values = self.cache.read(number, part.row, part.length)  # (kv_heads, length, size)
        queries = queries.to(keys.dtype)
        count, heads, size = queries.shape
        if part.is_prompt:
            output = F.scaled_dot_product_attention(
                queries.transpose(0, 1)[None], keys[None], values[None], is_causal=True, enable_gqa=True
            )
            return output[0].transpose(0, 1).reshape(count, -1).float()
        # The queries that share a head of keys are rows of one product.
        groups = heads // len(keys)
        grouped = queries.view(count, len(keys), groups, size).permute(1, 2, 0, 3).reshape(len(keys), -1, size)
        mask = None if part.mask is None else part.mask.repeat(groups, 1)
        output = F.scaled_dot_product_attention(grouped[None], keys[None], values[None], attn_mask=mask)
        output = output.view(len(keys), groups, count, size).permute(2, 0, 1, 3)
        return output.reshape(count, -1).float()

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.model.norm_eps)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions, (tokens,): each (tokens, head_size). The sines' first half is
        negative, as the second half of a head comes to it with a minus."""
        needed = int(positions.max()) + 1
        if needed > self._rotations.shape[1]:
            steps = torch.arange(2 * needed, device=positions.device).float()
            angles = torch.outer(steps, self.model.frequencies)
            pairs = [torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)]
            self._rotations = torch.stack(pairs) * self.model.attention_scaling
        return self._rotations[0, positions], self._rotations[1, positions]


__all__ = ["LeanEngine"]
