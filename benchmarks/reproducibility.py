"""How far a seeded answer depends on the batch that it is decoded in: random batches against each prompt alone.

    python benchmarks/reproducibility.py --data train.csv [--model FOLDER] [--prompts 32] [--batchings 4] [--fresh]

Each prompt has a seed of its own, and is sampled at temperature 1, the whole vocabulary open, so that each
rounding has its chance to show. Answers alone are the reference; then all prompts are decoded in batches of random
sizes and orders. int8 weights are to give the same tokens always. Figures are saved in benchmarks/results/ as they
are measured, and a benchmark that is run again goes on from them; --fresh starts over.
"""

import argparse
import random
from pathlib import Path
from typing import Any

import torch

import handspun
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import ChatModel
from measurements import DEMO_ROWS, Results, Run, draw, open_results, read_rows, table

KINDS = ("float32", "bfloat16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batchings", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = f"reproducibility-{Path(arguments.model).name}-{arguments.data.stem}-{arguments.prompts}"
    settings = {key: getattr(arguments, key) for key in ("prompts", "batchings", "new_tokens", "threads")}
    results = open_results(name, settings | {"data": arguments.data.name}, fresh=arguments.fresh)
    [rows] = draw(read_rows(arguments.data), arguments.prompts)
    prompts = [f"{row['instruction']}\n\n{row['input']}".strip() for row in rows]
    for kind in arguments.weights:
        if not results.of(kind):
            chat = handspun.load(arguments.model, weights=kind)
            run = results.add(kind, measured(chat, prompts, arguments.batchings, arguments.new_tokens))
            print(f"{kind}: {len(run['parted'])} of {run['answers']} answers part", flush=True)
    print(summary(results))


def measured(chat: ChatModel, prompts: list[str], batchings: int, new_tokens: int) -> Run:
    """How many answers there were in batches, and of those that part from the answer alone, after which token."""

    def answers(chosen: list[int], batch_size: int) -> list[list[int]]:
        options: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        found = handspun.generate(
            chat,
            [prompts[n] for n in chosen],
            seed=tuple(chosen),
            max_new_tokens=new_tokens,
            batch_size=batch_size,
            **options,
        )
        return [answer.token_ids for answer in found]

    alone = [answers([n], 1)[0] for n in range(len(prompts))]
    parted, choose = list[int](), random.Random(0)
    for _ in range(batchings):
        order = choose.sample(range(len(prompts)), len(prompts))
        together = answers(order, choose.randint(2, 16))
        for n, found in zip(order, together, strict=True):
            if found != alone[n]:
                parted.append(first_difference(found, alone[n]))
    tokens = sum(map(len, alone)) * batchings
    return {"answers": batchings * len(prompts), "tokens": tokens, "parted": sorted(parted)}


def first_difference(one: list[int], other: list[int]) -> int:
    """The number of leading tokens that are the same."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def summary(results: Results) -> str:
    """The table of docs/decoding.md."""
    rows = []
    for kind in [kind for kind in KINDS if results.of(kind)]:
        [run] = results.of(kind)
        after = ", ".join(map(str, run["parted"])) or "none"
        rows.append([kind, f"{run['answers']} ({run['tokens']} tokens)", str(len(run["parted"])), after])
    return table(["weights", "answers in batches", "not as alone", "after tokens"], rows)


if __name__ == "__main__":
    main()
