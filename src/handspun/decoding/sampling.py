"""Choose the next token, greedily or by sampling.

A sample depends on the seed, the answer's indices and the step, never on the rest of the batch. The token with the
highest logit + Gumbel noise is a sample from the softmax of the logits (the Gumbel-max trick, Gumbel 1954). The
noise comes from Philox, a counter-based generator (Salmon et al. 2011), which computes any step's noise without
the steps before it.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handspun.decoding.top import first_largest

RngKey = tuple[int, int, int]
"""(seed, prompt index, return index): identifies an answer's stream of noise."""

_Array = np.ndarray[Any, Any]
_NEAR = 8.0
"""Logits this far below the highest rarely win, so their noise is computed only where it is large."""


def stream_of(seed: int | tuple[int, ...], prompt_index: int, return_index: int) -> RngKey:
    """Return the key of an answer's random stream.

    With one seed, each prompt has its own stream. With one seed per prompt, the stream depends on the prompt's
    seed and not on its position.
    """
    if isinstance(seed, tuple):
        return seed[prompt_index], 0, return_index
    return seed, prompt_index, return_index


def gumbel_noise(stream: RngKey, step: int, vocab: int) -> Tensor:
    """Return standard Gumbel noise for every token at one step of one answer: (vocab,), float32."""
    return torch.from_numpy(_gumbel(_random_bits(stream, step, vocab)))


def gumbel_argmax(logits: Tensor, stream: RngKey, step: int) -> int:
    """Return the token with the highest logit + noise, without computing most of the noise. logits: (vocab,)."""
    values = logits.numpy(force=True)
    bits = _random_bits(stream, step, len(values))
    floor = np.float32(values.max() - _NEAR)
    near = np.flatnonzero(values >= floor)
    best = float((values[near] + _gumbel(bits[near])).max())
    # Any other token is below the floor and wins only with more noise than this; 1e-3 allows for rounding.
    far = np.flatnonzero((bits >= _bits_at(best - float(floor) - 1e-3)) & (values < floor))
    tokens = np.sort(np.concatenate([near, far]))
    return int(tokens[np.argmax(values[tokens] + _gumbel(bits[tokens]))])


def select_tokens(logits: Tensor, *, draws: Sequence[tuple[RngKey, int]] | None) -> Tensor:
    """Return the next token of each row: (rows, vocab) -> (rows,).

    draws: random stream and step of each row; None takes the most probable token.
    """
    if draws is None:
        return first_largest(logits)
    tokens = [gumbel_argmax(row, stream, step) for row, (stream, step) in zip(logits, draws, strict=True)]
    return torch.tensor(tokens, device=logits.device)


def _random_bits(stream: RngKey, step: int, vocab: int) -> _Array:
    """Return 52 random bits per token: (vocab,), uint64."""
    seed, prompt_index, return_index = stream
    name = [seed % 2**64, (prompt_index % 2**32) << 32 | return_index % 2**32]
    key = np.array(name, dtype=np.uint64)  # a plain list of large ints would be rounded to floats
    # The lowest word of the counter is the token, the next one the step. Raw bits are stable across NumPy
    # versions; the distributions of its Generator may not be.
    bits: _Array = np.random.Philox(key=key, counter=[0, step, 0, 0]).random_raw(vocab) >> np.uint64(12)
    return bits


def _gumbel(bits: _Array) -> _Array:
    uniform = (bits.astype(np.float64) + 0.5) * 2.0**-52  # inside (0, 1), both ends left out
    noise: _Array = (-np.log(-np.log(uniform))).astype(np.float32)
    return noise


def _bits_at(noise: float) -> np.uint64:
    """Return the least bits whose noise reaches a value; 0 if all do."""
    uniform = math.exp(-math.exp(-noise)) if noise > -700 else 0.0
    return np.uint64(max(math.floor(uniform * 2.0**52) - 1, 0))
