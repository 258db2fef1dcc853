"""Rows a second and peak memory of one epoch of full fine-tuning: Handspun against TRL's SFTTrainer.

    python benchmarks/train.py --data train.csv [--model FOLDER] [--rows 64] [--batch-size 8] [--runs 3] [--fresh]

Every measurement is a process of its own, with two threads, float32 if not said otherwise, the same rows and
learning rate; contenders take turns. Each figure is saved in benchmarks/results/ as it is measured, and a
benchmark that is run again goes on from what is saved; --fresh starts over. TRL runs in an environment of its
own, .venv-peers, which `make bench` makes.
"""

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from handspun.models.embedded import EMBEDDED_NAME, embedded_folder
from handspun.report.environment import cpu_name

HERE = Path(__file__).parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
CONTENDERS = {
    "TRL, its defaults": (PEERS, "trl_train.py", "default"),
    "TRL at its best": (PEERS, "trl_train.py", "best"),
    "Handspun, padded": (Path(sys.executable), "handspun_train.py", "padded"),
    "Handspun": (Path(sys.executable), "handspun_train.py", "packed"),
    "TRL at its best, bfloat16": (PEERS, "trl_train.py", "best-bfloat16"),
    "Handspun, bfloat16": (Path(sys.executable), "handspun_train.py", "packed-bfloat16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="a csv file in the Alpaca format (default: the demonstration's rows)"
    )
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    parser.add_argument("--fresh", action="store_true")
    arguments = parser.parse_args()
    data = arguments.data or HERE.parent / "src" / "handspun" / "demo" / "demo.csv"
    model = str(embedded_folder(print)) if arguments.model == EMBEDDED_NAME else arguments.model
    name = f"train-{Path(arguments.model).name}-{data.stem}-{arguments.rows}"
    results = HERE / "results" / f"{name}.json"
    results.parent.mkdir(exist_ok=True)
    rows_file = results.with_suffix(".rows")
    rows_file.write_text(json.dumps(sample(data, arguments.rows)), encoding="utf-8")
    measured: dict[str, list[dict[str, Any]]] = {}
    if results.exists() and not arguments.fresh:
        measured = json.loads(results.read_text(encoding="utf-8"))["runs"]
    for run in range(arguments.runs):
        for contender, (python, script, mode) in CONTENDERS.items():
            done = measured.setdefault(contender, [])
            if len(done) > run or not python.exists() or contender not in arguments.only:
                continue
            command = [str(python), str(HERE / "contenders" / script), model, str(rows_file), mode]
            done.append(measure([*command, str(arguments.batch_size)]))
            record = {"machine": cpu_name(), "data": data.name, "rows": arguments.rows, "runs": measured}
            results.write_text(json.dumps(record, indent=1), encoding="utf-8")
            print(f"{contender}: {arguments.rows / done[-1]['seconds']:.2f} rows/s", flush=True)
    rows_file.unlink()
    print_table(measured, arguments.rows)


def sample(data: Path, count: int) -> list[dict[str, str]]:
    """Rows drawn with a fixed seed; those without an output are left out."""
    with data.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["output"].strip()]
    return random.Random(0).sample(rows, count)


def measure(command: list[str]) -> dict[str, Any]:
    """The JSON object on the last line that the contender prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def print_table(measured: dict[str, list[dict[str, Any]]], rows: int) -> None:
    """Medians, with the lowest and highest, and the ratio to TRL at its best."""
    rates = {name: [rows / run["seconds"] for run in runs] for name, runs in measured.items() if runs}
    best = statistics.median(rates.get("TRL at its best") or next(iter(rates.values())))
    print("| | rows/s (lowest-highest) | peak GB | ratio |\n| --- | --- | --- | --- |")
    for name, rate in rates.items():
        peak = statistics.median(run["peak_gb"] for run in measured[name])
        median = statistics.median(rate)
        print(f"| {name} | {median:.2f} ({min(rate):.2f}-{max(rate):.2f}) | {peak:.1f} | {median / best:.2f} |")


if __name__ == "__main__":
    main()
