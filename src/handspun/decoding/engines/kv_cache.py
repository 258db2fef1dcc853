"""Keys and values of rows of tokens that come, grow and go.

Every row has a region of one pool, twice as large each time it is full; the pool grows in the same way. Rows are
never padded, and no row is moved when another one leaves.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SMALLEST = 64
"""Tokens in a new row's region, at least."""


@dataclass
class Region:
    """Where a row lies: tokens start to start + length, with room for `capacity`."""

    start: int
    capacity: int
    length: int = 0


class KVCache:
    """One pool for all layers: (layers, 2 * kv_heads, tokens, head_size); keys, then values."""

    def __init__(
        self, layers: int, kv_heads: int, head_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._kv_heads = kv_heads
        self._pool = torch.empty(layers, 2 * kv_heads, 0, head_size, dtype=dtype, device=device)
        self._rows: dict[int, Region] = {}
        self._next_row = 0

    def add(self) -> int:
        """A new, empty row."""
        row, self._next_row = self._next_row, self._next_row + 1
        self._rows[row] = Region(0, 0)
        return row

    def fork(self, row: int) -> int:
        """A new row that goes on from a copy of this one."""
        new, length = self.add(), self.length(row)
        self._make_room(new, length)
        source, target = self._rows[row], self._rows[new]
        self._copy(source.start, target.start, length)
        target.length = length
        return new

    def free(self, row: int) -> None:
        """Gives the row's region up."""
        del self._rows[row]

    def length(self, row: int) -> int:
        """Tokens that the row holds."""
        return self._rows[row].length

    def truncate(self, row: int, length: int) -> None:
        """Forgets all but the row's first tokens."""
        assert length <= self._rows[row].length
        self._rows[row].length = length

    def keep(self, row: int, places: Tensor) -> None:
        """Keeps these of the row's tokens, (count,), in their order: they move together."""
        region = self._rows[row]
        kept = self._pool.index_select(2, places + region.start)
        self._pool[:, :, region.start : region.start + len(places)] = kept
        region.length = len(places)

    def extend(self, row: int, count: int) -> range:
        """Room for more tokens of the row: their places in the pool, to be filled by `write`."""
        self._make_room(row, self.length(row) + count)
        region = self._rows[row]
        start = region.start + region.length
        region.length += count
        return range(start, start + count)

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Fills places, (tokens,), of the pool in one layer. keys, values: (tokens, kv_heads, head_size)."""
        pool = self._pool[layer]
        pool[: self._kv_heads].index_copy_(1, places, keys.transpose(0, 1).to(pool.dtype))
        pool[self._kv_heads :].index_copy_(1, places, values.transpose(0, 1).to(pool.dtype))

    def read(self, layer: int, row: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a row's first tokens in one layer, each (kv_heads, length, head_size)."""
        start = self.start(row)
        both = self._pool[layer, :, start : start + length]
        return both[: self._kv_heads], both[self._kv_heads :]

    def start(self, row: int) -> int:
        """Where the row begins in a layer of the pool."""
        return self._rows[row].start

    def layer(self, layer: int) -> Tensor:
        """All rows' keys and then values in one layer: (2 * kv_heads, places, head_size)."""
        return self._pool[layer]

    def _make_room(self, row: int, length: int) -> None:
        region = self._rows[row]
        if length <= region.capacity:
            return
        capacity = max(_SMALLEST, 2 * region.capacity, length)
        start = self._find_gap(capacity)
        self._copy(region.start, start, region.length)
        region.start, region.capacity = start, capacity

    def _find_gap(self, capacity: int) -> int:
        """Where so many tokens are free; the pool grows if there is no such place."""
        end = 0
        for region in sorted(self._rows.values(), key=lambda region: region.start):
            if region.start - end >= capacity:
                return end
            end = max(end, region.start + region.capacity)
        size = self._pool.shape[2]
        if end + capacity > size:
            layers, heads, _, head_size = self._pool.shape
            grown = self._pool.new_empty(layers, heads, max(end + capacity, 2 * size), head_size)
            grown[:, :, :size] = self._pool
            self._pool = grown
        return end

    def _copy(self, source: int, target: int, length: int) -> None:
        if length:
            self._pool[:, :, target : target + length] = self._pool[:, :, source : source + length]
