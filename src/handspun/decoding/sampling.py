"""Choosing the next token. A draw depends on the seed, the answer's own name and the step: never on the
batch that the answer happens to share.

The token with the highest logit + Gumbel noise is a draw from the softmax of the logits (the Gumbel-max
trick, Gumbel 1954). The noise comes from Philox, a counter-based generator (Salmon et al. 2011), so any
number of it can be had without those before.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Stream = tuple[int, int, int]
"""(seed, prompt index, return index): the name of an answer's stream of noise."""


def stream_of(seed: int | tuple[int, ...], prompt_index: int, return_index: int) -> Stream:
    """With one seed, every prompt has a stream of its own; with one seed a prompt, the stream goes with
    the seed, wherever its prompt stands."""
    if isinstance(seed, tuple):
        return seed[prompt_index], 0, return_index
    return seed, prompt_index, return_index


def gumbel_noise(stream: Stream, step: int, vocab: int) -> Tensor:
    """Standard Gumbel noise for every token of one step of one answer: (vocab,), float32."""
    seed, prompt_index, return_index = stream
    name = [seed % 2**64, (prompt_index % 2**32) << 32 | return_index % 2**32]
    key = np.array(name, dtype=np.uint64)  # a plain list of large ints would be rounded to floats
    # The lowest word of the counter moves with the token, the next one with the step. Raw bits stay the
    # same from one NumPy version to the next; the distributions of its Generator may not.
    bits = np.random.Philox(key=key, counter=[0, step, 0, 0]).random_raw(vocab)
    uniform = ((bits >> 12).astype(np.float64) + 0.5) * 2.0**-52  # inside (0, 1), both ends left out
    return torch.from_numpy((-np.log(-np.log(uniform))).astype(np.float32))


def choose(logits: Tensor, *, streams: Sequence[Stream] | None, step: int) -> Tensor:
    """The next token of each row: (rows, vocab) -> (rows,). Without streams, the most probable one."""
    if streams is not None:
        noise = torch.stack([gumbel_noise(stream, step, logits.shape[-1]) for stream in streams])
        logits = logits + noise.to(logits.device)
    return logits.argmax(-1)


__all__ = ["Stream", "choose", "gumbel_noise", "stream_of"]
