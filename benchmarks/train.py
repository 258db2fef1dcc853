"""One epoch of fine-tuning, Handspun against TRL's SFTTrainer and transformers' Trainer: speed, memory, losses.

    python benchmarks/train.py --data train.csv [--model FOLDER] [--rows 64] [--batch-size 8] [--runs 3] [--fresh]
    python benchmarks/train.py --data train.csv --lora

Every measurement is a process of its own, with the same rows, tokens, learning rate and threads; contenders take
turns, and all but those that group by length see the rows in the same order. Each figure is saved in
benchmarks/results/ as it is measured, and a benchmark that is run again goes on from what is saved; --fresh starts
over. The peers run in an environment of their own, .venv-peers, which `make bench` makes; without it they are left
out. The losses of all are drawn into docs/images/.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from handspun.models.embedded import EMBEDDED_NAME
from measurements import (
    DEMO_ROWS,
    IMAGES,
    TRL_AT_ITS_BEST,
    Contender,
    Results,
    axes_of_a_plot,
    chosen,
    draw,
    measure,
    model_folder,
    open_results,
    read_rows,
    rows_file,
    save_plot,
    table,
    with_range,
)

BFLOAT16 = {"dtype": "bfloat16"}
FULL = {
    "TRL, its defaults": Contender("trl_train.py"),
    "TRL at its best": Contender("trl_train.py", {"options": TRL_AT_ITS_BEST}),
    "Trainer": Contender("trainer_train.py"),
    "Trainer, grouped by length": Contender(
        "trainer_train.py", {"options": {"train_sampling_strategy": "group_by_length"}}
    ),
    "Handspun, padded": Contender("handspun_train.py", {"options": {"batching": "padded"}}),
    "Handspun": Contender("handspun_train.py"),
    "TRL at its best, bfloat16": Contender("trl_train.py", {"options": TRL_AT_ITS_BEST, **BFLOAT16}),
    "Handspun, bfloat16": Contender("handspun_train.py", BFLOAT16),
}
LORA = {
    "TRL at its best": Contender("trl_train.py", {"options": TRL_AT_ITS_BEST}),
    "Handspun": Contender("handspun_train.py"),
    "TRL at its best, bfloat16": Contender("trl_train.py", {"options": TRL_AT_ITS_BEST, **BFLOAT16}),
    "Handspun, bfloat16": Contender("handspun_train.py", BFLOAT16),
    "Handspun, int8 base": Contender("handspun_train.py", {"options": {"base_weights": "int8"}}),
}
REFERENCE = "TRL at its best"
LEARNING_RATES = {"full": 1e-5, "lora": 2e-4}


def main() -> None:
    arguments = parse()
    method = "lora" if arguments.lora else "full"
    contenders = chosen(LORA if arguments.lora else FULL, arguments.only)
    what = arguments.results or f"{Path(arguments.model).name}-{arguments.data.stem}-{arguments.rows}"
    name = f"train-{method}-{what}"
    settings = {key: getattr(arguments, key) for key in ("rows", "batch_size", "max_length", "threads", "lora")}
    settings |= {"learning_rate": LEARNING_RATES[method], "data": arguments.data.name}
    results = open_results(name, settings, fresh=arguments.fresh)
    measure_all(results, contenders, arguments, learning_rate=LEARNING_RATES[method])
    print(summary(results))
    plot_losses(results, IMAGES / f"{name}.svg")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--lora", action="store_true", help="LoRA on all linear layers, r 16, alpha 32")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders, as they are called in the table")
    parser.add_argument("--results", metavar="NAME", help="of the saved figures (default: model, data and rows)")
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


def measure_all(
    results: Results, contenders: dict[str, Contender], arguments: argparse.Namespace, *, learning_rate: float
) -> None:
    """Every run of every contender that is not there yet; they take turns."""
    with tempfile.TemporaryDirectory() as work:
        [rows] = draw(read_rows(arguments.data), arguments.rows)
        job = {key: getattr(arguments, key) for key in ("batch_size", "max_length", "threads", "lora")}
        job |= {"model": model_folder(arguments.model), "rows": rows_file(work, "rows", rows)}
        for turn in range(arguments.runs):
            for name, contender in contenders.items():
                if len(results.of(name)) <= turn:
                    run = results.add(name, measure(contender, **job, learning_rate=learning_rate))
                    refuse_other_tokens(results)
                    print(f"{name}: {arguments.rows / run['seconds']:.2f} rows/s", flush=True)


def refuse_other_tokens(results: Results) -> None:
    """All contenders are to read and to learn the same tokens."""
    counts = {name: (runs[0]["tokens"], runs[0]["learned_tokens"]) for name, runs in results.runs.items() if runs}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"(tokens, learned tokens) are not the same for all: {counts}")


def summary(results: Results) -> str:
    """Medians, with the lowest and highest, and the ratio to TRL at its best; then how far the losses differ."""
    rows = results.header["settings"]["rows"]
    rates = {name: [rows / run["seconds"] for run in runs] for name, runs in results.runs.items()}
    reference = statistics.median(rates[REFERENCE]) if REFERENCE in rates else None
    lines = []
    for name, rate in rates.items():
        runs, median = results.of(name), statistics.median(rate)
        learned = f"{median * runs[0]['learned_tokens'] / rows:.0f}"
        peak = f"{statistics.median(run['peak_gb'] for run in runs):.1f} GB"
        lines.append([name, with_range(rate), learned, peak, f"{median / reference:.2f}" if reference else ""])
    header = ["", "rows/s (lowest-highest)", "learned tokens/s", "peak memory", "ratio"]
    return "\n\n".join([table(header, lines), *losses_apart(results)])


def losses_apart(results: Results) -> list[str]:
    """The largest relative difference of a step's loss between Handspun and each that saw the same batches."""
    ours = results.of("Handspun")
    others = [name for name in ("TRL, its defaults", "Trainer", "Handspun, padded") if results.of(name)]
    if not ours or not others or results.header["settings"]["lora"]:
        return []
    lines = ["Largest relative difference of a step's loss from Handspun's:"]
    for name in others:
        apart = relative_difference(results.of(name)[0]["losses"], ours[0]["losses"])
        lines.append(f"* {name}: {apart:.1e}")
    return ["\n".join(lines)]


def relative_difference(found: list[float], expected: list[float]) -> float:
    """The largest over the pairs."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def plot_losses(results: Results, file: Path) -> None:
    """A line for each contender; those that group by length saw other batches, and are thin."""
    figure, axes = axes_of_a_plot("step", "loss of the batch")
    styles = ["-", "--", ":", "-."]
    for place, (name, runs) in enumerate(results.runs.items()):
        regrouped = "best" in name or "grouped" in name
        losses, style = runs[0]["losses"], styles[place % len(styles)]
        label = f"{name} (other batches)" if regrouped else name
        axes.plot(range(1, len(losses) + 1), losses, style, lw=0.8 if regrouped else 2, label=label)
    axes.legend(frameon=False, fontsize="small")
    save_plot(figure, file)


if __name__ == "__main__":
    main()
