"""Held-out loss against the seconds of training: three ways of Handspun and two of TRL at its best.

    python benchmarks/time_to_quality.py --data train.csv [--rows 400] [--conversations 16] [--only-sweep]

One epoch over the same rows, the same held-out rows, batches, schedule and threads: full fine-tuning, LoRA, and
LoRA on an int8 base. Each trainer gets a learning rate of its own for full fine-tuning and for LoRA: over the
first --sweep-rows rows it is doubled as long as the held-out loss at the end gets lower. Then, if asked for, the
same rates with conversations of at most --tokens tokens, which are made from more of the rows, in turns. All are
evaluated by Handspun's evaluation, outside the seconds: Handspun as it goes, TRL on the weights that it saves on
its way.

--only-sweep stops after the sweep, which does not depend on what else the machine does; the seconds of the rest
do. Each figure is saved in benchmarks/results/ as it is measured, and a benchmark that is run again goes on from
what is saved; --fresh starts over. The plots go to docs/images/.
"""

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from handspun.data.chat_template import ChatTemplate
from handspun.data.examples import build_examples
from handspun.data.rows import Row as DataRow
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import load_tokenizer, model_source
from handspun.training.dtype import choose_dtype
from measurements import (
    DEMO_ROWS,
    HERE,
    IMAGES,
    TRL_AT_ITS_BEST,
    Contender,
    Results,
    Row,
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


@dataclass(frozen=True)
class Way:
    """A trainer's way to train. The rate is the best of the sweep of the way that `rate_of` names."""

    script: str
    rate_of: str
    job: dict[str, Any] = field(default_factory=dict)

    @property
    def is_trl(self) -> bool:
        """Whether it saves weights that are evaluated afterwards."""
        return self.script == "trl_train.py"


OURS, TRLS = "handspun_train.py", "trl_train.py"
WAYS = {
    "Handspun, LoRA on int8": Way(
        OURS, "Handspun, LoRA", {"lora": True, "dtype": "float32", "options": {"base_weights": "int8"}}
    ),
    "Handspun, LoRA": Way(OURS, "Handspun, LoRA", {"lora": True}),
    "Handspun, full": Way(OURS, "Handspun, full"),
    "TRL, LoRA": Way(TRLS, "TRL, LoRA", {"lora": True, "options": TRL_AT_ITS_BEST}),
    "TRL, full": Way(TRLS, "TRL, full", {"options": TRL_AT_ITS_BEST}),
}
FIRST_RATES = {"full": 1e-4, "LoRA": 1e-3}
"""Of the sweeps: lower ones were worse in docs/benchmarks/quality.md, "Learning rates"."""
Curve = list[tuple[float, float]]
"""(seconds of training, held-out loss), from before the first step to after the last."""


@dataclass(frozen=True)
class Task:
    """Rows to train on and rows that are held out, in files of the work folder, and the job for all contenders."""

    name: str
    count: int
    job: dict[str, Any]
    work: str

    def steps(self) -> int:
        """Optimizer steps of the epoch; the last, shorter batch is one too."""
        return math.ceil(self.count / int(self.job["batch_size"]))

    def points(self, count: int) -> list[int]:
        """The steps after which is evaluated, about so many, the last one among them."""
        steps, every = self.steps(), max(self.steps() // count, 1)
        return sorted({*range(every, steps, every), steps})


def main() -> None:
    arguments = parse()
    keys = ("rows", "held_out", "sweep_rows", "conversations", "tokens", "points", "batch_size", "lr_schedule")
    settings = {key: getattr(arguments, key) for key in keys} | {"data": arguments.data.name}
    settings |= {"dtype": dtype_of(arguments), "threads": arguments.threads}
    what = arguments.results or f"{Path(arguments.model).name}-{arguments.data.stem}-{arguments.rows}"
    name = f"time-to-quality-{what}"
    results = open_results(name, settings, fresh=arguments.fresh)
    with tempfile.TemporaryDirectory() as work:
        tasks = tasks_of(arguments, settings, work)
        sweep = next(tasks)
        for way in dict.fromkeys(way.rate_of for way in WAYS.values()):
            find_rate(results, sweep, way)
        for task in () if arguments.only_sweep else tasks:
            for way in WAYS:
                run_once(results, task, way, best_rate(results, WAYS[way].rate_of), points=arguments.points)
            curves = {way: curve_of(results.of(f"{task.name}: {way}")[0]) for way in WAYS}
            print(summary(results, task.name, curves), predictions(results, task.name), sep="\n\n")
            kind = f"_{arguments.results}" if arguments.results else ""
            plot(curves, IMAGES / f"time_to_quality_{task.name}{kind}.svg")


def parse() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEMO_ROWS, help="a csv file in the Alpaca format")
    parser.add_argument("--model", default=EMBEDDED_NAME, help="a model's folder (default: the embedded one)")
    parser.add_argument("--rows", type=int, default=250)
    parser.add_argument("--held-out", type=int, default=40)
    parser.add_argument("--sweep-rows", type=int, default=96)
    parser.add_argument("--conversations", type=int, default=0, help="of the second set (default: none)")
    parser.add_argument("--tokens", type=int, default=1024, help="most tokens of a conversation")
    parser.add_argument("--points", type=int, default=4, help="evaluations in the epoch")
    parser.add_argument("--batch-size", type=int, default=8, help="rows; of conversations a quarter as many")
    parser.add_argument("--lr-schedule", choices=["cosine", "linear", "constant"], default="linear")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16"], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", metavar="NAME", help="of the saved figures (default: model, data and rows)")
    parser.add_argument("--only-sweep", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    return parser.parse_args()


def dtype_of(arguments: argparse.Namespace) -> str:
    """The type of matmuls for both trainers: what `--dtype auto` is on this machine."""
    if arguments.dtype != "auto":
        return str(arguments.dtype)
    torch.set_num_threads(arguments.threads)
    return str(choose_dtype(torch.device("cpu"))[0]).removeprefix("torch.")


def tasks_of(arguments: argparse.Namespace, settings: dict[str, Any], work: str) -> Iterator[Task]:
    """The rows of the sweep, the first of the rows; the rows; the conversations if they are asked for."""
    all_rows = read_rows(arguments.data)
    training, held_out = draw(all_rows, arguments.rows, arguments.held_out)
    job = {key: settings[key] for key in ("batch_size", "lr_schedule", "dtype", "threads")}
    job |= {"model": model_folder(arguments.model), "warmup_ratio": 0.03, "max_length": 512}
    job["held_out"] = rows_file(work, "held_out", held_out)
    for name, rows in (("sweep", training[: arguments.sweep_rows]), ("rows", training)):
        yield Task(name, len(rows), job | {"rows": rows_file(work, name, rows)}, work)
    if arguments.conversations:
        pool, held_out_pool = draw(all_rows, len(all_rows) // 2, len(all_rows) // 2, seed=1)
        template = ChatTemplate(load_tokenizer(model_source(arguments.model)))
        conversations = in_turns(pool, arguments.conversations, arguments.tokens, template)
        held_out_ones = in_turns(held_out_pool, max(arguments.held_out // 8, 1), arguments.tokens, template)
        job |= {"batch_size": max(arguments.batch_size // 4, 1), "max_length": arguments.tokens}
        job["held_out"] = rows_file(work, "held_out_conversations", held_out_ones)
        job["rows"] = rows_file(work, "conversations", conversations)
        yield Task("conversations", len(conversations), job, work)


def in_turns(rows: list[Row], count: int, tokens: int, template: ChatTemplate) -> list[dict[str, Any]]:
    """So many conversations: each asks and answers one row after another, as long as it has at most `tokens`."""
    made: list[dict[str, Any]] = []
    messages: list[dict[str, str]] = []
    for row in rows:
        asked = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
        turn = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
        if messages and tokens_in([*messages, *turn], template) > tokens:
            made.append({"messages": messages})
            messages = []
        if len(made) == count:
            return made
        if tokens_in([*messages, *turn], template) <= tokens:
            messages = [*messages, *turn]
    raise SystemExit(f"the data hold too few rows for {count} conversations of {tokens} tokens")


def tokens_in(messages: list[dict[str, str]], template: ChatTemplate) -> int:
    """With the template's own."""
    examples, _ = build_examples([DataRow("rows", 1, {"messages": messages})], template, max_length=10**6)
    return len(examples[0])


def find_rate(results: Results, sweep: Task, way: str) -> None:
    """Doubles the rate until the held-out loss at the end is no lower than before."""
    rate, lowest = FIRST_RATES["LoRA" if WAYS[way].job.get("lora") else "full"], math.inf
    while True:
        run_once(results, sweep, way, rate, points=1)
        loss = losses_of_sweep(results, way)[rate]
        if loss >= lowest:
            break
        rate, lowest = 2 * rate, loss


def losses_of_sweep(results: Results, way: str) -> dict[float, float]:
    """The last held-out loss by rate."""
    runs = results.of(f"sweep: {way}")
    return {run["learning_rate"]: run["held_out"][-1][1] for run in runs}


def best_rate(results: Results, way: str) -> float:
    """The rate with the lowest held-out loss at the end."""
    losses = losses_of_sweep(results, way)
    return min(losses, key=lambda rate: losses[rate])


def run_once(results: Results, task: Task, way: str, rate: float, *, points: int) -> None:
    """One training run, unless its result is there already."""
    name = f"{task.name}: {way}"
    if rate in [run["learning_rate"] for run in results.of(name)]:
        return
    steps, job = task.points(points), task.job | WAYS[way].job | {"learning_rate": rate}
    if WAYS[way].is_trl:
        # Of its own: an adapter that another way has left would be taken for this one's.
        with tempfile.TemporaryDirectory(dir=task.work) as saved:
            run = measure(Contender(TRLS), **job | {"save_at": steps, "save_dir": saved})
            evaluate_saved(run, job, {0: job["model"], **{n: f"{saved}/step-{n}" for n in steps}})
    else:
        options = {"eval_steps": steps[0], **job.get("options", {})}
        run = measure(Contender(OURS), **job | {"options": options})
    check_same_tokens(results, task.name, run)
    results.add(name, run | {"learning_rate": rate})
    print(f"{name}, {rate:g}: {run['seconds']:.0f} s, held-out loss {run['held_out'][-1][1]:.4f}", flush=True)


def evaluate_saved(run: Run, job: dict[str, Any], folders: dict[int, str]) -> None:
    """Adds the held-out losses of the saved weights, by Handspun's evaluation in a process of its own."""
    script = HERE / "contenders" / "held_out_loss.py"
    words = [sys.executable, script, job["held_out"], str(job["max_length"]), str(job["threads"])]
    done = run_process([*words, *folders.values()])
    evaluations = json.loads(done.strip().splitlines()[-1])
    run["held_out"] = [[n, one["loss"]] for n, one in zip(folders, evaluations, strict=True)]
    run["held_out_tokens"] = evaluations[0]["learned_tokens"]


def check_same_tokens(results: Results, task: str, run: Run) -> None:
    """SystemExit if an earlier run over the same rows counted other tokens."""
    for name, earlier in results.runs.items():
        for count in ("tokens", "learned_tokens", "held_out_tokens"):
            if name.startswith(f"{task}: ") and run[count] != earlier[0][count]:
                raise SystemExit(f"{count} are not the same: {earlier[0][count]} with {name}, now {run[count]}")


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


def summary(results: Results, task: str, curves: dict[str, Curve]) -> str:
    """Both ends of each way, and its seconds to the last loss of TRL's best, as a share of TRL's."""
    target, theirs = target_of(curves)
    rows = []
    for way, curve in curves.items():
        run, reached = results.of(f"{task}: {way}")[0], seconds_to_reach(curve, target)
        cells = (
            ["not reached", ""]
            if reached is None
            else [f"{reached:.0f} s", f"{reached / theirs:.2f}" if theirs else ""]
        )
        ends = [f"{run['learning_rate']:g}", f"{curve[0][1]:.4f}", f"{curve[-1][1]:.4f}", f"{curve[-1][0]:.0f} s"]
        rows.append([way, *ends, *cells, f"{run['peak_gb']:.1f} GB"])
    header = ["", "rate", "held-out loss before", "after", "epoch", f"to {target:.4f}", "ratio", "peak memory"]
    return table(header, rows)


def predictions(results: Results, task: str) -> str:
    """Time and memory of Handspun's ways, as `handspun preflight` predicts them and as they were."""
    rows = []
    for way in [way for way in WAYS if not WAYS[way].is_trl]:
        run = results.of(f"{task}: {way}")[0]
        seconds, memory = run["predicted_seconds"] / run["seconds"], run["predicted_gb"] / run["peak_gb"]
        cells = [f"{run['predicted_seconds']:.0f} s", f"{run['seconds']:.0f} s", f"{seconds - 1:+.0%}"]
        rows.append(
            [way, *cells, f"{run['predicted_gb']:.1f} GB", f"{run['peak_gb']:.1f} GB", f"{memory - 1:+.0%}"]
        )
    return table(["", "predicted time", "measured", "error", "predicted peak memory", "measured", "error"], rows)


def target_of(curves: dict[str, Curve]) -> tuple[float, float]:
    """The lowest last loss of TRL's ways, and the seconds in which the first of them reaches it."""
    theirs = [curve for way, curve in curves.items() if WAYS[way].is_trl]
    target = min(curve[-1][1] for curve in theirs)
    return target, min(seconds for curve in theirs if (seconds := seconds_to_reach(curve, target)) is not None)


def plot(curves: dict[str, Curve], file: Path) -> None:
    """All curves over the seconds of training."""
    figure, axes = axes_of_a_plot("seconds of training", "held-out loss")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", ms=4, label=name, ls="--" if WAYS[name].is_trl else "-")
    axes.axhline(target_of(curves)[0], color="gray", lw=0.8, ls=":")
    axes.legend(frameon=False)
    save_plot(figure, file)


if __name__ == "__main__":
    main()
