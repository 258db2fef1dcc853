"""The sweep behind the default learning rates and schedule: held-out loss after one epoch, full and LoRA.

    python benchmarks/learning_rates.py --data train.csv [--rows 1000] [--held-out 100] [--dtype bfloat16]
    python benchmarks/learning_rates.py --data train.csv --model FOLDER --only full --rates 2e-5 5e-5 1e-4

Each run is a `handspun train` command on the same rows. First the rates, with the cosine schedule; then, unless
rates were given, the other schedules at the best rate of each method. Each figure is saved in benchmarks/results/
as it is measured, and a sweep that is run again goes on from what is saved; --fresh starts over.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from handspun.models.embedded import EMBEDDED_NAME
from measurements import (
    DEMO_ROWS,
    IMAGES,
    Results,
    Run,
    axes_of_a_plot,
    draw,
    open_results,
    read_rows,
    run_process,
    save_plot,
    table,
    write_rows,
)

RATES = {"full": [5e-6, 1e-5, 2e-5, 5e-5, 1e-4], "lora": [5e-5, 1e-4, 2e-4, 5e-4, 1e-3]}
SCHEDULES = ["cosine", "linear", "constant"]


def main() -> None:
    arguments = parse()
    name = f"learning-rates-{Path(arguments.model).name}-{arguments.data.stem}-{arguments.rows}-{arguments.dtype}"
    settings = {key: getattr(arguments, key) for key in ("rows", "held_out", "batch_size", "dtype")}
    settings["data"] = arguments.data.name
    results = open_results(name, settings, fresh=arguments.fresh)
    with tempfile.TemporaryDirectory() as work:
        training, held_out = draw(read_rows(arguments.data), arguments.rows, arguments.held_out)
        write_rows(Path(work) / "train.csv", training)
        write_rows(Path(work) / "held_out.csv", held_out)
        for method in arguments.only:
            for rate in arguments.rates or RATES[method]:
                run_once(results, arguments, Path(work), method, rate, "cosine")
        for method in arguments.only if not arguments.rates else []:
            for schedule in SCHEDULES:
                run_once(results, arguments, Path(work), method, best_rate(results, method), schedule)
    print(tables(results))
    plot(results, IMAGES / f"{name}.svg")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", help="in place of the sweep's own")
    parser.add_argument("--only", nargs="+", choices=RATES, default=list(RATES), help="one method of the two")
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


def run_once(
    results: Results, arguments: argparse.Namespace, work: Path, method: str, rate: float, schedule: str
) -> None:
    """One training run, unless its result is there already."""
    name = run_name(method, rate, schedule)
    if results.of(name):
        return
    output = work / "output"
    options = [f"--learning-rate={rate}", f"--lr-schedule={schedule}", f"--output-dir={output}", "--overwrite"]
    options += [f"--{key}={getattr(arguments, key.replace('-', '_'))}" for key in ("model", "dtype", "threads")]
    options += [f"--batch-size={arguments.batch_size}", "--num-epochs=1", "--save-dtype=bfloat16"]
    options += [f"--data={work / 'train.csv'}", f"--eval-data={work / 'held_out.csv'}"]
    command = [sys.executable, "-m", "handspun", "train", *options, *(["--lora"] if method == "lora" else [])]
    run_process(command)
    run = results.add(name, outcome(output) | {"threads": arguments.threads})
    print(f"{name}: held-out loss {run['before']:.4f} -> {run['after']:.4f} ({run['seconds']:.0f} s)", flush=True)


def outcome(output: Path) -> Run:
    """Held-out losses, the losses of the steps and the seconds of a finished run."""
    facts = json.loads((output / "run.json").read_text(encoding="utf-8"))
    events = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "step"]
    held_out = [evaluation["loss"] for evaluation in facts["evaluations"]]
    return {"before": held_out[0], "after": held_out[-1], "losses": losses, "seconds": facts["seconds"]}


def run_name(method: str, rate: float, schedule: str) -> str:
    """`full, 2e-05, cosine`."""
    return f"{method}, {rate:g}, {schedule}"


def measured(results: Results, method: str) -> dict[float, float]:
    """Held-out loss by rate, under the cosine schedule."""
    runs = {rate: results.of(run_name(method, rate, "cosine")) for rate in sorted(rates_of(results, method))}
    return {rate: found[0]["after"] for rate, found in runs.items() if found}


def rates_of(results: Results, method: str) -> set[float]:
    """All rates that were tried."""
    return {float(name.split(", ")[1]) for name in results.runs if name.startswith(f"{method}, ")}


def best_rate(results: Results, method: str) -> float:
    """The rate with the lowest held-out loss under the cosine schedule."""
    losses = measured(results, method)
    return min(losses, key=lambda rate: losses[rate])


def tables(results: Results) -> str:
    """Held-out loss by rate, and by schedule at the best rate."""
    parts = []
    for method in [method for method in RATES if rates_of(results, method)]:
        losses = measured(results, method)
        cells = [f"**{loss:.4f}**" if loss == min(losses.values()) else f"{loss:.4f}" for loss in losses.values()]
        parts.append(table([method, *(f"{rate:g}" for rate in losses)], [["held-out loss", *cells]]))
        best = best_rate(results, method)
        runs = {schedule: results.of(run_name(method, best, schedule)) for schedule in SCHEDULES}
        if all(runs.values()):
            row = ["held-out loss", *(f"{found[0]['after']:.4f}" for found in runs.values())]
            parts.append(table([f"{method}, {best:g}", *SCHEDULES], [row]))
    return "\n\n".join(parts)


def plot(results: Results, file: Path) -> None:
    """Held-out loss over the learning rate, a line for each method."""
    figure, axes = axes_of_a_plot("learning rate", "held-out loss after one epoch")
    for method in [method for method in RATES if rates_of(results, method)]:
        losses = measured(results, method)
        axes.plot(list(losses), list(losses.values()), marker="o", label=method)
    axes.set_xscale("log")
    axes.legend(frameon=False)
    save_plot(figure, file)


if __name__ == "__main__":
    main()
