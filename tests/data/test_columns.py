"""Columns of other names: common pairs are recognized, and others are named with --columns."""

from pathlib import Path

import pytest

from handspun.config import DataConfig, TrainConfig
from handspun.config.columns import COLUMNS, parse_columns
from handspun.data.formats import NEEDED, common_pair, recognize_format
from handspun.data.rows import FileNotes, read_rows
from handspun.errors import ConfigError, DataError


def write(tmp_path: Path, header: str, name: str = "rows.csv") -> str:
    width = header.count(",") + 1
    file = tmp_path / name
    file.write_text(f"{header}\n{','.join(f'cell {number}' for number in range(width))}\n", encoding="utf-8")
    return str(file)


@pytest.mark.parametrize(
    ("header", "expected", "note"),
    [
        (
            "question,answer",
            {"prompt": "cell 0", "completion": "cell 1"},
            "prompt (written 'question'), comp",
        ),
        (
            "id,Question, Answer ",
            {"id": "cell 0", "prompt": "cell 1", "completion": "cell 2"},
            "(written ' Answer ')",
        ),
        ("instruction,input,response", {"instruction": "cell 0", "input": "cell 1", "output": "cell 2"}, "output"),
        ("prompt,Output", {"prompt": "cell 0", "completion": "cell 1"}, "completion (written 'Output')"),
        ("input,output", {"prompt": "cell 0", "completion": "cell 1"}, "prompt (written 'input')"),
    ],
)
def test_read_rows_recognizes_a_common_pair_and_says_so(
    header: str, expected: dict[str, str], note: str, tmp_path: Path
) -> None:
    notes: FileNotes = {}
    source = write(tmp_path, header)
    [row] = read_rows(source, notes)
    assert row.values == expected
    assert recognize_format(row.values, source) in ("alpaca", "prompt-completion")
    [[line]] = notes.values()
    assert line.startswith("columns read as ")
    assert note in line


@pytest.mark.parametrize(
    "columns",
    [
        ["question", "answer", "response"],  # two pairs
        ["context", "question", "answer"],  # the answer is about the context
        ["prompt", "chosen", "rejected"],
        ["prompt", "completion", "answer"],  # a format already
        ["question"],
        [],
    ],
    ids=str,
)
def test_common_pair_leaves_alone_what_is_unclear(columns: list[str]) -> None:
    assert common_pair(columns) == {}


def test_read_rows_takes_the_columns_that_the_user_names(tmp_path: Path) -> None:
    """Named columns win over spellings and pairs; case and white space of a name count."""
    named = {"instruction": "Frage", "output": "Antwort"}
    [row] = read_rows(write(tmp_path, "Frage,Input,Antwort"), columns=named)
    assert row.values == {"instruction": "cell 0", "input": "cell 1", "output": "cell 2"}
    source = write(tmp_path, "question,answer,reply")
    [row] = read_rows(source, columns={"prompt": "question", "completion": "reply"})
    assert row.values == {"prompt": "cell 0", "answer": "cell 1", "completion": "cell 2"}
    swapped = {"instruction": "output", "output": "instruction"}
    [row] = read_rows(write(tmp_path, "output,instruction"), columns=swapped)
    assert row.values == {"instruction": "cell 0", "output": "cell 1"}
    [row] = read_rows(write(tmp_path, "instruction,output"), columns=named)  # a held-out file with our names
    assert row.values == {"instruction": "cell 0", "output": "cell 1"}


def test_read_rows_names_a_column_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"from 'Frage', which is no column \(found: question, Antwort\)"):
        read_rows(write(tmp_path, "question,Antwort"), columns={"instruction": "Frage", "output": "Antwort"})
    with pytest.raises(DataError, match="reads 'Antwort' as output, but there is a column output too"):
        read_rows(write(tmp_path, "instruction,Antwort,output"), columns={"output": "Antwort"})


@pytest.mark.parametrize(
    "given",
    [
        ("instruction=Frage,output=Antwort",),
        ("instruction=Frage", "output = Antwort"),
        ('{"instruction": "Frage", "output": "Antwort"}',),
        {"instruction": "Frage", "output": "Antwort"},
    ],
    ids=str,
)
def test_parse_columns_in_every_form(given: tuple[str, ...] | dict[str, str]) -> None:
    assert parse_columns(given) == {"instruction": "Frage", "output": "Antwort"}
    assert TrainConfig(columns=given).columns == {"instruction": "Frage", "output": "Antwort"}


def test_parse_columns_a_name_may_hold_an_equals_sign() -> None:
    assert parse_columns(("prompt=a=b",)) == {"prompt": "a=b"}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("instruction",), "'instruction' maps to nothing"),
        (("instructions=Frage",), "'instructions' is no column of a format"),
        (("prompt= ",), "prompt is '' (expected the column's name in the file)"),
        (("prompt=a,prompt=b",), "prompt is read from 'a' and from 'b'"),
        (("prompt=a,completion=a",), "one column of the file is read as two"),
        (("{prompt}",), "is not a JSON object"),
    ],
    ids=str,
)
def test_parse_columns_says_what_is_wrong(given: tuple[str, ...] | dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        DataConfig(columns=given)
    assert str(caught.value).startswith("columns: ")
    assert problem in str(caught.value)


def test_columns_are_those_that_formats_read() -> None:
    assert {column for needed in NEEDED.values() for column in needed} <= set(COLUMNS)
