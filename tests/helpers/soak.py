"""`python soak.py STEPS`: so many optimizer steps and generations of random shapes on a tiny model.

Prints the memory that is held after two fifths of them, and at the end.
"""

import random
import sys
from pathlib import Path
from typing import Any

import torch

from handspun import TrainConfig, generate
from handspun.data.examples import Example
from handspun.kernels.allocator import disable_malloc_trim
from handspun.kernels.onednn import limit_primitive_cache
from handspun.models.load import ChatModel
from handspun.training.loop import Loop, start, train
from handspun.training.runner import select_runner
from tiny import tiny_model, tiny_tokenizer


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def examples(count: int, rng: random.Random) -> list[Example]:
    lengths = [rng.randrange(4, 120) for _ in range(count)]
    rows = [[rng.randrange(300) for _ in range(length)] for length in lengths]
    return [
        Example(ids, [i >= len(ids) // 3 for i in range(len(ids))], "rows", n) for n, ids in enumerate(rows, 1)
    ]


def training(steps: int, rng: random.Random) -> tuple[int, int]:
    """Batches of four rows, cut into micro-batches, with evaluations on the way."""
    config = TrainConfig(batch_size=4, num_epochs=1, max_tokens=200, eval_steps=97, learning_rate=1e-4)
    rows, held_out = examples(4 * steps, rng), examples(9, rng)
    model = tiny_model("qwen2", tie_word_embeddings=True)
    early = 0
    with select_runner(model, config, rows, dtype=torch.float32, pad_token_id=0) as runner:
        loop = Loop(config=config, examples=rows, held_out=held_out, runner=runner)
        for event in train(loop, start(model, config)):
            if event.step == steps * 2 // 5:
                early = resident()
    return early, resident()


def generations(count: int, rng: random.Random) -> tuple[int, int]:
    """Greedy, sampling and beam search, of prompts of any lengths, some at a time."""
    chat = ChatModel(tiny_model("llama"), tiny_tokenizer(), "tiny")
    early = 0
    for made in range(count):
        prompts = ["".join(rng.choices("abcdefgh ", k=rng.randrange(1, 200))) for _ in range(rng.randrange(1, 4))]
        kinds: list[dict[str, Any]] = [
            {},
            {"do_sample": True, "seed": made, "top_p": 0.9},
            {"num_beams": rng.randrange(2, 4)},
        ]
        kind = rng.choice(kinds)
        generate(chat, prompts, max_new_tokens=rng.randrange(1, 6), **kind)
        if made == count * 2 // 5:
            early = resident()
    return early, resident()


if __name__ == "__main__":
    torch.set_num_threads(1)
    disable_malloc_trim()
    limit_primitive_cache()
    for work in (training, generations):
        print(work.__name__, *work(int(sys.argv[1]), random.Random(0)), flush=True)
