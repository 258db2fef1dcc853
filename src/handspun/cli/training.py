"""The commands train, preflight, preview and demo."""

from dataclasses import replace
from typing import Annotated

from handspun.cli.app import FLAT, Count, app, is_colorless, quick_imports, with_files
from handspun.config import DataConfig, TrainConfig
from handspun.display import HarmlessConsole


@app.command
def train(*files: str, config: Annotated[TrainConfig, FLAT] = TrainConfig()) -> None:  # noqa: B008  (frozen)
    """Fine-tune a model on instruction data: all weights, or LoRA adapters with --lora.

    Writes checkpoint-epoch-N/ and checkpoint-best/ (ordinary transformers or peft folders), train.log,
    metrics.jsonl, run.json and report.html.

    Parameters
    ----------
    files
        Training rows, the same as --data.
    """
    with quick_imports():
        from handspun.runs.train import train as run_training

    run_training(with_files(config, files, "train"))


@app.command
def preflight(*files: str, config: Annotated[TrainConfig, FLAT] = TrainConfig()) -> None:  # noqa: B008  (frozen)
    """Show what a run would train on, problems in its rows, and its cost. Nothing is trained or written.

    Takes the options of train. With --strict, warnings are errors.

    Parameters
    ----------
    files
        Training rows, the same as --data.
    """
    with quick_imports():
        from handspun.runs.train import train as run_training

    run_training(replace(with_files(config, files, "preflight"), dry_run=True))


@app.command
def preview(
    *files: str,
    config: Annotated[DataConfig, FLAT] = DataConfig(),  # noqa: B008
    model: str = "Qwen/Qwen2.5-0.5B",
    examples: Count = 3,
    plain: bool = False,
) -> None:
    """Show what would be trained on: rendered examples, lengths, and what happens to every row.

    Parameters
    ----------
    files
        Rows to show, the same as --data.
    model
        Model whose tokenizer and chat template are used. Its weights are not read.

    Examples:
        Number of rendered examples to show.
    plain
        Mark target tokens with brackets instead of color (also without a terminal, or with NO_COLOR).
    """
    from handspun.cli.views.answers import show_preview

    console = HarmlessConsole()
    show_preview(
        with_files(config, files, "preview"),
        model,
        console,
        examples=examples,
        plain=plain or is_colorless(console),
    )


@app.command
def demo(
    *,
    output_dir: str = "output/demo",
    num_epochs: Count = 2,
    threads: Count | None = None,
    overwrite: bool = False,
) -> None:
    """Fine-tune the embedded model on the embedded data, with answers before and after. Takes minutes, no hub.

    Parameters
    ----------
    output_dir
        Folder for checkpoints, train.log, metrics.jsonl, run.json and report.html.
    num_epochs
        Passes over the 196 training rows.
    threads
        CPU threads. If not given, PyTorch's default (one per physical core).
    overwrite
        Replace an earlier run in the output folder.
    """
    from handspun.demo.run import run_demo

    run_demo(output_dir, num_epochs=num_epochs, threads=threads, overwrite=overwrite)
