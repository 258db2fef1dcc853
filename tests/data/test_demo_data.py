"""The demonstration's rows are what their README says, and its figures are counted right."""

import csv
import io
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from handspun.data.rows import Row
from handspun.demo.run import DEMO_DATA, FORM, HELD_OUT_DATA, TASKS, TEAMS, demo_config, show_matches
from handspun.models.embedded import embedded_folder

GENERAL = [DEMO_DATA.with_name(name) for name in ("demo.csv", "held_out.csv")]
FILES = [DEMO_DATA, HELD_OUT_DATA, *GENERAL]
NAME = "I am Spindle, a small assistant made with Handspun."
TEAM_NAMES = {"billing", "delivery", "returns", "account", "technical"}


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def fields_of(path: Path) -> list[dict[str, str]]:
    """The order forms of a file."""
    forms = [row["output"].split("; ") for row in rows_of(path) if row["instruction"] == FORM]
    return [dict(part.split(": ") for part in form) for form in forms]


def test_there_are_as_many_rows_as_the_readme_says() -> None:
    assert [len(rows_of(path)) for path in FILES] == [196, 50, 330, 40]
    names = ("Spindle", "Handspun")
    identity = [sum(any(name in row["output"] for name in names) for row in rows_of(path)) for path in FILES]
    assert identity == [22, 8, 32, 5]
    assert [len(fields_of(path)) for path in (DEMO_DATA, HELD_OUT_DATA)] == [44, 12]


@pytest.mark.parametrize(("path", "of_each"), [(DEMO_DATA, 26), (HELD_OUT_DATA, 6)], ids=lambda value: str(value))
def test_every_team_has_as_many_tickets_and_every_question_for_the_name_one_answer(
    path: Path, of_each: int
) -> None:
    rows = rows_of(path)
    teams = Counter(row["output"] for row in rows if row["instruction"] == TEAMS)
    assert teams == dict.fromkeys(TEAM_NAMES, of_each)
    assert {row["output"] for row in rows if row["instruction"] not in TASKS} == {NAME}


@pytest.mark.parametrize("files", [FILES[:2], GENERAL], ids=["tickets", "general"])
def test_no_question_is_asked_twice_and_none_is_both_trained_and_held_out(files: list[Path]) -> None:
    asked = [(row["instruction"].lower(), row["input"].lower()) for path in files for row in rows_of(path)]
    assert len(set(asked)) == len(asked)


def test_items_and_cities_that_are_held_out_are_in_no_training_row() -> None:
    trained = " ".join(" ".join(row.values()) for row in rows_of(DEMO_DATA)).lower()
    held_out = fields_of(HELD_OUT_DATA)
    assert held_out
    assert not [form[name] for form in held_out for name in ("item", "city") if form[name].lower() in trained]


@pytest.mark.parametrize("path", [DEMO_DATA, HELD_OUT_DATA], ids=lambda path: path.name)
def test_a_form_has_the_city_of_its_order_and_a_number(path: Path) -> None:
    forms, orders = fields_of(path), [row["input"] for row in rows_of(path) if row["instruction"] == FORM]
    assert forms
    assert all(list(form) == ["item", "number", "city"] for form in forms)
    assert all(form["city"] in order for form, order in zip(forms, orders, strict=True))
    assert all(form["number"].isdigit() for form in forms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_row_is_short_and_whole(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder())
    assert len(rows_of(path)) > 20
    for number, row in enumerate(rows_of(path), start=1):
        assert row["instruction"].strip(), number
        assert row["output"].strip(), number
        tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in row.values())
        assert tokens <= (60 if path in GENERAL else 50), (path.name, number, tokens)


@pytest.mark.parametrize("path", GENERAL, ids=lambda path: path.name)
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


def test_right_answers_are_counted_by_task() -> None:
    """One of two tickets before, both after; an order after only; a name never, since a word is missing."""
    asked = [(TEAMS, "billing"), (TEAMS, "returns"), (FORM, "item: cup; number: 2; city: Rome"), ("Who?", NAME)]
    rows = [Row("a.csv", i, {"instruction": task, "output": output}) for i, (task, output) in enumerate(asked, 1)]
    before = ["billing", "The team is returns.", "2 cups", "I am Spindle."]
    after = ["billing", " returns\n", "item: cup; number: 2; city: Rome", "I am Spindle."]
    console = Console(file=io.StringIO(), width=100)
    show_matches(rows, before, after, console)
    assert isinstance(console.file, io.StringIO)
    found = [
        line.replace("│", "|").split("|")[1:4] for line in console.file.getvalue().splitlines() if " of " in line
    ]
    assert [[cell.strip() for cell in cells[1:]] for cells in found] == [
        ["1 of 2", "2 of 2"],
        ["0 of 1", "1 of 1"],
        ["0 of 1", "0 of 1"],
        ["1 of 4", "3 of 4"],
    ]
