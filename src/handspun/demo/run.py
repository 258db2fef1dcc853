"""Run the demonstration on the embedded model and data: ask, train, ask again, and decode in three ways."""

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from handspun.config import TrainConfig
from handspun.decoding.generate import generate
from handspun.display import command_here, log_lines_to, unfailing, visible, write_text
from handspun.kernels.allocator import disable_malloc_trim, malloc_trim
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import ChatModel, load
from handspun.runs.log import plain_console
from handspun.runs.output_dir import TrainedRun
from handspun.runs.sample_answers import BEAM_PROMPT, GREEDY_PROMPT, SAMPLING_PROMPT
from handspun.runs.train import train

DEMO_DATA = Path(__file__).with_name("demo.csv")
HELD_OUT_DATA = Path(__file__).with_name("held_out.csv")

BEFORE_AND_AFTER = [
    "Who are you, and who made you?",
    "Classify the sentiment as positive, negative or neutral.\nThe guide was late, rude, and bored with us.",
    "Name three rivers in Europe.",
    "A bus carries 40 people. How many people are in 3 full buses if 8 get off?",
]


def demo_config(
    output_dir: str, *, num_epochs: int = 3, threads: int | None = None, overwrite: bool = False
) -> TrainConfig:
    """Return the options of the demonstration's run."""
    return TrainConfig(
        model=EMBEDDED_NAME,
        data=_relative_path(DEMO_DATA),
        eval_data=_relative_path(HELD_OUT_DATA),
        output_dir=output_dir,
        num_epochs=num_epochs,
        learning_rate=5e-5,
        sample_prompts=tuple(BEFORE_AND_AFTER),
        threads=threads,
        overwrite=overwrite,
    )


def _relative_path(path: Path) -> str:
    """Return the path relative to the working folder if it is inside, since the log and run.json show it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run_demo(
    output_dir: str, *, num_epochs: int = 3, threads: int | None = None, overwrite: bool = False
) -> TrainedRun:
    """Train the demonstration and show its answers before and after, then the three kinds of decoding."""
    disable_malloc_trim()
    console = plain_console()
    console.file = unfailing(console.file)
    config = demo_config(output_dir, num_epochs=num_epochs, threads=threads, overwrite=overwrite)
    if threads is not None:
        torch.set_num_threads(threads)
    _say(console, "asking the model before training")
    with log_lines_to(lambda text: _say(console, text)):
        untrained = load(EMBEDDED_NAME)
    before = _answers(untrained)
    del untrained
    malloc_trim()
    run = train(config, console=console)
    _show_answers(console, before, _answers(run.model))
    show_three_decodings(run.model, console)
    _say(console, f"\nTalk to it: {command_here()} chat --model {run.checkpoints[-1]}")
    return run


def show_three_decodings(model: ChatModel, console: Console, *, max_new_tokens: int = 256) -> None:
    """Show greedy decoding, three samples, and beam search, each on its own prompt."""

    def show(title: str, prompt: str, **options: Any) -> None:
        console.print(f"\n{title}", style="bold", markup=False)
        console.print(f"> {prompt}", markup=False, soft_wrap=True)
        for result in generate(model, prompt, max_new_tokens=max_new_tokens, **options):
            write_text(console, result.text)

    show("Greedy", GREEDY_PROMPT, do_sample=False)
    show(
        "Sampling, three times, temperature 0.7",
        SAMPLING_PROMPT,
        do_sample=True,
        temperature=0.7,
        num_return_sequences=3,
    )
    show("Beam search, 4 beams", BEAM_PROMPT, num_beams=4)


def _answers(model: ChatModel) -> list[str]:
    return [result.text for result in generate(model, BEFORE_AND_AFTER, max_new_tokens=48)]


def _show_answers(console: Console, before: list[str], after: list[str]) -> None:
    table = Table(title="Answers to prompts that were not trained on", show_lines=True, expand=True)
    for name in ("prompt", "before", "after"):
        table.add_column(name, ratio=1, overflow="fold")
    for row in zip(BEFORE_AND_AFTER, before, after, strict=True):
        table.add_row(*(visible(cell.strip()) for cell in row))
    console.print(table, markup=False)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
