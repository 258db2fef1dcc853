"""The demonstration's rows are what their README says."""

import csv
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from handspun.demo.run import DEMO_DATA, HELD_OUT_DATA, demo_config
from handspun.models.embedded import embedded_folder

FILES = [DEMO_DATA, HELD_OUT_DATA]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_there_are_as_many_rows_as_the_readme_says() -> None:
    assert [len(rows_of(path)) for path in FILES] == [330, 40]
    names = ("Spindle", "Handspun")
    identity = [sum(any(name in row["output"] for name in names) for row in rows_of(path)) for path in FILES]
    assert identity == [32, 5]


def test_no_question_is_asked_twice_and_none_is_both_trained_and_held_out() -> None:
    asked = [(row["instruction"], row["input"]) for path in FILES for row in rows_of(path)]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_row_is_short_and_whole(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    assert len(rows_of(path)) > 20
    for number, row in enumerate(rows_of(path), start=1):
        assert row["instruction"].strip(), number
        assert row["output"].strip(), number
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in row.values())
        assert tokens <= 60, (path.name, number, tokens)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_sums_are_right(path: Path) -> None:
    """Every `a x b = c` in an answer, worked out again."""
    sums = 0
    for row in rows_of(path):
        for clause in row["output"].replace("First, ", "").replace("Then, ", "").split(". "):
            left, equals, right = clause.partition(" = ")
            expression = left.replace(" x ", " * ")
            if equals and set(expression) <= set("0123456789+-*/(). ") and right.rstrip(".").isdigit():
                assert eval(expression) == int(right.rstrip(".")), row  # digits and operators only
                sums += 1
    assert sums > 3


def test_the_configuration_is_a_valid_one() -> None:
    config = demo_config("output")
    assert config.model == "smollm2-135m"
    assert [Path(file).absolute() for file in config.sources] == [DEMO_DATA]
    assert [Path(file).absolute() for file in config.eval_sources] == [HELD_OUT_DATA]
