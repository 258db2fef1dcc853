"""Choosing the next token. A draw depends on the seed, the answer's own name and the step: never on the
batch that the answer happens to share.

The token with the highest logit + Gumbel noise is a draw from the softmax of the logits (the Gumbel-max
trick, Gumbel 1954). The noise comes from Philox, a counter-based generator (Salmon et al. 2011), so any
number of it can be had without those before.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

RngKey = tuple[int, int, int]
"""(seed, prompt index, return index): the name of an answer's stream of noise."""

_Array = np.ndarray[Any, Any]
_NEAR = 8.0
"""Logits this far below the highest seldom win: their noise is looked at only where it is large."""


def stream_of(seed: int | tuple[int, ...], prompt_index: int, return_index: int) -> RngKey:
    """With one seed, every prompt has a stream of its own; with one seed a prompt, the stream goes with
    the seed, wherever its prompt stands."""
    if isinstance(seed, tuple):
        return seed[prompt_index], 0, return_index
    return seed, prompt_index, return_index


def gumbel_noise(stream: RngKey, step: int, vocab: int) -> Tensor:
    """Standard Gumbel noise for every token of one step of one answer: (vocab,), float32."""
    return torch.from_numpy(_gumbel(_random_bits(stream, step, vocab)))


def gumbel_argmax(logits: Tensor, stream: RngKey, step: int) -> int:
    """The token with the highest logit + noise, (vocab,), without the logarithms of most of the noise."""
    values = logits.numpy(force=True)
    bits = _random_bits(stream, step, len(values))
    floor = np.float32(values.max() - _NEAR)
    near = np.flatnonzero(values >= floor)
    best = float((values[near] + _gumbel(bits[near])).max())
    # Any other token is below the floor, and wins only with more noise than this; a little is left for rounding.
    far = np.flatnonzero((bits >= _bits_at(best - float(floor) - 1e-3)) & (values < floor))
    tokens = np.sort(np.concatenate([near, far]))
    return int(tokens[np.argmax(values[tokens] + _gumbel(bits[tokens]))])


def select_tokens(logits: Tensor, *, draws: Sequence[tuple[RngKey, int]] | None) -> Tensor:
    """The next token of each row: (rows, vocab) -> (rows,). draws: stream and step of each; without them, the most
    probable token."""
    if draws is None:
        return logits.argmax(-1)
    tokens = [gumbel_argmax(row, stream, step) for row, (stream, step) in zip(logits, draws, strict=True)]
    return torch.tensor(tokens, device=logits.device)


def _random_bits(stream: RngKey, step: int, vocab: int) -> _Array:
    """52 random bits for each token: (vocab,), uint64."""
    seed, prompt_index, return_index = stream
    name = [seed % 2**64, (prompt_index % 2**32) << 32 | return_index % 2**32]
    key = np.array(name, dtype=np.uint64)  # a plain list of large ints would be rounded to floats
    # The lowest word of the counter moves with the token, the next one with the step. Raw bits stay the
    # same from one NumPy version to the next; the distributions of its Generator may not.
    bits: _Array = np.random.Philox(key=key, counter=[0, step, 0, 0]).random_raw(vocab) >> np.uint64(12)
    return bits


def _gumbel(bits: _Array) -> _Array:
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-52  # inside (0, 1), both ends left out
    noise: _Array = (-np.log(-np.log(uniform))).astype(np.float32)
    return noise


def _bits_at(noise: float) -> np.uint64:
    """The bits at which the noise reaches a value; 0 if it always does."""
    uniform = math.exp(-math.exp(-noise)) if noise > -700 else 0.0
    return np.uint64(max(math.floor(uniform * 2.0**52) - 1, 0))
