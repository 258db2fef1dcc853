"""Peak memory of training runs, predicted and used: an epoch over a few rows, under each kind of options.

    python benchmarks/memory.py --data train.csv [--model FOLDER] [--rows 32] [--only full "lora, int8"] [--fresh]

Predicted is what `handspun train` says before it begins (`--dry-run` says the same), used is the largest
resident set of its process. Figures are saved in benchmarks/results/ as they are measured, and a benchmark that is
run again goes on from them; --fresh starts over.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from handspun.models.embedded import EMBEDDED_NAME
from measurements import DEMO_ROWS, Results, Run, draw, open_results, read_rows, table, write_rows

KINDS = {
    "full": "--dtype=float32",
    "full, bfloat16": "--dtype=bfloat16",
    "full, padded": "--dtype=float32 --batching=padded",
    "full, bfloat16, padded": "--dtype=bfloat16 --batching=padded",
    "full, activation checkpointing": "--dtype=float32 --activation-checkpointing",
    "full, bfloat16 states": "--dtype=float32 --optimizer-states=bfloat16",
    "full, 8-bit states": "--dtype=float32 --optimizer-states=8bit",
    "lora": "--lora --dtype=float32",
    "lora, bfloat16": "--lora --dtype=bfloat16",
    "lora, padded": "--lora --dtype=float32 --batching=padded",
    "lora, int8": "--lora --dtype=float32 --base-weights=int8",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    name = f"memory-{Path(arguments.model).name}-{arguments.data.stem}-{arguments.rows}"
    settings = {"rows": arguments.rows, "data": arguments.data.name, "threads": arguments.threads}
    results = open_results(name, settings, fresh=arguments.fresh)
    with tempfile.TemporaryDirectory() as work:
        [rows] = draw(read_rows(arguments.data), arguments.rows)
        write_rows(Path(work) / "train.csv", rows)
        for kind in arguments.only:
            if not results.of(kind):
                run = results.add(kind, measured(arguments, Path(work), kind))
                print(
                    f"{kind}: {run['predicted'] / 1e9:.2f} GB predicted, {run['used'] / 1e9:.2f} used", flush=True
                )
    print(summary(results))


def measured(arguments: argparse.Namespace, work: Path, kind: str) -> Run:
    """One run, without what is done before and after training: answers, losses of rows, evaluation."""
    output = work / "output"
    command = [sys.executable, "-m", "handspun", "train", "--model", arguments.model, *KINDS[kind].split()]
    command += [f"--data={work / 'train.csv'}", f"--output-dir={output}", "--overwrite", "--num-epochs=1"]
    command += [f"--threads={arguments.threads}", "--no-sample-answers", "--report-rows=0", "--eval-ratio=0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    plan = json.loads((output / "run.json").read_text(encoding="utf-8"))["plan"]
    return {"predicted": plan["peak_memory"], "used": usage.ru_maxrss * 1024}


def summary(results: Results) -> str:
    """The table of docs/results.md."""
    rows = []
    for kind in [kind for kind in KINDS if results.of(kind)]:
        [run] = results.of(kind)
        sizes = [f"{run[key] / 1e9:.1f} GB" for key in ("predicted", "used")]
        rows.append([kind, *sizes, f"{run['predicted'] / run['used'] - 1:+.0%}"])
    return table(["", "predicted", "used", "difference"], rows)


if __name__ == "__main__":
    main()
