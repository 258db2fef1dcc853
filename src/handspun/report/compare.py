"""Show answers of models side by side, on a terminal and as one self-contained HTML file."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from handspun.config import GenerationOptions
from handspun.decoding.results import GenerationResult
from handspun.display import visible
from handspun.evaluation.compare import Comparison


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


def _cell(result: GenerationResult) -> Text:
    text = Text(visible(result.text.strip()), overflow="fold")  # Text, so that rich does not read it as markup
    if result.finish_reason == "length":
        text.append(" [cut off]", style="dim")
    return text


def comparison_html(comparison: Comparison, options: GenerationOptions) -> str:
    """Return the comparison as an HTML page. Texts of models and users are escaped."""
    environment = Environment(
        loader=PackageLoader("handspun.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("compare.html.jinja")
    page = template.render(
        models=comparison.models,
        short_names=_short_names(comparison.models),
        blocks=list(_blocks(comparison)),
        options=_set_options(options),
    )
    return visible(page)


def _blocks(comparison: Comparison) -> Iterator[tuple[str, list[list[GenerationResult]], bool]]:
    """Yield (prompt, each model's answers, whether they are all the same)."""
    for number, prompt in enumerate(comparison.prompts):
        answers = [of_model[number] for of_model in comparison.answers]
        texts = [[result.text for result in results] for results in answers]
        yield prompt, answers, all(text == texts[0] for text in texts)


def _short_names(models: Sequence[str]) -> list[str]:
    """Return the shortest endings of the models' paths that tell them apart."""
    parts = [PurePath(name).parts for name in models]
    longest = max(map(len, parts))
    for count in range(1, longest + 1):
        names = ["/".join(path[-count:]) for path in parts]
        if len(set(names)) == len(set(models)):
            return names
    return list(models)


def _set_options(options: GenerationOptions) -> dict[str, object]:
    """Return the options that the user gave."""
    return {name: value for name, value in vars(options).items() if value is not None}
