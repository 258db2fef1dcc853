"""Which blocks a prompt finds, and which go when there is no more room."""

import torch
from torch import Tensor

from handspun.decoding.prefix_cache import BLOCK, PrefixCache

ONE = 4 * BLOCK
"""Bytes of a block of one layer, head and dimension."""


def keys_of(token_ids: list[int], calls: list[tuple[int, int]] | None = None):  # type: ignore[no-untyped-def]
    def read(start: int, stop: int) -> Tensor:
        if calls is not None:
            calls.append((start, stop))
        return torch.tensor(token_ids[start:stop], dtype=torch.float32).view(1, 1, -1, 1).clone()

    return read


def found(cache: PrefixCache, namespace: str, token_ids: list[int]) -> list[float]:
    """The keys that a prompt finds: its own ids, as `keys_of` makes them."""
    return [key for block in cache.find(namespace, token_ids) for key in block.keys_values.flatten().tolist()]


def test_find_returns_whole_blocks_and_leaves_a_token() -> None:
    cache, ids = PrefixCache(10 * ONE), list(range(3 * BLOCK))
    cache.add("a", ids, keys_of(ids))
    assert cache.bytes == 3 * ONE
    assert found(cache, "a", ids) == ids[: 2 * BLOCK]  # the last token is to be read
    assert found(cache, "a", [*ids, 7]) == ids
    assert found(cache, "a", [*ids[: 2 * BLOCK - 1], -1, 5]) == ids[:BLOCK]
    assert found(cache, "a", [-1, *ids]) == []
    assert found(cache, "b", ids) == []


def test_add_reads_only_blocks_that_are_new() -> None:
    cache, ids, calls = PrefixCache(10 * ONE), list(range(2 * BLOCK)), list[tuple[int, int]]()
    cache.add("a", ids, keys_of(ids, calls))
    other = ids[:BLOCK] + [9] * BLOCK + [1, 2, 3]
    cache.add("a", other, keys_of(other, calls))
    assert calls == [(0, BLOCK), (BLOCK, 2 * BLOCK), (BLOCK, 2 * BLOCK)]
    assert found(cache, "a", other) == other[: 2 * BLOCK]
    assert found(cache, "a", [*ids, 0]) == ids


def test_find_compares_what_stands_before_a_block_too() -> None:
    """The same second block behind another first one has other keys."""
    cache, second = PrefixCache(10 * ONE), [7] * BLOCK
    one, two = [1] * BLOCK + second, [2] * BLOCK + second
    cache.add("a", one, keys_of(one))
    assert found(cache, "a", [*two, 0]) == []
    cache.add("a", two, keys_of(two))
    assert cache.bytes == 4 * ONE


def test_add_drops_what_was_not_used_for_longest_and_never_a_parent_first() -> None:
    cache = PrefixCache(3 * ONE)
    old, new = [1] * 2 * BLOCK, [2] * BLOCK
    cache.add("a", old, keys_of(old))
    cache.add("a", new, keys_of(new))
    assert found(cache, "a", [*old, 0]) == old  # used last
    third = [3] * BLOCK
    cache.add("a", third, keys_of(third))
    assert [len(found(cache, "a", [*ids, 0])) // BLOCK for ids in (old, new, third)] == [2, 0, 1]
    fourth = [4] * BLOCK
    cache.add("a", third, keys_of(third))
    cache.add("a", fourth, keys_of(fourth))
    assert [len(found(cache, "a", [*ids, 0])) // BLOCK for ids in (old, third, fourth)] == [1, 1, 1]
    assert cache.bytes == 3 * ONE


def test_add_continues_a_prompt_that_was_not_used_for_longest() -> None:
    cache = PrefixCache(3 * ONE)
    old, other, longer = [1] * BLOCK, [2] * 2 * BLOCK, [1] * 2 * BLOCK
    for ids in (old, other, longer):
        cache.add("a", ids, keys_of(ids))
    assert [len(found(cache, "a", [*ids, 0])) // BLOCK for ids in (longer, other)] == [2, 1]


def test_add_keeps_the_beginning_of_what_is_larger_than_all_room() -> None:
    cache, ids = PrefixCache(2 * ONE + 1), list(range(5 * BLOCK))
    cache.add("a", ids, keys_of(ids))
    assert cache.bytes == 2 * ONE
    assert found(cache, "a", ids) == ids[: 2 * BLOCK]
