"""How many times as fast as train_inference.py the package does the same work, on the demo's model and rows.

    python benchmarks/whole_job.py [--rounds 3]

One thread and CPU time, in one process and by turns, so that other programs disturb all alike. Losses and tokens
of float32 are compared on the way. Printed are medians, and the lowest and highest ratio of a round.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import handspun
import train_inference as script
from handspun.config import TrainConfig
from handspun.data.dataset import DEFAULT_MAX_LENGTH, load_splits
from handspun.runs.record import environment
from handspun.training.batching import epoch_order
from handspun.training.loop import Loop, Step, start, train
from handspun.training.runner import select_runner
from measurements import DEMO_ROWS, table

CONFIG = TrainConfig(
    model="smollm2-135m",
    data=str(DEMO_ROWS),
    eval_data=str(DEMO_ROWS.with_name("held_out.csv")),
    learning_rate=5e-5,
)
PROMPTS = ["Give me a brief introduction to Shanghai Jiao Tong University.", "Tell me a joke about computers."]
NEW_TOKENS = 32
DECODINGS = {
    "1 prompt, greedy": (PROMPTS[:1], {}),
    "8 prompts, greedy": (PROMPTS * 4, {}),
    "1 prompt, 4 beams": (PROMPTS[:1], {"num_beams": 4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    facts = environment()
    lines = [*training(rounds), *decoding(rounds)]
    print(f"\n{facts['machine']}, one thread, {rounds} rounds, CPU seconds\n")
    print(table(["", "this file", "the package", "times as fast (lowest-highest)"], lines))


def training(rounds: int) -> Iterator[list[str]]:
    """A step a round. The first one is not counted: it warms up."""
    sides = [own_steps(), package_steps("float32"), package_steps("bfloat16")]
    steps = [[next(side) for side in sides] for _ in range(rounds + 1)][1:]
    for own, float32, _ in steps:
        assert abs(own[1] - float32[1]) < 1e-4 * float32[1], "other losses"
    for place, dtype in ((1, "float32"), (2, "bfloat16")):
        yield compared(f"a training step, {dtype}", [(step[0][0], step[place][0]) for step in steps])


def own_steps() -> Iterator[tuple[float, float]]:
    """(CPU seconds, loss) of each step of the script."""
    model, tokenizer = script.load(CONFIG.model)
    examples = script.read_examples(CONFIG.data, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    batches = torch.tensor(epoch_order(len(examples), seed=CONFIG.seed, epoch=1)).split(CONFIG.batch_size)
    for step in count():
        for group in optimizer.param_groups:
            total_steps = len(batches) * CONFIG.num_epochs
            group["lr"] = script.learning_rate_at(step, total_steps, CONFIG.peak_learning_rate)
        began = time.process_time()
        loss, _ = script.train_step(model.train(), optimizer, [examples[row] for row in batches[step]])
        yield time.process_time() - began, loss


def package_steps(dtype: str) -> Iterator[tuple[float, float]]:
    """(CPU seconds, loss) of each step of the package."""
    chat = handspun.load(CONFIG.model)
    examples = load_splits(CONFIG, chat.template, max_length=DEFAULT_MAX_LENGTH, cache=None)[0].examples
    with select_runner(chat.model, CONFIG, examples, dtype=getattr(torch, dtype), pad_token_id=0) as runner:
        loop = Loop(config=CONFIG, examples=examples, runner=runner, clock=time.process_time)
        for event in train(loop, start(chat.model, CONFIG)):
            if isinstance(event, Step):
                yield event.seconds, event.loss


def decoding(rounds: int) -> Iterator[list[str]]:
    """Each decoding a round, and one before that warms up."""
    model, tokenizer = script.load(CONFIG.model)
    own_chat = model.eval(), tokenizer
    chats = {weights: handspun.load(CONFIG.model, weights=weights) for weights in ("float32", "int8")}
    for name, (prompts, how) in DECODINGS.items():
        pairs: dict[str, list[tuple[float, float]]] = {weights: [] for weights in chats}
        for _ in range(rounds + 1):
            began = time.process_time()
            options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, **how}
            own = script.generate(*own_chat, prompts, script.Decoding(**options))
            own_seconds = time.process_time() - began
            for weights, chat in chats.items():
                began = time.process_time()
                results = handspun.generate(chat, prompts, **options)
                pairs[weights].append((own_seconds, time.process_time() - began))
                same = [result.token_ids for result in results] == [answer.token_ids for answer in own]
                assert same or weights == "int8", "other tokens"
        for weights, found in pairs.items():
            yield compared(f"{name}, {weights} weights", found[1:])


def compared(name: str, pairs: list[tuple[float, float]]) -> list[str]:
    """A line of the table. pairs: CPU seconds of the script and of the package in each round."""
    own, package = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    ratios = sorted(a / b for a, b in pairs)
    ratio = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"
    return [name, f"{own:.2f}", f"{package:.2f}", ratio]


if __name__ == "__main__":
    main()
