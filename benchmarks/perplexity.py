"""What int8 weights cost: perplexity over the answers of held-out rows, by the decoding engine, float32 and int8.

    python benchmarks/perplexity.py --data train.csv [--model FOLDER] [--rows 500] [--fresh]

Each kind of weights is loaded in turn, and its figures are saved in benchmarks/results/ as they are measured.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch

import handspun
from handspun.data.examples import Example, build_examples
from handspun.data.rows import Row
from handspun.decoding.engines.base import ModelInput
from handspun.decoding.engines.choose import make_engine
from handspun.models.embedded import EMBEDDED_NAME
from measurements import DEMO_ROWS, Results, draw, open_results, read_rows, table

KINDS = ("float32", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    name = f"perplexity-{Path(arguments.model).name}-{arguments.data.stem}-{arguments.rows}"
    results = open_results(name, {"rows": arguments.rows, "data": arguments.data.name}, fresh=arguments.fresh)
    [rows] = draw(read_rows(arguments.data), arguments.rows, seed=1)
    for kind in KINDS:
        if not results.of(kind):
            results.add(kind, measured(arguments.model, kind, rows))
    print(summary(results))


def measured(name: str, kind: Any, rows: list[dict[str, str]]) -> dict[str, float]:
    """Mean loss over the learned tokens of all rows."""
    chat = handspun.load(name, weights=kind)
    named = [Row("rows", number, dict(row)) for number, row in enumerate(rows)]
    examples, _ = build_examples(named, chat.template, max_length=1024)
    began, engine = time.perf_counter(), make_engine(chat)
    loss = sum(answer_loss(engine, example) for example in examples)
    tokens = sum(example.learned_tokens for example in examples)
    print(f"{kind}: {loss / tokens:.4f} over {tokens} tokens", flush=True)
    return {"loss": loss / tokens, "tokens": tokens, "seconds": time.perf_counter() - began}


def answer_loss(engine: Any, example: Example) -> float:
    """The loss summed over the example's learned tokens."""
    row = engine.add()
    logits = engine.forward([ModelInput(row, example.input_ids[:-1], all_logits=True)])
    engine.free(row)
    learned = torch.tensor(example.loss_mask[1:])
    targets = torch.tensor(example.input_ids[1:])[learned]
    return float(torch.nn.functional.cross_entropy(logits[learned], targets, reduction="sum"))


def summary(results: Results) -> str:
    """Loss and perplexity of each kind, and the ratio of perplexities."""
    exact = results.of(KINDS[0])[0]["loss"]
    losses = {kind: results.of(kind)[0]["loss"] for kind in KINDS}
    lines = [
        [kind, f"{loss:.4f}", f"{math.exp(loss):.3f}", f"{math.exp(loss - exact):.4f}"]
        for kind, loss in losses.items()
    ]
    return table(["weights", "loss", "perplexity", "ratio"], lines)


if __name__ == "__main__":
    main()
