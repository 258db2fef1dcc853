"""Held-out loss against the seconds of training, Handspun and TRL at its best: one epoch over the same rows.

    python benchmarks/time_to_quality.py --data train.csv [--rows 1000] [--held-out 100] [--fresh]

Full fine-tuning with the same learning rate, schedule, tokens and threads. Both are evaluated by Handspun's
evaluation, outside the seconds: Handspun as it goes, TRL on the weights that it saves on its way. Each contender's
figures are saved in benchmarks/results/ as they are measured, and a benchmark that is run again goes on from what
is saved; --fresh starts over. The plot goes to docs/images/.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from handspun.models.embedded import EMBEDDED_NAME
from measurements import (
    DEMO_ROWS,
    HERE,
    IMAGES,
    TRL_AT_ITS_BEST,
    Contender,
    Results,
    Run,
    axes_of_a_plot,
    draw,
    measure,
    model_folder,
    open_results,
    read_rows,
    rows_file,
    run_process,
    save_plot,
    table,
)

HANDSPUN, TRL = "Handspun", "TRL at its best"
Curve = list[tuple[float, float]]
"""(seconds of training, held-out loss), from before the first step to after the last."""


def main() -> None:
    arguments = parse()
    name = f"time-to-quality-{Path(arguments.model).name}-{arguments.data.stem}-{arguments.rows}-{arguments.dtype}"
    keys = ("rows", "held_out", "points", "batch_size", "learning_rate", "lr_schedule", "dtype", "threads")
    settings = {key: getattr(arguments, key) for key in keys} | {"data": arguments.data.name}
    results = open_results(name, settings, fresh=arguments.fresh)
    with tempfile.TemporaryDirectory() as work:
        training, held_out = draw(read_rows(arguments.data), arguments.rows, arguments.held_out)
        job = {key: getattr(arguments, key) for key in keys[3:]} | {"warmup_ratio": 0.03, "max_length": 512}
        job |= {"model": model_folder(arguments.model), "rows": rows_file(work, "rows", training)}
        job["held_out"] = rows_file(work, "held_out", held_out)
        if not results.of(HANDSPUN):
            results.add(HANDSPUN, handspun_run(job, every=steps_between(arguments)))
        if not results.of(TRL):
            results.add(TRL, trl_run(job, work, steps_of_points(arguments), results.of(HANDSPUN)[0]))
    curves = {contender: curve_of(results.of(contender)[0]) for contender in (HANDSPUN, TRL)}
    print(summary(results, curves))
    plot(curves, IMAGES / "time_to_quality.svg")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--points", type=int, default=10, help="evaluations in the epoch")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--lr-schedule", choices=["cosine", "linear", "constant"], default="linear")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


def steps_of(arguments: argparse.Namespace) -> int:
    """Optimizer steps of the epoch; the last, shorter batch is one too."""
    return math.ceil(arguments.rows / arguments.batch_size)


def steps_between(arguments: argparse.Namespace) -> int:
    """Steps from one evaluation to the next."""
    return max(steps_of(arguments) // arguments.points, 1)


def steps_of_points(arguments: argparse.Namespace) -> list[int]:
    """The steps after which is evaluated, the last one among them."""
    steps, every = steps_of(arguments), steps_between(arguments)
    return sorted({*range(every, steps, every), steps})


def handspun_run(job: dict[str, Any], *, every: int) -> Run:
    """Handspun evaluates as it goes; its seconds are those of the steps."""
    run = measure(Contender("handspun_train.py", {"options": {"eval_steps": every}}), **job)
    print(f"{HANDSPUN}: {run['seconds']:.0f} s, held-out loss {run['held_out'][-1][1]:.4f}", flush=True)
    return run


def trl_run(job: dict[str, Any], work: str, steps: list[int], ours: Run) -> Run:
    """TRL saves its weights on the way; they are evaluated afterwards."""
    saving = {"save_at": steps, "save_dir": work, "options": TRL_AT_ITS_BEST}
    run = measure(Contender("trl_train.py", saving), **job)
    folders = {step: str(Path(work) / f"step-{step}") for step in steps}
    evaluations = {step: held_out_loss(folder, job) for step, folder in {0: job["model"], **folders}.items()}
    run["held_out"] = [[step, evaluation["loss"]] for step, evaluation in evaluations.items()]
    run["held_out_tokens"] = evaluations[0]["learned_tokens"]
    for count in ("tokens", "learned_tokens", "held_out_tokens"):
        if run[count] != ours[count]:
            raise SystemExit(f"{count} are not the same: {ours[count]} with {HANDSPUN}, {run[count]} with {TRL}")
    print(f"{TRL}: {run['seconds']:.0f} s, held-out loss {run['held_out'][-1][1]:.4f}", flush=True)
    return run


def held_out_loss(folder: str, job: dict[str, Any]) -> Run:
    """By Handspun's evaluation, in a process of its own."""
    script = HERE / "contenders" / "held_out_loss.py"
    done = run_process(
        [sys.executable, script, folder, job["held_out"], str(job["max_length"]), str(job["threads"])]
    )
    return dict(json.loads(done.strip().splitlines()[-1]))


def curve_of(run: Run) -> Curve:
    """Each evaluation with the seconds of the steps before it."""
    return [(sum(run["step_seconds"][:step]), loss) for step, loss in run["held_out"]]


def seconds_to_reach(curve: Curve, loss: float) -> float | None:
    """When the curve first falls to the loss, on a straight line between evaluations; None if it does not."""
    if curve[0][1] <= loss:
        return curve[0][0]
    for (begin, high), (end, low) in itertools.pairwise(curve):
        if low <= loss < high:
            return begin + (end - begin) * (high - loss) / (high - low)
    return None


def summary(results: Results, curves: dict[str, Curve]) -> str:
    """Both ends, and the time that Handspun needs for TRL's last loss."""
    rows = []
    for name, curve in curves.items():
        seconds, peak = results.of(name)[0]["seconds"], results.of(name)[0]["peak_gb"]
        rows.append([name, f"{curve[0][1]:.4f}", f"{curve[-1][1]:.4f}", f"{seconds:.0f} s", f"{peak:.1f} GB"])
    target, epoch = curves[TRL][-1][1], results.of(TRL)[0]["seconds"]
    reached = seconds_to_reach(curves[HANDSPUN], target)
    said = (
        f"{HANDSPUN} reaches TRL's last held-out loss, {target:.4f}, after {reached:.0f} s: "
        f"{reached / epoch:.2f} of TRL's epoch ({epoch:.0f} s)."
        if reached is not None
        else f"{HANDSPUN} does not reach TRL's last held-out loss, {target:.4f}, in its epoch."
    )
    return "\n\n".join([table(["", "held-out loss before", "after", "training", "peak memory"], rows), said])


def plot(curves: dict[str, Curve], file: Path) -> None:
    """Both curves over the seconds of training."""
    figure, axes = axes_of_a_plot("seconds of training", "held-out loss")
    for name, curve in curves.items():
        axes.plot([seconds for seconds, _ in curve], [loss for _, loss in curve], marker="o", ms=4, label=name)
    axes.axhline(curves[TRL][-1][1], color="gray", lw=0.8, ls=":")
    axes.legend(frameon=False)
    save_plot(figure, file)


if __name__ == "__main__":
    main()
