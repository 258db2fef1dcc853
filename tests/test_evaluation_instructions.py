"""Instructions that can be checked: what follows them, what does not, and what nobody looked at."""

from typing import Any

import pytest

from handspun.data.rows import Row
from handspun.errors import DataError
from handspun.evaluation.instructions import CHECKED, Instruction, read_instructions, verdicts

AT_LEAST, LESS = {"relation": "at least"}, {"relation": "less than"}
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["red", "c++"]}, "C++ and Red", "red and C"),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "concatenate", "A Cat."),
    ("keywords:frequency", {"keyword": "ha", "frequency": 2, **AT_LEAST}, "Ha ha", "ha"),
    ("keywords:frequency", {"keyword": "ha", "frequency": 2, **LESS}, "ha", "ha ha"),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": "at least"}, "aA", "ab"),
    ("length_constraints:number_words", {"num_words": 3, **AT_LEAST}, "one two three", "one, two"),
    ("length_constraints:number_words", {"num_words": 3, **LESS}, "one two", "one two three"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***", "a\n***\n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "However"},
        'First.\n\n"However, that is all.',
        "However\n\nfirst.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [street]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. Write.", "Bye. PS Write."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\nP.P.S. Write.", "Bye. P.S. Write."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:constrained_response", {}, "My answer is no.", "No."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "a *word*", "a word"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<On mice>>\nMice.", "<<>>\nMice."),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "say hi. Hi!", "Hi! Say hi."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'All. the end."', "The end. Really."),
    ("startend:quotation", {}, '"Quoted"', '"Quoted'),
    ("punctuation:no_comma", {}, "None here", "One, here"),
]


@pytest.mark.parametrize(("id", "arguments", "following", "breaking"), CASES, ids=[case[0] for case in CASES])
def test_each_kind_knows_one_that_follows_and_one_that_does_not(
    id: str, arguments: dict[str, Any], following: str, breaking: str
) -> None:
    instruction = Instruction(id, arguments)
    assert verdicts([instruction], following)[0].strict is True
    assert verdicts([instruction], breaking)[0].strict is False


def test_every_kind_that_is_checked_is_tested() -> None:
    assert {case[0] for case in CASES} == set(CHECKED)
    assert len(CHECKED) == 20


@pytest.mark.parametrize("id", ["language:response_language", "length_constraints:number_sentences", "new:kind"])
def test_what_is_not_checked_is_never_passed(id: str) -> None:
    [verdict] = verdicts([Instruction(id, {})], "Any answer.")
    assert verdict.strict is None
    assert verdict.loose is None


def test_an_empty_answer_follows_nothing() -> None:
    [verdict] = verdicts([Instruction("punctuation:no_comma", {})], "  \n")
    assert (verdict.strict, verdict.loose) == (False, False)


@pytest.mark.parametrize(
    ("id", "answer"),
    [
        ("punctuation:no_comma", "Sure, here it is:\nNo comma here"),  # but for its first line
        ("startend:quotation", '"Quoted"\nThat is all.'),  # but for its last
        ("startend:quotation", 'Sure:\n"Quoted"\nThat is all.'),  # but for both
        ("startend:quotation", '**"Quoted"**'),  # but for its asterisks
    ],
)
def test_loosely_an_answer_may_have_a_frame(id: str, answer: str) -> None:
    [verdict] = verdicts([Instruction(id, {})], answer)
    assert (verdict.strict, verdict.loose) == (False, True)


def row(ids: Any, arguments: Any) -> Row:
    return Row("rows.jsonl", 3, {"prompt": "Hi.", "instruction_id_list": ids, "kwargs": arguments})


def test_arguments_that_are_null_are_none() -> None:
    """Of the hub's copy of IFEval every object has every name, most of them null."""
    found = read_instructions(row(["punctuation:no_comma"], [{"num_words": None, "relation": None}]))
    assert found == (Instruction("punctuation:no_comma", {}),)


def test_a_csv_cell_holds_them_as_json() -> None:
    found = read_instructions(row('["startend:end_checker"]', '[{"end_phrase": "Bye."}]'))
    assert found == (Instruction("startend:end_checker", {"end_phrase": "Bye."}),)


@pytest.mark.parametrize(
    ("ids", "arguments", "expected"),
    [
        ("no json", [], "not JSON"),
        (["punctuation:no_comma"], [], "expected 1 objects"),
        (["punctuation:no_comma"], None, "expected 1 objects"),
        (["length_constraints:number_words"], [{"relation": "at least"}], "needs num_words"),
        ([3], [{}], "expected a name"),
    ],
)
def test_malformed_instructions_are_an_error_that_names_the_row(ids: Any, arguments: Any, expected: str) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl, row 3, column .*{expected}"):
        read_instructions(row(ids, arguments))
