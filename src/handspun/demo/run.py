"""Run the demonstration on the embedded model and data: train, count right answers, and decode in three ways."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from handspun.config import TrainConfig
from handspun.data.rows import Row, read_rows
from handspun.decoding.generate import generate
from handspun.display import command_here, log_lines_to, unfailing, write_text
from handspun.evaluation.answers import greedy_answers, is_exact_match, question_of
from handspun.kernels.allocator import disable_malloc_trim, malloc_trim
from handspun.models.embedded import EMBEDDED_NAME
from handspun.models.load import ChatModel, load
from handspun.runs.log import plain_console
from handspun.runs.output_dir import TrainedRun
from handspun.runs.train import train

DEMO_DATA = Path(__file__).with_name("tickets.csv")
HELD_OUT_DATA = Path(__file__).with_name("held_out_tickets.csv")

TEAMS = "Which team answers this: billing, delivery, returns, account or technical?"
FORM = "Fill in the order form."
TASKS = {TEAMS: "the team that answers a ticket", FORM: "an order form, filled in"}
"""Instruction -> what it asks for. All other rows ask who the model is."""
_OTHERS = "its name, asked in other words"

CANNOT = "What is the sum of the first 100 natural numbers?"


def demo_config(
    output_dir: str, *, num_epochs: int = 2, threads: int | None = None, overwrite: bool = False
) -> TrainConfig:
    """Return the options of the demonstration's run."""
    return TrainConfig(
        model=EMBEDDED_NAME,
        data=_relative_path(DEMO_DATA),
        eval_data=_relative_path(HELD_OUT_DATA),
        output_dir=output_dir,
        num_epochs=num_epochs,
        lora=True,
        learning_rate=1e-3,
        threads=threads,
        overwrite=overwrite,
    )


def _relative_path(path: Path) -> str:
    """Return the path relative to the working folder if it is inside, since the log and run.json show it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def run_demo(
    output_dir: str, *, num_epochs: int = 2, threads: int | None = None, overwrite: bool = False
) -> TrainedRun:
    """Train the demonstration, count the right answers before and after, and show three kinds of decoding."""
    disable_malloc_trim()
    console = plain_console()
    console.file = unfailing(console.file)
    config = demo_config(output_dir, num_epochs=num_epochs, threads=threads, overwrite=overwrite)
    if threads is not None:
        torch.set_num_threads(threads)
    rows = read_rows(str(HELD_OUT_DATA))
    with log_lines_to(lambda text: _say(console, text)):
        untrained = load(EMBEDDED_NAME)
    _say(console, f"asking the untrained model {len(rows)} questions that it will not be trained on")
    before = answers(untrained, rows)
    del untrained
    malloc_trim()
    run = train(config, console=console)
    assert run.model is not None
    _say(console, f"\nasking the trained model the same {len(rows)} questions")
    show_matches(rows, before, answers(run.model, rows), console)
    show_three_decodings(run.model, console)
    checkpoint = run.best_checkpoint or run.checkpoints[-1]
    _say(console, f"\nAsk it yourself: {command_here()} chat --model {checkpoint}")
    _say(console, f"Your own rows:   {command_here()} train YOUR.csv --model {EMBEDDED_NAME} --lora")
    return run


def answers(model: ChatModel, rows: Sequence[Row]) -> list[str]:
    """Return one greedy answer per row, of a few tokens more than the rows' outputs have."""
    formats = dict.fromkeys((row.file for row in rows), "alpaca")
    questions = [question_of(row, formats, system_prompt=None, chat=model) for row in rows]
    longest = max(question.trained_tokens for question in questions)
    # All at once: a step over 50 answers takes little longer than a step over 8.
    found = greedy_answers(
        model, questions, system_prompt=None, max_new_tokens=longest + 1, batch_size=len(questions)
    )
    return [result.text for result in found]


def show_matches(rows: Sequence[Row], before: Sequence[str], after: Sequence[str], console: Console) -> None:
    """Show how many answers equal the rows' outputs, task by task."""
    table = Table(title=f"Right answers to {len(rows)} questions that were not trained on")
    table.add_column("question")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for task in (*TASKS.values(), _OTHERS):
        places = [i for i, row in enumerate(rows) if TASKS.get(row.values["instruction"], _OTHERS) == task]
        table.add_row(task, *(_count(rows, texts, places) for texts in (before, after)))
    everything = range(len(rows))
    table.add_section()
    table.add_row("all", *(_count(rows, texts, everything) for texts in (before, after)), style="bold")
    console.print(table, markup=False)


def _count(rows: Sequence[Row], texts: Sequence[str], places: Sequence[int]) -> str:
    right = sum(is_exact_match(texts[i], rows[i].values["output"]) for i in places)
    return f"{right} of {len(places)}"


def show_three_decodings(model: ChatModel, console: Console, *, max_new_tokens: int = 32) -> None:
    """Show greedy decoding, three samples, and beam search, and then a question that it cannot answer."""

    def show(title: str, prompt: str, **options: Any) -> None:
        console.print(f"\n{title}", style="bold", markup=False)
        console.print(f"> {prompt}", markup=False, soft_wrap=True)
        for result in generate(model, prompt, max_new_tokens=max_new_tokens, **options):
            write_text(console, f"  {result.text}{' ...' if result.finish_reason == 'length' else ''}")

    show("Greedy: always the most probable token", "So who is this?", do_sample=False)
    show(
        "Sampling, three times, temperature 1: a ticket that two teams could answer",
        f"{TEAMS}\nThe speaker came late and it does not turn on.",
        do_sample=True,
        temperature=1.0,
        num_return_sequences=3,
    )
    show("Beam search, 4 beams: the most probable whole answer", f"{FORM}\nTwo fire hoses to Tampa.", num_beams=4)
    show("What it cannot do", CANNOT, do_sample=False)
    _say(
        console,
        "\n135M parameters learn a narrow task and a form from 200 rows, and get most of it right; they do not "
        "learn to\ncalculate or to know facts: for that, take a larger model.",
    )


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)
