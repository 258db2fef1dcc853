"""Rows: every cell as it was written, every mistake named by file, line and remedy."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handspun.data.rows import FileNotes, Row, read_rows, read_sources
from handspun.errors import DataError

Write = Callable[[str, str | bytes], str]

ALPACA = [
    {"instruction": "Add 2 and 3.", "input": "", "output": "5"},
    {"instruction": "Name it.", "input": "007", "output": "N/A"},
]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into an empty working folder, and gives its name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: str | bytes) -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def values(source: str) -> list[dict[str, Any]]:
    return [row.values for row in read_rows(source)]


def refusal(source: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


def test_a_csv_row_has_file_number_and_cells(write: Write) -> None:
    name = write("train.csv", "instruction,output\nHello,Hi\nBye,So long\n")
    assert read_rows(name) == [
        Row("train.csv", 1, {"instruction": "Hello", "output": "Hi"}),
        Row("train.csv", 2, {"instruction": "Bye", "output": "So long"}),
    ]


def test_words_that_pandas_takes_for_numbers_or_missing_stay_strings(write: Write) -> None:
    cells = ["007", "N/A", "NA", "None", "null", "nan", "", "1e3", "True", " x "]
    name = write("train.csv", "a\n" + "".join(f'"{cell}"\n' for cell in cells))
    assert [row["a"] for row in values(name)] == cells


def test_blank_lines_are_no_rows(write: Write) -> None:
    assert len(values(write("a.csv", "\n\na,b\n\n1,2\n   \n3,4\n\n"))) == 2
    assert [row.number for row in read_rows(write("a.jsonl", '\n{"a": 1}\n\n  \n{"a": 2}\n'))] == [1, 2]


def test_line_ends_inside_of_a_cell_are_kept_as_they_are(write: Write) -> None:
    name = write("a.csv", 'a,b\r\n"one\r\ntwo","three\rfour\nfive"\r\n')
    assert values(name) == [{"a": "one\r\ntwo", "b": "three\rfour\nfive"}]


def test_tsv_is_separated_by_tabs(write: Write) -> None:
    assert values(write("a.tsv", 'a\tb\n1,5\t"x\ty"\n')) == [{"a": "1,5", "b": "x\ty"}]


def test_a_cell_longer_than_csv_s_limit_is_read_and_the_limit_is_left_alone(write: Write) -> None:
    before = csv.field_size_limit()
    long = "x" * (before + 1)
    assert values(write("a.csv", f"a,b\n{long},1\n"))[0]["a"] == long
    assert csv.field_size_limit() == before


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1), delimiter=st.sampled_from([",", "\t"]))
def test_what_csv_writer_wrote_comes_back(tmp_path: Path, rows: list[tuple[str, str]], delimiter: str) -> None:
    file = tmp_path / ("a.csv" if delimiter == "," else "a.tsv")
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=delimiter).writerows([("a", "b"), *rows])
    file.write_bytes(stream.getvalue().encode())
    held = [
        row for row in rows if any(cell.strip() for cell in row)
    ]  # a line of nothing but a separator is no row
    if not held:
        assert "but no rows" in refusal(str(file))
        return
    assert [(row["a"], row["b"]) for row in values(str(file))] == held


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
objects = st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True)
@given(rows=objects, ascii=st.booleans())
def test_what_json_wrote_comes_back(tmp_path: Path, rows: list[dict[str, Any]], ascii: bool) -> None:
    def dumps(value: Any) -> bytes:
        return json.dumps(value, ensure_ascii=ascii).encode()

    (tmp_path / "a.jsonl").write_bytes(b"\n".join(dumps(row) for row in rows))
    (tmp_path / "a.json").write_bytes(dumps(rows))
    expected = [json.loads(dumps(row)) for row in rows]
    assert values(str(tmp_path / "a.jsonl")) == values(str(tmp_path / "a.json")) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_files_are_read_with_and_without_a_byte_order_mark(write: Write, encoding: str) -> None:
    assert values(write("a.csv", "größe,字\nä,猫\n".encode(encoding))) == [{"größe": "ä", "字": "猫"}]
    assert values(write("a.json", '[{"字": "猫"}]'.encode(encoding))) == [{"字": "猫"}]


def test_json_shapes(write: Write) -> None:
    row = {"instruction": "a", "output": "b"}
    assert values(write("a.json", json.dumps([row, row]))) == [row, row]
    assert values(write("a.json", json.dumps({"version": 1, "data": [row, row]}))) == [row, row]
    assert values(write("a.json", json.dumps(row, indent=1))) == [row]
    assert values(write("a.json", '{"a": 1}\n{"a": 2}\n')) == [{"a": 1}, {"a": 2}]  # JSON Lines by another name
    turns = {"conversations": [{"from": "human", "value": "Hi"}]}
    assert values(write("a.json", json.dumps(turns))) == [turns]  # a row, not a wrapper around rows


def test_json_numbers_and_a_line_separator_in_a_text_are_kept(write: Write) -> None:
    assert values(write("a.ndjson", '{"a": 1.50, "b": 7, "c": "x\u2028y"}\n')) == [
        {"a": 1.5, "b": 7, "c": "x\u2028y"}
    ]


def test_parquet_is_read_and_keys_that_arrow_filled_in_are_gone(write: Write) -> None:
    rows = [
        {"text": "007", "tools": [{"name": "a", "city": "Rome"}], "empty": None},
        {"text": "N/A", "tools": [{"name": "b"}], "empty": None},
    ]
    write("x", "")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    assert values("a.parquet") == rows  # Arrow itself gives the second tool "city": None


def test_a_truncated_parquet_file_is_named(write: Write) -> None:
    write("x", "")
    pyarrow.parquet.write_table(pyarrow.table({"a": list(range(1000))}), "a.parquet")
    whole = Path("a.parquet").read_bytes()
    message = refusal(write("a.parquet", whole[: len(whole) // 2]))
    assert message.startswith("a.parquet: this is not a complete parquet file")


def test_a_folder_is_its_data_files_in_order(write: Write) -> None:
    for name, content in {
        "d/b.csv": "a\n2\n",
        "d/a.jsonl": '{"a": "1"}',
        "d/README.md": "x",
        "d/.x.csv": "y",
    }.items():
        write(name, content)
    write("d/dataset_info.json", "{}")
    write("d/old.csv/c.csv", "a\n3\n")
    assert read_rows("d") == [Row("d/a.jsonl", 1, {"a": "1"}), Row("d/b.csv", 1, {"a": "2"})]


@pytest.mark.parametrize("inner", ["train", "data"])
def test_a_folder_without_data_files_is_its_train_or_data_folder(write: Write, inner: str) -> None:
    write(f"d/{inner}/a.csv", "a\n1\n")
    write("d/test/a.csv", "a\n2\n")
    assert values("d") == [{"a": "1"}]


def test_test_rows_beside_training_rows_are_not_trained_on(write: Write) -> None:
    write("d/train-00000.csv", "a\n1\n")
    write("d/test-00000.csv", "a\n1\n")
    assert "test files (test-00000.csv)" in refusal("d")
    write("e/training.csv", "a\n1\n")
    write("e/evaluating.csv", "a\n1\n")
    assert len(values("e")) == 2  # no names of splits


def test_a_folder_without_data_says_what_it_holds(write: Write) -> None:
    write("d/readme.md", "x")
    write("d/sub/a.csv", "a\n1\n")
    assert "found readme.md, sub/." in refusal("d")
    Path("empty").mkdir()
    assert "found nothing." in refusal("empty")


def test_several_files_are_read_in_order_each_by_its_own_columns(write: Write) -> None:
    tickets = write("tickets.csv", "Question,Answer\na,b\nc,d\n")
    chats = write("chats.jsonl", '{"prompt": "e", "completion": "f"}\n')
    notes: FileNotes = {}
    rows = read_sources([chats, tickets], notes)
    assert [(Path(row.file).name, row.number, row.values) for row in rows] == [
        ("chats.jsonl", 1, {"prompt": "e", "completion": "f"}),
        ("tickets.csv", 1, {"prompt": "a", "completion": "b"}),
        ("tickets.csv", 2, {"prompt": "c", "completion": "d"}),
    ]
    assert list(notes) == [tickets]


def test_a_limit_is_of_all_files_together_and_noted(write: Write) -> None:
    files = [write(name, f"prompt,completion\n{name},1\n{name},2\n") for name in ("a.csv", "b.csv")]
    notes: FileNotes = {}
    rows = read_sources(files, notes, limit=3)
    assert [row.values["prompt"] for row in rows] == ["a.csv", "a.csv", "b.csv"]
    assert notes == {"--limit 3": ["the first 3 of 4 rows are used"]}
    notes.clear()
    assert len(read_sources(files, notes, limit=4)) == 4
    assert not notes


def test_a_file_that_two_sources_name_is_an_error(write: Write) -> None:
    file = write("a.csv", "prompt,completion\na,b\n")
    with pytest.raises(DataError, match=r"a\.csv: --data reads this file twice"):
        read_sources([file, str(Path(file).parent)])


def test_of_several_files_the_one_with_a_mistake_is_named(write: Write) -> None:
    whole, other = write("a.csv", "prompt,completion\na,b\n"), write("b.csv", "prompt,completion\na\n")
    with pytest.raises(DataError, match=r"b\.csv, "):
        read_sources([whole, other])


def test_a_misspelt_file_is_guessed(write: Write) -> None:
    write("data/train.csv", "a\n1\n")
    assert "Did you mean data/train.csv?" in refusal("data/trian.csv")
    assert "Did you mean data/train.csv?" in refusal("data/Train.CSV")
    assert "no file or folder dta. Did you mean data?" in refusal("dta/train.csv")
    assert "org/name" in refusal("train.csv")
    assert "there is no such file or folder" in refusal("data/alpaca")  # the folder exists: no hub id


def test_a_link_to_nothing_says_so(write: Write) -> None:
    write("x", "")
    os.symlink("gone.csv", "a.csv")
    assert refusal("a.csv") == "a.csv: it is a link to gone.csv, which does not exist."


@pytest.mark.parametrize("source", ["", "  ", "a\0b"])
def test_no_name_is_no_data(source: str) -> None:
    assert "names no data" in refusal(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv: the file is empty"),
        ("a.csv", "\ufeff \n\n", "a.csv: the file is empty"),
        ("a.jsonl", "\n", "a.jsonl: the file is empty"),
        ("a.parquet", "", "a.parquet: the file is empty"),
        ("a.json", "[]", "a.json: the file has no rows"),
        ("a.json", '{"data": []}', "a.json: the file has no rows"),
        ("a.csv", "a,b\n", "a.csv: the file has a header (a, b) but no rows"),
        ("a.csv", "a,b\n1,2\n\n1,2,3\n", "a.csv, line 4, row 2: expected 2 cells (a, b), found 3."),
        ("a.csv", 'a,b\n"x\ny",2\n1\n', "a.csv, line 4, row 2: expected 2 cells (a, b), found 1."),
        ("a.csv", 'a,b\n1,2\n"x,3\n4,5\n', "a.csv, line 3: a quote opens in this record and is not closed"),
        ("a.csv", 'a,b\n"x" y,3\n', "a.csv, line 2: malformed at line 2 (',' expected after '\"')"),
        ("a.csv", "a,b,a\n1,2,3\n", "a.csv, line 1: columns 1 and 3 are both named 'a'"),
        ("a.csv", "\n,a\nx,1\n", "a.csv, line 2: column 1 of the header has no name, but line 3 has 'x' in it"),
        (
            "a.csv",
            "a;b|c\n1;2\n",
            "a.csv, line 1: the header is a single name, 'a;b|c'. It looks separated by ';'",
        ),
        ("a.csv", "a,b\n1,2\nx\0y,3\n", "a.csv, line 3: there is a NUL character"),
        ("a.json", '[\n{"a": 1},\n{"a": }\n]', "a.json, line 3: malformed JSON at character 7 of the line"),
        ("a.json", '[{"a": 1}, 5]', "a.json, row 2: expected an object, found the number 5."),
        ("a.json", '"text"', "a.json: expected a list of objects, found a string."),
        ("a.json", '{"x": [{}], "y": [{}]}', "a.json: the object contains several lists (x, y)"),
        (
            "a.json",
            '[{"a": 1,\n"b": {"a": 2},\n"a": 3}]',
            "a.json, line 3: the key 'a' is in one object twice",
        ),
        ("a.json", "[" * 100_000, "a.json, line 1: the JSON is nested too deeply"),
        ("a.json", f'[{{"a": {"9" * 5000}}}]', "a.json, line 1: the JSON cannot be read"),
        ("a.jsonl", '{"a": 1}\n\n{"a": 1\n', "a.jsonl, line 3: malformed JSON"),
        ("a.jsonl", '{"a": 1}\n\n[1]\n', "a.jsonl, line 3, row 2: expected an object, found a list."),
        ("a.jsonl", '{"a": 1}\n{"b": 1, "b": 2}', "a.jsonl, line 2: the key 'b' is in one object twice"),
        ("a.txt", "x", "a.txt: the suffix .txt is not one of .csv, .tsv"),
        ("train", "x", "train: the suffix (none) is not one of"),
        ("a.csv", b"\x1f\x8b\x08\0", "a.csv: this is a gzip file"),
        ("a.csv", b"PAR1....", "a.csv: this is a parquet file"),
        ("a.csv", b"PK\x03\x04...", "a.csv: this is a zip archive or an Excel workbook"),
        ("a.parquet", "version https://git-lfs.github.com/spec/v1\n", "a.parquet: this is a Git LFS pointer"),
        ("a.parquet", "a,b\n1,2\n", "a.parquet: this is not a complete parquet file"),
    ],
)
def test_mistakes_are_named_with_their_place(write: Write, name: str, content: str | bytes, message: str) -> None:
    assert refusal(write(name, content)).startswith(message)


def test_bytes_of_another_encoding_are_named_with_line_offset_and_remedy(write: Write) -> None:
    message = refusal(write("my train.csv", "a,b\n1,2\ncafé,3\n".encode("latin-1")))
    assert message == (
        "my train.csv, line 3: the byte 0xE9 at character 4 of the line (offset 11) is not UTF-8. Convert it from "
        "the encoding that it was saved in to UTF-8, for example: iconv -f WINDOWS-1252 -t UTF-8 'my train.csv' > "
        "'my train.utf8.csv'"
    )
    assert "line 2: the byte 0xFF at character 1 of the line (offset 6) is not UTF-8" in refusal(
        write("b.csv", b"\xef\xbb\xbfa\n\xff\n".replace(b"a\n", b"aa\n"))
    )
    assert "UTF-16LE" in refusal(write("c.csv", "a,b\n1,2\n".encode("utf-16-le")))


def test_devices_and_pipes_are_refused_without_reading(write: Write) -> None:
    write("x", "")
    os.mkfifo("a.csv")
    assert refusal("a.csv").startswith("a.csv: expected a regular file, found a device, a pipe or a socket")
    assert refusal("/dev/zero").startswith("/dev/zero: expected a regular file")


def test_a_file_that_may_not_be_read_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write("a.csv", "a\n1\n")

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert refusal(name).startswith("a.csv: the system cannot read it (Permission denied)")
    assert "cannot read it" in refusal("x" * 5000)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True, max_examples=300
)
@given(
    content=st.binary() | st.text('ab,;"\n\r\t[]{}: 1\\\ufeff').map(str.encode),
    suffix=st.sampled_from(["csv", "tsv", "json", "jsonl", "parquet"]),
)
def test_whatever_stands_in_a_file_there_are_rows_or_one_clear_error(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    try:
        numbers = [row.number for row in read_rows(str(file))]
    except DataError as error:
        assert error.file == str(file)  # noqa: PT017
    else:
        assert numbers[0] == 1


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[Any, ...]]:
    """Stands in for the hub; gives what was asked of it."""
    monkeypatch.chdir(tmp_path)
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        if name == "org/unknown":
            raise FileNotFoundError("Dataset 'org/unknown' doesn't exist on the Hub\nmore")
        if name == "org/offline":
            raise ConnectionError("Couldn't reach the Hub")
        return [] if name == "org/empty" else [{"messages": [{"role": "user", "content": "Hi", "name": None}]}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


def test_a_hub_dataset_is_read_with_its_split_and_configuration(hub: list[tuple[Any, ...]]) -> None:
    (row,) = read_rows("org/name")
    assert row == Row("org/name", 1, {"messages": [{"role": "user", "content": "Hi"}]})
    read_rows("org/name:test")
    read_rows("org/name:main:test")
    assert hub == [("org/name", None, "train"), ("org/name", None, "test"), ("org/name", "main", "test")]


def test_what_the_hub_refuses_comes_with_a_remedy(hub: list[tuple[Any, ...]]) -> None:
    assert "cannot be loaded: Dataset 'org/unknown' doesn't exist on the Hub. Check" in refusal("org/unknown")
    assert "Couldn't reach the Hub. Check the spelling and the network." in refusal("org/offline")
    assert "the split 'test' has no rows" in refusal("org/empty:test")
    hub.clear()
    assert "there is no file or folder org." in refusal("org/name.csv")  # a file, by its suffix
    assert hub == []
