"""Keys and values of prompts' beginnings, kept for later requests that begin with the same tokens."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

BLOCK = 64
"""Tokens of a block. A prompt's last tokens, fewer than this, are not kept."""


@dataclass(eq=False)
class Block:
    """The keys and values of some tokens behind the tokens of `parent`, which is a block or a namespace."""

    parent: Hashable
    token_ids: tuple[int, ...]
    keys_values: Tensor
    """(layers, 2 * kv_heads, BLOCK, head_size)."""


class PrefixCache:
    """A tree of blocks per namespace. The blocks that were not used for longest make room for new ones.

    max_bytes: of all blocks together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        # A block is found by its parent's identity and its own token ids, which are compared, not just hashed.
        # The least recently used come first. A block is never used without its parent, so it is a leaf that goes.
        self._blocks: OrderedDict[tuple[Hashable, tuple[int, ...]], Block] = OrderedDict()
        self.bytes = 0

    def find(self, namespace: Hashable, token_ids: Sequence[int]) -> list[Block]:
        """Return the blocks that a prompt begins with. At least one of its tokens is behind them."""
        found: list[Block] = []
        parent: Hashable = namespace
        for ids in _blocks_of(token_ids[:-1]):
            block = self._blocks.get((parent, ids))
            if block is None:
                break
            found.append(block)
            parent = block
        self._use(found)
        return found

    def add(self, namespace: Hashable, token_ids: Sequence[int], read: Callable[[int, int], Tensor]) -> None:
        """Keep the whole blocks of some tokens.

        read: called with (start, stop), returns a copy of these tokens' keys and values.
        """
        chain: list[Block] = []
        parent: Hashable = namespace
        for number, ids in enumerate(_blocks_of(token_ids)):
            block = self._blocks.get((parent, ids))
            if block is None:
                block = Block(parent, ids, read(number * BLOCK, (number + 1) * BLOCK))
                if self.bytes + block.keys_values.nbytes > self._max_bytes and not self._make_room(block, chain):
                    break
                self._blocks[parent, ids] = block
                self.bytes += block.keys_values.nbytes
            chain.append(block)
            parent = block
        self._use(chain)

    def _use(self, chain: Sequence[Block]) -> None:
        """Note that these blocks were used, so that each stays at least as long as the blocks behind it."""
        for block in reversed(chain):
            self._blocks.move_to_end((block.parent, block.token_ids))

    def _make_room(self, block: Block, chain: Sequence[Block]) -> bool:
        """Drop the least recently used blocks. Return whether there is room without dropping the chain's."""
        self._use(chain)
        while self.bytes + block.keys_values.nbytes > self._max_bytes:
            oldest = next(iter(self._blocks.values()), None)
            if oldest is None or oldest in chain:
                return False
            del self._blocks[oldest.parent, oldest.token_ids]
            self.bytes -= oldest.keys_values.nbytes
        return True


def _blocks_of(token_ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(token_ids[start : start + BLOCK]) for start in range(0, len(token_ids) - BLOCK + 1, BLOCK)]
