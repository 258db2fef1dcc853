"""What prompt lookup gains: new tokens a second with and without it, on rows that summarize, correct or rewrite.

    python benchmarks/speculation.py --data train.csv [--model FOLDER] [--rows 32] [--new-tokens 128] [--fresh]

Rows have a long `input`, and an instruction that asks for it to be said again in another way. They are answered
with float32 and int8 weights, 1 and 8 at a time, greedy and sampled (temperature 0.7), by turns without and with
prompt lookup, batch for batch; int8 answers must be the same, token for token. The first rows only warm up.
Figures are saved in benchmarks/results/ as they are measured, and a benchmark that is run again goes on from them;
--fresh starts over.
"""

import argparse
import re
import statistics
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

import handspun
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import ChatModel
from measurements import Results, Row, Run, draw, open_results, read_rows, table, with_range

KINDS = ("float32", "int8")
BATCHES = (1, 8)
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.7, "seed": 0}}
LOOKUPS: dict[str, dict[str, Any]] = {
    "without": {},
    "4 tokens": {"prompt_lookup_num_tokens": 4},
    "10 tokens": {"prompt_lookup_num_tokens": 10},
}
AGAIN = re.compile(r"(summari[sz]e|rewrite|edit|correct|rephrase|paraphrase|proofread|revise|improve|fix)\b", re.I)
LONG = 200
"""Characters of an input, at least."""
WARM_UP = 8
"""Rows that are not counted."""


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    name = f"speculation-{Path(arguments.model).name}-{arguments.data.stem}-{arguments.rows}"
    settings = {key: getattr(arguments, key) for key in ("rows", "new_tokens", "threads")}
    results = open_results(name, {**settings, "data": arguments.data.name}, fresh=arguments.fresh)
    prompts = prompts_of(read_rows(arguments.data), arguments.rows)
    for weights in arguments.weights:
        model = handspun.load(arguments.model, weights=weights)
        for batch, mode in product(BATCHES, MODES):
            measure(results, model, prompts, (weights, batch, mode), arguments.new_tokens)
    print(summary(results))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=32, help="rows; the first 8 only warm up")
    parser.add_argument("--new-tokens", type=int, default=128, help="most of an answer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args(words)


def prompts_of(rows: Sequence[Row], count: int) -> list[str]:
    """So many of the rows that say a long input again, drawn: instruction and input."""
    fitting = [row for row in rows if AGAIN.match(row["instruction"]) and len(row["input"]) >= LONG]
    if len(fitting) < count:
        raise SystemExit(f"--rows {count}: the file has {len(fitting)} rows that say a long input again.")
    [drawn] = draw(fitting, count)
    return [f"{row['instruction']}\n{row['input']}" for row in drawn]


def key(weights: str, batch: int, mode: str, lookup: str) -> str:
    """The name of a case's runs, one a batch."""
    return f"{weights}, {batch} {'row' if batch == 1 else 'rows'}, {mode}: {lookup}"


def measure(
    results: Results, model: ChatModel, prompts: Sequence[str], case: tuple[str, int, str], new_tokens: int
) -> None:
    """Every batch that is not there yet, without and with lookup in turn. SystemExit if int8 answers differ."""
    weights, batch, mode = case
    batches = [prompts[start : start + batch] for start in range(WARM_UP, len(prompts), batch)]
    done = min(len(results.of(key(*case, lookup))) for lookup in LOOKUPS)
    for number, some in enumerate([prompts[:batch], *batches[done:]] if done < len(batches) else []):
        answers = []
        for lookup in LOOKUPS:
            run, ids = answered(model, some, new_tokens, mode, lookup)
            answers.append(ids)
            if number > 0 and len(results.of(key(*case, lookup))) < done + number:
                results.add(key(*case, lookup), run)
        if weights == "int8" and any(ids != answers[0] for ids in answers):
            raise SystemExit(f"{', '.join(map(str, case))}: answers differ, which they should not.")


def answered(
    model: ChatModel, prompts: Sequence[str], new_tokens: int, mode: str, lookup: str
) -> tuple[Run, list[list[int]]]:
    """One batch: its seconds, how much was generated, drafted and accepted; and the answers."""
    began = time.perf_counter()
    answers = handspun.generate(
        model, list(prompts), max_new_tokens=new_tokens, repetition_penalty=1.0,
        **{"do_sample": False, **MODES[mode]}, **LOOKUPS[lookup],
    )  # fmt: skip
    seconds = time.perf_counter() - began
    ids = [answer.token_ids for answer in answers]
    run = {
        "seconds": seconds,
        "tokens": sum(map(len, ids)),
        "drafted": sum(answer.drafted_tokens for answer in answers),
        "accepted": sum(answer.accepted_tokens for answer in answers),
    }
    return run, ids


def summary(results: Results) -> str:
    """Tokens a second of each case, medians over the batches; the gain; the share of drafted tokens accepted."""
    lines = []
    for case in product(KINDS, BATCHES, MODES):
        runs = {lookup: results.of(key(*case, lookup)) for lookup in LOOKUPS}
        if all(runs.values()):
            plain, *others = runs.values()
            cells = [with_range(rates(plain), 1), *(gained(other, plain) for other in others)]
            lines.append([key(*case, "").removesuffix(": "), *cells])
    return table(["new tokens/s (lowest-highest)", *LOOKUPS], lines)


def rates(runs: Sequence[Run]) -> list[float]:
    """New tokens a second, of each batch."""
    return [run["tokens"] / run["seconds"] for run in runs]


def gained(runs: Sequence[Run], plain: Sequence[Run]) -> str:
    """`41.0 (30.1-62.5), 1.52 times, 43 % accepted`: the median of the batches' own ratios."""
    ratio = statistics.median(a / b for a, b in zip(rates(runs), rates(plain), strict=True))
    accepted = sum(run["accepted"] for run in runs) / max(1, sum(run["drafted"] for run in runs))
    return f"{with_range(rates(runs), 1)}, {ratio:.2f} times, {100 * accepted:.0f} % accepted"


if __name__ == "__main__":
    main()
