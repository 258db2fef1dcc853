"""Instructions whose following can be checked in the text of an answer: those of IFEval (Zhou et al. 2023,
arXiv:2311.07911), by the rules of google-research/instruction_following_eval.

Twenty of its 25 kinds. The other five need a detector of languages (response_language, english_capital,
english_lowercase) or nltk's tokenizers (number_sentences, capital_word_frequency), and are not checked here.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from handspun.data.messages import Cell, read_json_list
from handspun.data.rows import DroppedRow, Row

IDS, ARGUMENTS = "instruction_id_list", "kwargs"
"""Columns of a row that carries instructions: their names, and the arguments of each."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a row: its name in IFEval, and what it asks for."""

    id: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer follows an instruction: as it stands (strict), or in any of eight forms of it (loose).

    None where the instruction is of a kind that is not checked.
    """

    id: str
    strict: bool | None
    loose: bool | None


def read_instructions(row: Row) -> tuple[Instruction, ...]:
    """The instructions that a row carries; none if it has no such column. Raises DataError for malformed ones."""
    if IDS not in row.values:
        return ()
    cell = Cell(row.file, row.number, ARGUMENTS)
    try:
        ids = read_json_list(row.values[IDS], Cell(row.file, row.number, IDS))
        given = read_json_list(row.values.get(ARGUMENTS), cell)
    except (
        DroppedRow
    ) as reason:  # of a message, it would drop the row; instructions are nothing without each other
        raise cell.error(f"{reason}.") from reason
    if len(given) != len(ids):
        raise cell.error(f"expected {len(ids)} objects, one for each of {IDS}, found {len(given)}.")
    instructions = []
    for id, arguments in zip(ids, given, strict=True):
        if not isinstance(id, str) or not isinstance(arguments or {}, dict):
            raise cell.error(f"expected a name and an object of arguments, found {id!r} and {arguments!r}.")
        present = {name: value for name, value in (arguments or {}).items() if value is not None}
        check = _CHECKS.get(id)
        missing = [name for name in check.arguments if name not in present] if check else []
        if missing:
            raise cell.error(f"{id} needs {' and '.join(missing)}, found {', '.join(present) or 'none'}.")
        instructions.append(Instruction(id, present))
    return tuple(instructions)


def verdicts(instructions: Sequence[Instruction], answer: str) -> list[Verdict]:
    """A verdict on each of the instructions. An empty answer follows none of those that are checked."""
    return [_verdict(instruction, answer) for instruction in instructions]


def _verdict(instruction: Instruction, answer: str) -> Verdict:
    check = _CHECKS.get(instruction.id)
    if check is None:
        return Verdict(instruction.id, None, None)
    arguments = [instruction.arguments[name] for name in check.arguments]
    strict, *others = (bool(form.strip()) and check.follows(form, *arguments) for form in _forms(answer))
    return Verdict(instruction.id, strict, strict or any(others))


def _forms(answer: str) -> list[str]:
    """The answer; then without its first line, its last, both; and each of the four without asterisks."""
    lines = answer.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    forms = [answer, *cut]
    return forms + [form.replace("*", "") for form in forms]


@dataclass(frozen=True)
class _Check:
    follows: Callable[..., bool]
    """(answer, *arguments) -> bool."""
    arguments: tuple[str, ...] = ()


def _compares(count: int, relation: str, bound: int) -> bool:
    return count < bound if relation == "less than" else count >= bound


def _has_all(answer: str, keywords: list[str]) -> bool:
    return all(re.search(re.escape(keyword), answer, re.IGNORECASE) for keyword in keywords)


def _has_none(answer: str, words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in words)


def _keyword_count(answer: str, keyword: str, relation: str, bound: int) -> bool:
    return _compares(len(re.findall(re.escape(keyword.strip()), answer, re.IGNORECASE)), relation, bound)


def _letter_count(answer: str, letter: str, relation: str, bound: int) -> bool:
    return _compares(answer.lower().count(letter.strip().lower()), relation, bound)


def _word_count(answer: str, relation: str, bound: int) -> bool:
    return _compares(len(re.findall(r"\w+", answer)), relation, bound)


def _divided_paragraphs(answer: str, count: int) -> bool:
    """Paragraphs between `***`; an empty one may stand at either end only."""
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\s?\*\*\*\s?", answer)]
    if not all(paragraphs[1:-1]):
        return False
    return sum(map(bool, paragraphs)) == count


def _first_word_of_paragraph(answer: str, count: int, number: int, word: str) -> bool:
    paragraphs = answer.split("\n\n")
    filled = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if filled != count or not 1 <= number <= filled or not paragraphs[number - 1].strip():
        return False
    first = paragraphs[number - 1].split()[0].lstrip("'").lstrip('"')
    return re.split(r"[.,?!'\"]", first)[0].lower() == word.lower()


def _postscript(answer: str, marker: str) -> bool:
    patterns = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = patterns.get(marker.strip(), re.escape(marker.strip().lower()))
    return re.search(pattern, answer.lower()) is not None


def _bullets(answer: str, count: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", answer, re.MULTILINE)) == count


def _highlights(answer: str, least: int) -> bool:
    single = (text.strip("*") for text in re.findall(r"\*[^\n\*]*\*", answer))
    double = (text[2:-2] for text in re.findall(r"\*\*[^\n\*]*\*\*", answer))
    return sum(bool(text.strip()) for texts in (single, double) for text in texts) >= least


def _sections(answer: str, splitter: str, least: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(splitter.strip())}\s?\d+\s?", answer)) >= least


def _is_json(answer: str) -> bool:
    text = answer.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(answer: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", answer))


def _two_responses(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    filled = [part for part in parts if part]
    return all(parts[1:-1]) and len(filled) == 2 and filled[0] != filled[1]


def _is_quoted(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


_OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_CHECKS = {
    "keywords:existence": _Check(_has_all, ("keywords",)),
    "keywords:forbidden_words": _Check(_has_none, ("forbidden_words",)),
    "keywords:frequency": _Check(_keyword_count, ("keyword", "relation", "frequency")),
    "keywords:letter_frequency": _Check(_letter_count, ("letter", "let_relation", "let_frequency")),
    "length_constraints:number_words": _Check(_word_count, ("relation", "num_words")),
    "length_constraints:number_paragraphs": _Check(_divided_paragraphs, ("num_paragraphs",)),
    "length_constraints:nth_paragraph_first_word": _Check(
        _first_word_of_paragraph, ("num_paragraphs", "nth_paragraph", "first_word")
    ),
    "detectable_content:number_placeholders": _Check(
        lambda answer, least: len(re.findall(r"\[.*?\]", answer)) >= least, ("num_placeholders",)
    ),
    "detectable_content:postscript": _Check(_postscript, ("postscript_marker",)),
    "detectable_format:number_bullet_lists": _Check(_bullets, ("num_bullets",)),
    "detectable_format:constrained_response": _Check(lambda answer: any(o in answer for o in _OPTIONS)),
    "detectable_format:number_highlighted_sections": _Check(_highlights, ("num_highlights",)),
    "detectable_format:multiple_sections": _Check(_sections, ("section_spliter", "num_sections")),
    "detectable_format:json_format": _Check(_is_json),
    "detectable_format:title": _Check(_has_title),
    "combination:two_responses": _Check(_two_responses),
    "combination:repeat_prompt": _Check(
        lambda answer, prompt: answer.strip().lower().startswith(prompt.strip().lower()), ("prompt_to_repeat",)
    ),
    "startend:end_checker": _Check(
        lambda answer, end: answer.strip().strip('"').lower().endswith(end.strip().lower()), ("end_phrase",)
    ),
    "startend:quotation": _Check(_is_quoted),
    "punctuation:no_comma": _Check(lambda answer: "," not in answer),
}
CHECKED = tuple(_CHECKS)
"""Names of the instructions that are checked."""
