"""The KV cache of the fused engine.

Every row has a region of one pool. A full region doubles its size, and so does the pool unless its size is fixed.
Rows are never padded, and deleting a row moves no other.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 64
"""Minimum capacity of a row's region, in tokens."""


@dataclass
class Region:
    """The slots of a row: start to start + length, with room for `capacity`."""

    start: int
    capacity: int
    length: int = 0


class KVCache:
    """A pool of keys, then values, for all layers: (layers, 2 * kv_heads, tokens, head_size).

    shape: (layers, kv_heads, head_size). fixed_tokens: the pool's size; None for one that grows.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        dtype: torch.dtype,
        device: torch.device,
        fixed_tokens: int | None = None,
    ) -> None:
        layers, self._kv_heads, head_size = shape
        self._is_fixed = fixed_tokens is not None
        slots = fixed_tokens or 0
        self.pool = torch.empty(layers, 2 * self._kv_heads, slots, head_size, dtype=dtype, device=device)
        """It is replaced when it grows."""
        self._rows: dict[int, Region] = {}
        self._next_row = 0

    def add(self, tokens: int = 0) -> int:
        """Add an empty row and return its id. tokens: reserve room for this many."""
        row, self._next_row = self._next_row, self._next_row + 1
        self._rows[row] = Region(0, 0)
        try:
            self._make_room(row, tokens)
        except MemoryError:
            self.free(row)
            raise
        return row

    def has_room(self, tokens: int) -> bool:
        """Return whether a row of this many tokens can be added."""
        return not self._is_fixed or self._gap(tokens) is not None

    @property
    def used_tokens(self) -> int:
        """Number of slots that rows have reserved."""
        return sum(region.capacity for region in self._rows.values())

    @property
    def tokens(self) -> int:
        """Number of slots in the pool."""
        return self.pool.shape[2]

    def fork(self, row: int, tokens: int = 0) -> int:
        """Add a row with a copy of this one's keys and values and return its id. tokens: as for `add`."""
        length = self.length(row)
        new = self.add(max(tokens, length))
        source, target = self._rows[row], self._rows[new]
        self._copy(source.start, target.start, length)
        target.length = length
        return new

    def free(self, row: int) -> None:
        """Free the row's region."""
        del self._rows[row]

    def length(self, row: int) -> int:
        """Return the number of tokens in the row."""
        return self._rows[row].length

    def truncate(self, row: int, length: int) -> None:
        """Drop all but the row's first `length` tokens."""
        assert length <= self._rows[row].length
        self._rows[row].length = length

    def keep(self, row: int, places: Tensor) -> None:
        """Keep only these tokens of the row, (count,), moved together in this order."""
        region = self._rows[row]
        kept = self.pool.index_select(2, places + region.start)
        self.pool[:, :, region.start : region.start + len(places)] = kept
        region.length = len(places)

    def extend(self, row: int, count: int) -> range:
        """Reserve slots for more tokens of the row. Return them, to be filled by `write`."""
        self._make_room(row, self.length(row) + count)
        region = self._rows[row]
        start = region.start + region.length
        region.length += count
        return range(start, start + count)

    def copy_of(self, row: int, start: int, stop: int) -> Tensor:
        """Return a copy of some tokens' keys and values: (layers, 2 * kv_heads, stop - start, head_size)."""
        first = self._rows[row].start
        return self.pool[:, :, first + start : first + stop].clone()

    def append(self, row: int, keys_values: Tensor) -> None:
        """Append tokens whose keys and values are known: (layers, 2 * kv_heads, tokens, head_size)."""
        slots = self.extend(row, keys_values.shape[2])
        self.pool[:, :, slots.start : slots.stop] = keys_values

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write keys and values of tokens to one layer of the pool.

        Args:
            layer: Index of the layer.
            places: Slots of the tokens in the pool, (tokens,).
            keys: (tokens, kv_heads, head_size).
            values: (tokens, kv_heads, head_size).
        """
        pool = self.pool[layer]
        pool[: self._kv_heads].index_copy_(1, places, keys.transpose(0, 1).to(pool.dtype))
        pool[self._kv_heads :].index_copy_(1, places, values.transpose(0, 1).to(pool.dtype))

    def read(self, layer: int, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of a row's first tokens in one layer, each (kv_heads, length, head_size)."""
        start = self.start(row)
        both = self.pool[layer, :, start : start + length]
        return both[: self._kv_heads], both[self._kv_heads :]

    def start(self, row: int) -> int:
        """Return the row's first slot."""
        return self._rows[row].start

    def layer(self, layer: int) -> Tensor:
        """Return the whole pool of one layer, keys and then values: (2 * kv_heads, slots, head_size)."""
        return self.pool[layer]

    def _make_room(self, row: int, length: int) -> None:
        region = self._rows[row]
        if length <= region.capacity:
            return
        capacity = max(_SMALLEST, 2 * region.capacity, length)
        start = self._find_gap(capacity)
        self._copy(region.start, start, region.length)
        region.start, region.capacity = start, capacity

    def _gap(self, capacity: int) -> int | None:
        """Return the first slot of a free range of `capacity` slots, or None if there is none."""
        end = 0
        for region in sorted(self._rows.values(), key=lambda region: region.start):
            if region.start - end >= capacity:
                return end
            end = max(end, region.start + region.capacity)
        return end if end + capacity <= self.tokens else None

    def _find_gap(self, capacity: int) -> int:
        """Return the first slot of a free range of `capacity` slots. Grows the pool if there is none.

        Raises MemoryError if the pool's size is fixed.
        """
        gap = self._gap(capacity)
        if gap is not None:
            return gap
        if self._is_fixed:
            raise MemoryError(f"no room for {capacity:,} tokens in a KV cache of {self.tokens:,}")
        layers, heads, size, head_size = self.pool.shape
        end = max((region.start + region.capacity for region in self._rows.values()), default=0)
        grown = self.pool.new_empty(layers, heads, max(end + capacity, 2 * size), head_size)
        grown[:, :, :size] = self.pool
        self.pool = grown
        return end

    def _copy(self, source: int, target: int, length: int) -> None:
        if length:
            self.pool[:, :, target : target + length] = self.pool[:, :, source : source + length]
