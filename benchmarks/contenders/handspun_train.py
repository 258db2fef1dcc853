"""One epoch with `handspun.train`, as a user calls it. Argument: a job (job.py).

Seconds are those of the optimizer steps; evaluation and saving are not in them.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

import handspun
from handspun.training.batching import epoch_order
from job import Job, answer, job_of_this_process, read_rows


def main() -> None:
    job = job_of_this_process()
    with tempfile.TemporaryDirectory() as work:
        config = config_of(job, Path(work))
        run = handspun.train(config, console=Console(quiet=True))
        record = json.loads((Path(work) / "output" / "run.json").read_text(encoding="utf-8"))
        events = [json.loads(line) for line in (Path(work) / "output" / "metrics.jsonl").open(encoding="utf-8")]
    steps = [event for event in events if event["event"] == "step"]
    evaluations = [event for event in events if event["event"] == "evaluation"]
    answer(
        seconds=sum(step["seconds"] for step in steps),
        step_seconds=[step["seconds"] for step in steps],
        tokens=sum(step["tokens"] for step in steps),
        learned_tokens=sum(step["learned_tokens"] for step in steps),
        losses=[step["loss"] for step in steps],
        held_out=[[evaluation["step"], evaluation["loss"]] for evaluation in evaluations],
        held_out_tokens=evaluations[0]["learned_tokens"] if evaluations else 0,
        predicted_seconds=record["preflight"]["predicted_seconds"],
        predicted_gb=run.plan.peak_memory / 1e9,
    )


def config_of(job: Job, work: Path) -> handspun.TrainConfig:
    """The job's rows in a file of the work folder, and the options of the run."""
    rows = laid_out(read_rows(job), seed=0)
    (work / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    names = (
        "batch_size",
        "max_length",
        "learning_rate",
        "lr_schedule",
        "warmup_ratio",
        "lora",
        "dtype",
        "threads",
    )
    options: dict[str, Any] = {name: getattr(job, name) for name in names} | job.options
    return handspun.TrainConfig(
        model=job.model,
        data=str(work / "rows.json"),
        eval_data=job.held_out,
        eval_ratio=0.0,  # the peers train on all rows
        output_dir=str(work / "output"),
        num_epochs=1,
        seed=0,
        save_dtype="bfloat16",
        **options,
    )


def laid_out(rows: list[dict[str, str]], *, seed: int) -> list[dict[str, str]]:
    """The rows so placed that the seeded order of the first epoch is the order they came in."""
    order = epoch_order(len(rows), seed=seed, epoch=1)
    placed = dict(zip(order, rows, strict=True))
    return [placed[place] for place in range(len(rows))]


if __name__ == "__main__":
    main()
