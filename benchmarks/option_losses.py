"""What options that save memory or time cost: held-out loss after one epoch, with and without them.

    python benchmarks/option_losses.py optimizer-states --data train.csv [--rows 300] [--held-out 100]
    python benchmarks/option_losses.py base-weights --data train.csv --rows 1000
    python benchmarks/option_losses.py dtype --data train.csv

Each run is a `handspun train` command on the same rows in the same order. Each figure is saved in
benchmarks/results/ as it is measured, and a run that is there already is not made again; --fresh starts over.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from handspun.models.embedded import EMBEDDED_NAME
from measurements import DEMO_ROWS, Results, Run, draw, open_results, read_rows, run_process, table, write_rows

CHOICES = {
    "optimizer-states": ("float32", "bfloat16", "8bit"),
    "base-weights": ("float32", "int8"),
    "dtype": ("float32", "bfloat16"),
}
"""Of each option, the exact one first."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("option", choices=CHOICES)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    name = f"{arguments.option}-{Path(arguments.model).name}-{arguments.data.stem}-{arguments.rows}"
    settings = {key: getattr(arguments, key) for key in ("rows", "held_out", "threads")}
    results = open_results(name, settings | {"data": arguments.data.name}, fresh=arguments.fresh)
    with tempfile.TemporaryDirectory() as work:
        training, held_out = draw(read_rows(arguments.data), arguments.rows, arguments.held_out)
        write_rows(Path(work) / "train.csv", training)
        write_rows(Path(work) / "held_out.csv", held_out)
        for choice in CHOICES[arguments.option]:
            if not results.of(choice):
                run = results.add(choice, measured(arguments, Path(work), choice))
                print(f"{choice}: held-out loss {run['before']:.4f} -> {run['after']:.4f}", flush=True)
    print(summary(results, arguments.option))


def measured(arguments: argparse.Namespace, work: Path, choice: str) -> Run:
    """One training run: held-out losses, the losses of its steps, and the most memory that it held."""
    output = work / "output"
    options = {
        "model": arguments.model,
        "data": work / "train.csv",
        "eval-data": work / "held_out.csv",
        "output-dir": output,
        "num-epochs": 1,
        "dtype": "float32",
        "threads": arguments.threads,
        arguments.option: choice,
    }
    command = [sys.executable, "-m", "handspun", "train", *(f"--{key}={value}" for key, value in options.items())]
    command += ["--overwrite", "--no-sample-answers", "--report-rows=0"]
    run_process(command + (["--lora"] if arguments.option == "base-weights" else []))
    facts = json.loads((output / "run.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    held_out = [evaluation["loss"] for evaluation in facts["evaluations"]]
    return {
        "before": held_out[0],
        "after": held_out[-1],
        "losses": [step["loss"] for step in steps],
        "memory": max(step["memory_bytes"] for step in steps),
    }


def summary(results: Results, option: str) -> str:
    """The table of docs/benchmarks/quality.md."""
    exact = results.of(CHOICES[option][0])[0]
    rows = []
    for choice in CHOICES[option]:
        [run] = results.of(choice)
        largest = max(abs(a - b) for a, b in zip(run["losses"], exact["losses"], strict=True))
        after = f"{run['after']:.4f} ({run['after'] / exact['after'] - 1:+.2%})"
        rows.append([choice, f"{run['before']:.4f}", after, f"{largest:.1e}", f"{run['memory'] / 1e9:.2f} GB"])
    return table([option, "held-out loss before", "after", "a step's loss differs by at most", "memory"], rows)


if __name__ == "__main__":
    main()
