"""Seconds from a command to the first thing that it prints, which for generate is the first token.

    python benchmarks/startup.py [--model smollm2-135m] [--rounds 5] [--other CHECKOUT]

Each command is a process of its own, and they take turns. Medians, lowest and highest of wall time; medians of the
CPU time of all threads. The first round, which brings the files into the page cache, is not counted. --other:
another checkout, whose commands take turns with these.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
IMPORTS = {
    "import torch": "torch",
    "imports of train": "handspun.runs.train",
    "imports of serve": "handspun.serve.server",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--other", type=Path)
    args = parser.parse_args()
    checkouts = [HERE, *([args.other.resolve()] if args.other else [])]
    rows = [(name, checkout, words) for name, words in commands(args.model).items() for checkout in checkouts]
    times: list[list[tuple[float, float]]] = [[] for _ in rows]
    for _ in range(args.rounds + 1):
        for (_, checkout, words), found in zip(rows, times, strict=True):
            found.append(to_first_output([sys.executable, *words], checkout))
    print("| | checkout | wall, s (lowest-highest) | CPU, s |\n| --- | --- | --- | --- |")
    for (name, checkout, _), found in zip(rows, times, strict=True):
        walls, cpus = zip(*found[1:], strict=True)
        spread = f"{statistics.median(walls):.2f} ({min(walls):.2f}-{max(walls):.2f})"
        print(f"| {name} | {checkout.name} | {spread} | {statistics.median(cpus):.2f} |")


def commands(model: str) -> dict[str, list[str]]:
    """Return the words of each command after `python`."""
    asked = ["-m", "handspun", "generate", "--model", model, "-p", "Tell me a joke.", "--max-new-tokens", "2"]
    found = {name: ["-c", f"import {module}; print()"] for name, module in IMPORTS.items()}
    return found | {f"generate, {weights}": [*asked, "--weights", weights] for weights in ("int8", "float32")}


def to_first_output(command: list[str], checkout: Path) -> tuple[float, float]:
    """Return wall and CPU seconds until the command writes its first byte on standard output."""
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - start
        fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        process.stdout.read()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return seconds, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
