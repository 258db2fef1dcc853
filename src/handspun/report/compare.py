"""Answers of models side by side as one self-contained HTML page."""

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from pathlib import PurePath
from typing import Any

from handspun.config import GenerationOptions
from handspun.decoding.results import GenerationResult
from handspun.evaluation.compare import Comparison, speed
from handspun.report.page import render

_ALIKE = 0.5
"""Share of words in common from which differences are marked. Below it, marks would cover most of the text."""

_Pieces = list[tuple[str, bool]]
"""(text, does the other model's answer differ there)."""


def comparison_html(comparison: Comparison, options: GenerationOptions) -> str:
    """Return the comparison as an HTML page. Texts of models and users are escaped."""
    names = _short_names(comparison.models)
    blocks = list(_blocks(comparison))
    pieces = [result["pieces"] for _, answers, _ in blocks for results in answers for result in results]
    return render(
        "compare.html.j2",
        title=f"{' and '.join(names)} compared",
        models=[
            {"name": name, "path": path, "speed": speed(comparison, place)}
            for place, (name, path) in enumerate(zip(names, comparison.models, strict=True))
        ],
        blocks=blocks,
        same=sum(is_same for _, _, is_same in blocks),
        marks=any(differs for some in pieces for _, differs in some),
        options=_set_options(options),
    )


def _blocks(comparison: Comparison) -> Iterator[tuple[str, list[list[dict[str, Any]]], bool]]:
    """Yield (prompt, each model's answers, whether they are all the same)."""
    for number, prompt in enumerate(comparison.prompts):
        answers = [of_model[number] for of_model in comparison.answers]
        texts = [[result.text for result in results] for results in answers]
        is_same = all(text == texts[0] for text in texts)
        marked = [[[(text, False)] for text in of_model] for of_model in texts]
        if len(answers) == 2 and not is_same:
            for place, (one, other) in enumerate(zip(*texts, strict=False)):
                marked[0][place], marked[1][place] = marked_differences(one, other)
        cells = [
            [_cell(result, pieces) for result, pieces in zip(results, of_model, strict=True)]
            for results, of_model in zip(answers, marked, strict=True)
        ]
        yield prompt, cells, is_same


def _cell(result: GenerationResult, pieces: _Pieces) -> dict[str, Any]:
    shown = pieces if result.text.strip() else []
    return {
        "pieces": shown,
        "tokens": len(result.token_ids),
        "is_cut": result.finish_reason == "length",
    }


def marked_differences(one: str, other: str) -> tuple[_Pieces, _Pieces]:
    """Return both texts in pieces of (text, does it differ), by words; nothing differs if they are not alike."""
    texts = [re.findall(r"\S+\s*|\s+", text) for text in (one.strip(), other.strip())]
    words_of = [[word.strip() for word in words] for words in texts]
    found = SequenceMatcher(a=words_of[0], b=words_of[1], autojunk=False)
    if found.ratio() < _ALIKE:
        return [(one.strip(), False)], [(other.strip(), False)]
    pieces: tuple[_Pieces, _Pieces] = ([], [])
    for tag, start, end, other_start, other_end in found.get_opcodes():
        for place, (words, a, b) in enumerate(((texts[0], start, end), (texts[1], other_start, other_end))):
            if a < b:
                pieces[place].append(("".join(words[a:b]), tag != "equal"))
    return pieces


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
