"""From a csv file to token ids and masks: Handspun, without and with its cache, and TRL's SFTTrainer.

    python benchmarks/tokenize_rows.py --model MODEL --data train.csv [--runs 3] [--only Handspun ...] [--fresh]

Every run is a process of its own; imports are not counted. Handspun's time has reading the file in it, TRL's has
not. Each figure is saved in benchmarks/results/ as it is measured, and a benchmark that is run again goes on from
what is saved; --fresh starts over.
"""

import argparse
import tempfile
from pathlib import Path

from handspun.models.embedded import EMBEDDED_NAME
from measurements import (
    DEMO_ROWS,
    Contender,
    Results,
    measure,
    model_folder,
    open_results,
    read_rows,
    rows_file,
    table,
    with_range,
)

TRL, TRL_OF_TWO, HANDSPUN, CACHED = "TRL", "TRL, two processes", "Handspun", "Handspun, from its cache"
CONTENDERS = {
    TRL: Contender("trl_tokenize.py"),
    TRL_OF_TWO: Contender("trl_tokenize.py", {"options": {"dataset_num_proc": 2}}),
    HANDSPUN: Contender("handspun_tokenize.py"),
    CACHED: Contender("handspun_tokenize.py"),
}


def main() -> None:
    arguments = parse()
    name = f"tokenize-{Path(arguments.model).name}-{arguments.data.stem}"
    settings = {
        "model": Path(arguments.model).name,
        "data": arguments.data.name,
        "max_length": arguments.max_length,
    }
    results = open_results(name, settings, fresh=arguments.fresh)
    for run in range(arguments.runs):
        with tempfile.TemporaryDirectory() as work:
            for contender in arguments.only:
                if len(results.of(contender)) <= run:
                    results.add(contender, measured(contender, arguments, work))
    print(table_of(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_NAME, help="whose tokenizer is used")
    parser.add_argument("--data", type=Path, default=DEMO_ROWS)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


def measured(contender: str, arguments: argparse.Namespace, work: str) -> dict[str, float]:
    """One process's figures; what is to come from the cache is put there by another process first."""
    of_trl = contender in (TRL, TRL_OF_TWO)
    job = {
        "model": model_folder(arguments.model),
        "rows": rows_file(work, "rows", read_rows(arguments.data)) if of_trl else str(arguments.data.resolve()),
        "max_length": arguments.max_length,
        "save_dir": f"{work}/{contender}",
    }
    if contender == CACHED:
        measure(CONTENDERS[contender], **job)
    found = measure(CONTENDERS[contender], **job)
    print(f"{contender}: {found['seconds']:.2f} s", flush=True)
    return found


def table_of(results: Results) -> str:
    """Seconds and rows a second of each contender."""
    lines = []
    for name in filter(results.of, CONTENDERS):
        runs = results.of(name)
        seconds = [run["seconds"] for run in runs]
        rate = runs[0]["examples"] / sorted(seconds)[len(seconds) // 2]
        lines.append([name, with_range(seconds, 1), f"{rate:,.0f}", f"{max(r['peak_gb'] for r in runs):.1f} GB"])
    return table(["", "seconds (lowest-highest)", "rows/s", "peak memory"], lines)


if __name__ == "__main__":
    main()
