"""Answers of models side by side as one self-contained HTML page."""

from collections.abc import Iterator, Sequence
from pathlib import PurePath

from handspun.config import GenerationOptions
from handspun.decoding.results import GenerationResult
from handspun.evaluation.compare import Comparison
from handspun.report.page import render


def comparison_html(comparison: Comparison, options: GenerationOptions) -> str:
    """Return the comparison as an HTML page. Texts of models and users are escaped."""
    names = _short_names(comparison.models)
    return render(
        "compare.html.j2",
        title=f"{' and '.join(names)} compared",
        models=comparison.models,
        names=names,
        blocks=list(_blocks(comparison)),
        options=_set_options(options),
    )


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
