"""Answers of models side by side, as a terminal shows them."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from handspun.decoding.results import GenerationResult
from handspun.display import visible
from handspun.evaluation.compare import Comparison, speed


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print each prompt, and under it one column of answers per model."""
    for number, prompt in enumerate(comparison.prompts):
        console.print(Text(visible(f"> {prompt}"), style="bold", overflow="fold"))
        table = Table(box=box.SIMPLE_HEAD, expand=True, show_edge=False, padding=(0, 1), pad_edge=False)
        for name in comparison.models:
            table.add_column(Text(visible(name), overflow="fold"), ratio=1, overflow="fold")
        of_prompt = [answers[number] for answers in comparison.answers]
        for row, results in enumerate(zip(*of_prompt, strict=False)):
            table.add_row(*map(_cell, results), end_section=row < len(of_prompt[0]) - 1)
        console.print(table)
        console.print()
    for place, name in enumerate(comparison.models):
        if found := speed(comparison, place):
            console.print(Text(visible(f"{name}: {found}"), style="dim", overflow="fold"))


def _cell(result: GenerationResult) -> Text:
    text = Text(visible(result.text.strip()), overflow="fold")  # Text, so that rich does not read it as markup
    if result.finish_reason == "length":
        text.append(" [cut off]", style="dim")
    return text
