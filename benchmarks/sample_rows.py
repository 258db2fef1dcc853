"""Draws training and held-out rows from a csv file, for the experiments of docs/results.md.

    python benchmarks/sample_rows.py train.csv --rows 1000 --held-out 100 --output-dir rows

Writes train.csv and held_out.csv. Rows with an empty output are left out before drawing.
"""

import argparse
import csv
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, required=True)
    arguments = parser.parse_args()
    with arguments.file.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["output"].strip()]
    drawn = random.Random(arguments.seed).sample(rows, arguments.rows + arguments.held_out)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, some in [("train", drawn[: arguments.rows]), ("held_out", drawn[arguments.rows :])]:
        with (arguments.output_dir / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "input", "output"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(some)


if __name__ == "__main__":
    main()
