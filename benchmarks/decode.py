"""New tokens a second, Handspun against transformers' own `generate`, on the same prompts in the same process.

    python benchmarks/decode.py [--model smollm2-135m] [--new-tokens 64] [--runs 3]

The two take turns; the figures are medians of the runs with the lowest and highest beside them. Both generate
exactly the same number of tokens (no eos), in float32.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import handspun
from handspun.report.environment import cpu_name

PROMPT = "Give me a brief introduction to Shanghai Jiao Tong University."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    model = handspun.load(arguments.model)
    print(f"{arguments.model}, {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':<20} {'transformers':>22} {'Handspun':>22}   ratio")
    for name, rows, beams in [("1 row", 1, 1), ("8 rows", 8, 1), ("4 beams, 1 prompt", 1, 4)]:
        contenders = [
            theirs(model, rows, beams, arguments.new_tokens),
            ours(model, rows, beams, arguments.new_tokens),
        ]
        rates = measure(contenders, rows * arguments.new_tokens, arguments.runs)
        medians = [statistics.median(rate) for rate in rates]
        cells = [f"{m:.1f} ({min(r):.1f}-{max(r):.1f})" for m, r in zip(medians, rates, strict=True)]
        print(f"{name:<20} {cells[0]:>22} {cells[1]:>22}   {medians[1] / medians[0]:.2f}")


def theirs(model: handspun.ChatModel, rows: int, beams: int, new_tokens: int) -> Callable[[], None]:
    """transformers' generate: greedy or beams, nothing taken from the model's generation_config."""
    ids = torch.tensor([model.template.encode_prompt([{"role": "user", "content": PROMPT}])] * rows)

    def run() -> None:
        output = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, num_beams=beams,
        )  # fmt: skip
        assert output.shape[1] == ids.shape[1] + new_tokens

    return run


def ours(model: handspun.ChatModel, rows: int, beams: int, new_tokens: int) -> Callable[[], None]:
    """Handspun's generate on the same prompt."""

    def run() -> None:
        results = handspun.generate(
            model, [PROMPT] * rows, batch_size=rows * beams, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, num_beams=beams, stop_strings=(), notice=str,
        )  # fmt: skip
        assert all(len(result.token_ids) == new_tokens for result in results)

    return run


def measure(contenders: list[Callable[[], None]], tokens: int, runs: int) -> list[list[float]]:
    """Tokens a second of each contender in each run; they take turns, and each one's first turn is not counted."""
    rates: list[list[float]] = [[] for _ in contenders]
    for turn in range(runs + 1):
        for contender, rate in zip(contenders, rates, strict=True):
            began = time.perf_counter()
            contender()
            if turn:
                rate.append(tokens / (time.perf_counter() - began))
    return rates


if __name__ == "__main__":
    main()
