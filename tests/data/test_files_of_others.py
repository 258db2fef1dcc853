"""Files as other programs write them: read as what they are and told of, or refused with advice that works."""

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from handspun.cli import main
from handspun.config import DataConfig
from handspun.data import dataset as prepare
from handspun.data.chat_template import ChatTemplate
from handspun.data.conversations import to_conversation
from handspun.data.dataset import Dataset, load_splits
from handspun.data.formats import recognize_format
from handspun.data.readers import read_file
from handspun.data.rows import read_rows
from handspun.display import captured_log
from handspun.errors import DataError
from handspun.preflight.print import account_lines
from tiny import tiny_tokenizer

TEMPLATE = ChatTemplate(tiny_tokenizer())
ROWS = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
CHATS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}],
]
SHAREGPT = [
    [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
    [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}],
]
Write = Callable[[str, Any], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes text, bytes, or a value as JSON into an empty working folder; gives the name."""
    monkeypatch.chdir(tmp_path)

    def write(name: str, content: Any) -> str:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        Path(name).write_bytes(content)
        return name

    return write


def read(source: str) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows' values, and what the account will say of the files."""
    notes: dict[str, list[str]] = {}
    rows = read_rows(source, notes)
    return [row.values for row in rows], [note for texts in notes.values() for note in texts]


def refusal(source: str) -> str:
    """The error of reading it, or of finding its format."""
    with pytest.raises(DataError) as caught:
        recognize_format(list(dict.fromkeys(name for row in read_rows(source) for name in row.values)), source)
    return str(caught.value)


def turns(source: str, columns: dict[str, str] | None = None) -> list[list[tuple[str, str]]]:
    """The conversations of a file, as (role, content)."""
    rows = read_rows(source, columns=columns)
    data_format = recognize_format(list(rows[0].values), source)
    conversations = [to_conversation(row, data_format, system_prompt=None).messages for row in rows]
    return [[(message["role"], message["content"]) for message in messages] for messages in conversations]


def prepared(source: str) -> Dataset:
    return load_splits(DataConfig(data=source), TEMPLATE, max_length=1000)[0]


TWO = [[("user", "a"), ("assistant", "b")], [("user", "c"), ("assistant", "d")]]

TABLES = {
    "a hint for Excel": ("sep=;\r\ninstruction;output\r\na;b\r\nc;d\r\n", "sep=;, is Excel's hint"),
    "the same with a mark": ("\ufeffsep=;\r\ninstruction;output\r\na;b\r\nc;d\r\n", "sep=;, is Excel's hint"),
    "a hint with commas": ("sep=,\ninstruction,output\na,b\nc,d\n", "sep=,, is Excel's hint"),
    "a hint in quotes": ('"sep=;"\ninstruction;output\na;b\nc;d\n', "sep=;, is Excel's hint"),
    "a hint that was filled up": ("SEP=,,\ninstruction,output\na,b\nc,d\n", "is Excel's hint"),
    "a hint of tabs": ("sep=\t\ninstruction\toutput\na\tb\nc\td\n", "sep=(a tab), is Excel's hint"),
    "semicolons": ("instruction;output\na;b\nc;d\n", "separated by ;, not by ,"),
    "semicolons and quotes": ('"instruction";"output"\n"a";"b"\n"c";"d"\n', "separated by ;, not by ,"),
    "tabs": ("instruction\toutput\na\tb\nc\td\n", "separated by (a tab), not by ,"),
    "bars": ("instruction|output\na|b\nc|d\n", "separated by |, not by ,"),
    "an index without a name": (
        ",instruction,output\n0,a,b\n1,c,d\n",
        "column 1 has no name and numbers the rows",
    ),
    "an index out of order": (",instruction,output\n17,a,b\n3,c,d\n", "column 1 has no name and numbers the rows"),
    "columns that hold nothing": ("instruction,output,,\na,b,,\nc,d,,\n", "at the end of the header with nothing"),
    "a column in between that holds nothing": (
        "instruction,,output\na,,b\nc, ,d\n",
        "column 2 has no name and is empty, ignored",
    ),
    "a separator behind each row": ("instruction,output\na,b,\nc,d,\n", "at the end of each line with nothing"),
    "two behind each row": ("instruction,output\na,b,,\nc,d,,\n", "separators at the end of each line"),
    "rows of separators": (
        "instruction,output\na,b\n,\n , \nc,d\n,\n",
        "lines with only separators, skipped: 3 (lines 3, 4, 6)",
    ),
    "rows of quotes": ('instruction,output\na,b\n"",""\nc,d\n', "only separators, skipped: 1 (line 3)"),
    "separators above the header": (",\ninstruction,output\na,b\nc,d\n", "skipped: 1 (line 1)"),
    "other capitals": ("Instruction,OUTPUT\na,b\nc,d\n", "columns read as instruction (written 'Instruction')"),
    "white space in the header": ("instruction , output\na,b\nc,d\n", "output (written ' output')"),
    "no line end behind the last row": ("instruction,output\na,b\nc,d", None),
    "line ends of an old Mac": ("instruction,output\ra,b\rc,d\r", None),
}


@pytest.mark.parametrize(("content", "note"), TABLES.values(), ids=TABLES.keys())
def test_tables_of_spreadsheets_and_pandas_are_read_and_told_of(
    write: Write, content: str, note: str | None
) -> None:
    values, notes = read(write("train.csv", content))
    assert values == ROWS
    assert len(notes) == (note is not None)
    assert (note or "") in "".join(notes)


def test_commas_under_the_name_tsv(write: Write) -> None:
    assert read(write("train.tsv", "instruction,output\na,b\nc,d\n")) == (ROWS, ["separated by ,, not by (a tab)"])


def test_the_index_that_pandas_wrote_with_a_name_is_a_column_that_is_not_read(write: Write) -> None:
    made = prepared(write("train.csv", "Unnamed: 0,instruction,output\n0,a,b\n"))
    assert made.account.unused_columns == {"train.csv": ["Unnamed: 0"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("instruction,output,\na,b,\nc,d, e\n", "column 3 of the header has no name, but line 3 has ' e' in it"),
        ("instruction,output\na,b,\nc,d\n", "line 2, row 1: expected 2 cells (instruction, output), found 3"),
        ("instruction,output\na,b,\nc,d,e\n", "line 3, row 2: expected 2 cells (instruction, output), found 3"),
        ("instruction;output\na;b;c\n", "line 2, row 1: expected 2 cells"),
        ("sep=;\ninstruction;output\na;b;c\n", "line 3, row 1: expected 2 cells"),
        ('sep=;\ninstruction;output\na;"b\n', "line 3: a quote opens in this record"),
        ("sep=;\n", "only separators"),
        (",,\n,,\n", "only separators"),
        ("instruction,output\n,\n", "the file has a header (instruction, output) but no rows"),
        (",instruction,output\nx,a,b\n", "column 1 of the header has no name, but line 2 has 'x' in it"),
        ("instruction,output,\ninstruction,output,\n", "the header is repeated here"),
    ],
)
def test_tables_that_could_mean_several_things_are_refused(write: Write, content: str, message: str) -> None:
    assert message in refusal(write("train.csv", content))


@pytest.mark.parametrize("content", ["Frage;Antwort\na, c;b\n", '"Frage";"Antwort"\n"a, c";"b"\n'])
def test_a_table_of_unknown_columns_with_semicolons_is_read(write: Write, content: str) -> None:
    """Excel writes it so in half of Europe, and --columns says what the columns are."""
    assert read(write("train.csv", content)) == (
        [{"Frage": "a, c", "Antwort": "b"}],
        ["separated by ;, not by ,"],
    )


def test_a_header_that_two_separators_split_is_read_after_following_the_advice(write: Write) -> None:
    content = "frage;ant|wort\na;b\n"
    assert "Put the line sep=; above it" in refusal(write("train.csv", content))
    assert read(write("train.csv", f"sep=;\n{content}"))[0] == [{"frage": "a", "ant|wort": "b"}]


def test_carriage_returns_marks_and_excels_escapes_in_cells_are_counted(write: Write) -> None:
    cells = ['"1\r\n2"', "1_x000D_2", '"1\r2"', "1\ufeff2", '"1\n2"', "snake_x0_case"]
    made = prepared(write("train.csv", "instruction,output\r\n" + "".join(f"a,{cell}\r\n" for cell in cells)))
    lines = account_lines(made.account, max_length=1000)
    assert lines[-3:] == [
        "  carriage returns (line ends of Windows or old Macs), trained on as they are: 2 (rows 1, 3)",
        "  Excel's escapes (_x000D_), trained on as they are: 1 (row 2)",
        "  byte order marks (U+FEFF), trained on as they are: 1 (row 4)",
    ]


def columns_of(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def numbered(values: list[Any]) -> dict[str, Any]:
    return {str(number): value for number, value in enumerate(values)}


SHAPES: dict[str, Any] = {
    "to_json()": {name: numbered(cells) for name, cells in columns_of(ROWS).items()},
    "to_dict(list)": columns_of(ROWS),
    "to_json(orient=split)": {
        "columns": ["instruction", "output"],
        "index": [0, 1],
        "data": [["a", "b"], ["c", "d"]],
    },
    "to_json(orient=index)": numbered(ROWS),
    "under names": {"first": ROWS[0], "second": ROWS[1]},
    "to_json(orient=table)": {
        "schema": {"fields": [{"name": "instruction", "type": "string"}], "pandas_version": "1.4.0"},
        "data": ROWS,
    },
    "the hub's API": {
        "features": [{"feature_idx": 0, "name": "instruction"}],
        "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(ROWS)],
        "num_rows_total": 2,
        "partial": False,
    },
    "a wrapper": {"version": 1, "rows": ROWS},
    "a list": ROWS,
    "other capitals": [{"Instruction": row["instruction"], "Output": row["output"]} for row in ROWS],
    "other capitals by columns": {"Instruction": ["a", "c"], "Output": ["b", "d"]},
    "lists of turns": CHATS,
    "lists of turns of ShareGPT": SHAREGPT,
    "conversations by columns": {"messages": numbered(CHATS)},
    "conversations in a list of columns": {"messages": CHATS, "id": ["x", "y"]},
    "prompts and completions of messages by columns": {
        "prompt": [chat[:1] for chat in CHATS],
        "completion": [chat[1:] for chat in CHATS],
    },
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("value", SHAPES.values(), ids=SHAPES.keys())
def test_json_of_every_shape_is_read(write: Write, value: Any, name: str, indent: int | None) -> None:
    if name == "train.jsonl" and indent is None and (isinstance(value, dict) or value in (CHATS, SHAREGPT)):
        value = ROWS  # a line is a row there
    assert turns(write(name, json.dumps(value, indent=indent))) == TWO


def test_columns_that_no_format_has_are_read_by_rows_too(write: Write) -> None:
    rows = [{"first": "a", "second": "b"}, {"first": "c", "second": "d"}]
    for value in (columns_of(rows), {name: numbered(cells) for name, cells in columns_of(rows).items()}):
        assert read(write("train.json", value))[0] == rows
    assert read(write("train.json", numbered(rows)))[0] == rows


@pytest.mark.parametrize("value", [{"messages": CHATS[0]}, {"conversations": SHAREGPT[0], "tools": [{}, {}]}])
def test_one_conversation_is_one_row_and_no_columns(write: Write, value: dict[str, Any]) -> None:
    assert read(write("train.json", value)) == ([value], [])


LINES = {
    "objects over several lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects without a line end": "".join(json.dumps(row) for row in ROWS),
    "blank lines": "\n\n".join(json.dumps(row) for row in ROWS) + "\n \n",
    "line ends of Windows": "\r\n".join(json.dumps(row) for row in ROWS),
    "line ends of an old Mac": "\r".join(json.dumps(row) for row in ROWS),
    "two files with marks joined": "\ufeff" + "\n\ufeff".join(json.dumps(row) for row in ROWS),
    "a list": json.dumps(ROWS, indent=1),
    "a list of lines": "[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
    "a list on one line": json.dumps(ROWS),
    "a conversation a line": "\n".join(json.dumps(chat) for chat in CHATS),
}


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("content", LINES.values(), ids=LINES.keys())
def test_json_lines_are_read_wherever_lines_end(write: Write, content: str, name: str) -> None:
    assert turns(write(name, content)) == TWO


def test_one_conversation_on_the_only_line_is_one_row(write: Write) -> None:
    assert turns(write("train.jsonl", CHATS[0])) == TWO[:1]


def test_a_mark_inside_of_json_lines_is_told_of(write: Write) -> None:
    assert read(write("a.jsonl", '{"a": 1}\n\ufeff{"a": 2}\n'))[1] == [
        "byte order marks inside the file, removed: 1 (line 2)"
    ]


@pytest.mark.parametrize(
    ("content", "place", "advice"),
    [
        ('[{"a": 1},\n]', "line 2", "Remove the comma before the closing bracket."),
        ('[{"a": 1,\n}]', "line 2", "Remove the comma before the closing bracket."),
        ("[\n{'a': 1}]", "line 2", "write it with json.dumps"),
        ('[\n{"a": None}]', "line 2", "write it with json.dumps"),
        ('[\n{"a": True}]', "line 2", "write it with json.dumps"),
        ('[\n// rows\n{"a": 1}]', "line 2", "JSON has no comments; remove it."),
        ('[\n# rows\n{"a": 1}]', "line 2", "JSON has no comments; remove it."),
        ("[\n{“a”: 1}]", "line 2", "straight double quotes"),
        ("[\n{a: 1}]", "line 2", "Put the names of an object in double quotes."),
        ('[{"a": 1}\n{"a": 2}]', "line 2", "Add the missing comma"),
        ('[{"a": "b\nc"}]', "line 1", r"write a line break as \n"),
        ('[{"a":\n"C:\\data"}]', "line 2", r"write a backslash as \\"),
        ('[\n{"a": undefined}]', "line 2", "Write null"),
        ('[\n{"a": "b', "line 2", "it may be cut short"),
        ('[\n{"a": 1}', "line 2", "it may be cut short"),
        ('[\r{"a": None}]', "line 2", "write it with json.dumps"),
    ],
)
def test_json_that_is_none_is_refused_with_line_and_remedy(
    write: Write, content: str, place: str, advice: str
) -> None:
    for name in ("train.json", "train.jsonl"):
        message = refusal(write(name, content))
        assert message.startswith(f"{name}, {place}: malformed JSON at character ")
        assert advice in message


def test_a_comma_behind_the_objects_of_json_lines(write: Write) -> None:
    message = refusal(write("train.jsonl", '{"a": 1},\n{"a": 2}\n'))
    assert message.startswith("train.jsonl, line 1: malformed JSON at character 9 of the line: Extra data")
    assert "Remove the comma after the value, or write all values as one list" in message


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"instruction": ["a", "b"], "output": ["c"]},
            "the columns differ in length (instruction 2, output 1)",
        ),
        ({"instruction": {"0": "a"}, "output": {"1": "b"}}, "the columns do not have the same rows"),
        ({"columns": ["prompt"], "data": [["a", "b"]]}, "row 1: expected 1 values"),
        ([["instruction", "output"], ["a", "b"]], 'to_json("train.jsonl", orient="records", lines=True)'),
        ([[{"prompt": "a"}]], 'Write a conversation as {"messages": [{"role"'),
        (
            {"rows": [{"row_idx": 0, "row": ROWS[0], "truncated_cells": ["output"]}]},
            "row 1: the hub's API truncated this row's text",
        ),
        ({"train": ROWS, "test": ROWS}, "the object contains several lists (train, test)"),
    ],
)
def test_json_that_could_mean_several_things_is_refused(write: Write, value: Any, message: str) -> None:
    assert message in refusal(write("train.json", value))


def test_a_part_of_the_hubs_rows_is_told_of(write: Write) -> None:
    rows = [{"row_idx": 0, "row": ROWS[0], "truncated_cells": []}]
    value = {"rows": rows, "num_rows_total": 52002}
    assert read(write("a.json", value)) == (ROWS[:1], ["rows of the hub's API, 1 of the data set's 52002"])


PAIRS: list[dict[str, Any]] = [
    {"prompt": "a", "answer": "b"},
    {"prompt": "a", "response": "b"},
    {"prompt": "a", "output": "b"},
    {"id": 1, "prompt": "a", "answer": "b", "annotator": 1, "lead_time": 4.2},
    {"instruction": "a", "response": "b"},
    {"instruction": "a", "answer": "b"},
    {"instruction": "a", "completion": "b"},
    {"question": "a", "answer": "b"},
    {"Question": "a", "Answer": "b"},
    {"query": "a", "response": "b"},
    {"input": "a", "output": "b"},
    {"user": "a", "assistant": "b"},
    {"Human": "a", "Assistant": "b"},
    {"problem": "a", "solution": "b"},
]
RENAMINGS = [
    ({"instruction": "a", "context": "", "response": "b"}, {"response": "output"}),
    ({"question": "a", "reply": "b"}, {"question": "prompt", "reply": "completion"}),
    ({"instructions": "a", "output": "b"}, {"instructions": "instruction"}),
    ({"prompts": "a", "completions": "b"}, {"prompts": "prompt", "completions": "completion"}),
    ({"message": CHATS[0]}, {"message": "messages"}),
    ({"chat": CHATS[0]}, {"chat": "messages"}),
    ({"dialogue": SHAREGPT[0]}, {"dialogue": "messages"}),
    ({"conversation": SHAREGPT[0]}, {"conversation": "conversations"}),
    ({"id": "x", "items": SHAREGPT[0]}, {"items": "conversations"}),
]


@pytest.mark.parametrize("values", PAIRS, ids="-".join)
def test_a_common_pair_is_read_as_what_it_means(write: Write, values: dict[str, Any]) -> None:
    assert turns(write("train.jsonl", values)) == TWO[:1]


@pytest.mark.parametrize(("values", "renaming"), RENAMINGS, ids=lambda value: "-".join(value))
def test_a_renaming_that_is_advised_works(write: Write, values: dict[str, Any], renaming: dict[str, str]) -> None:
    """In the file, and with --columns."""
    message = refusal(source := write("train.jsonl", values))
    assert "Rename " + " and ".join(f"'{a}' to '{b}'" for a, b in renaming.items()) + ". Or name" in message
    assert turns(source, {new: old for old, new in renaming.items()}) == TWO[:1]
    assert turns(write("train.jsonl", {renaming.get(k, k): v for k, v in values.items()})) == TWO[:1]


def chat_gpt_tree() -> dict[str, Any]:
    def node(parent: str | None, role: str | None, text: str) -> dict[str, Any]:
        message = (
            {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}} if role else None
        )
        return {"parent": parent, "message": message}

    mapping = {"x": node(None, None, ""), "y": node("x", "user", "a"), "z": node("y", "assistant", "b")}
    return {"title": "t", "mapping": mapping, "current_node": "z"}


def followed_chat_gpt(row: dict[str, Any]) -> dict[str, Any]:
    place, messages = row["current_node"], list[dict[str, str]]()
    while place:
        node = row["mapping"][place]
        if message := node["message"]:
            text = "".join(message["content"]["parts"])
            messages.insert(0, {"role": message["author"]["role"], "content": text})
        place = node["parent"]
    return {"messages": messages}


EXPORTS: list[tuple[dict[str, Any], str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    (chat_gpt_tree(), "`mapping` is ChatGPT's export", followed_chat_gpt),
    (
        {
            "id": 1,
            "data": {"prompt": "a"},
            "annotations": [{"result": [{"value": {"text": ["b"]}, "from_name": "answer"}]}],
        },
        "export as CSV or JSON-MIN instead, and name the columns `prompt` and `completion`",
        lambda row: {
            "prompt": row["data"]["prompt"],
            "completion": row["annotations"][0]["result"][0]["value"]["text"][0],
        },
    ),
    (
        {"fields": {"prompt": "a"}, "responses": {"answer": [{"value": "b"}]}},
        "`fields` and `responses` are Argilla's records",
        lambda row: {
            "prompt": row["fields"]["prompt"],
            "completion": row["responses"]["answer"][0]["value"],
        },
    ),
    (
        {
            "custom_id": "1",
            "body": {"messages": CHATS[0][:1]},
            "response": {"body": {"choices": [{"message": CHATS[0][1]}]}},
        },
        "write each request's `body.messages` plus the `message` of its response",
        lambda row: {
            "messages": [*row["body"]["messages"], row["response"]["body"]["choices"][0]["message"]],
        },
    ),
    (
        {
            "uuid": "1",
            "chat_messages": [{"sender": "human", "text": "a"}, {"sender": "assistant", "text": "b"}],
        },
        "rename it to `conversations`, and inside it `sender` to `from` and `text` to `value`",
        lambda row: {
            "conversations": [{"from": turn["sender"], "value": turn["text"]} for turn in row["chat_messages"]]
        },
    ),
]


@pytest.mark.parametrize(
    ("row", "advice", "follow"), EXPORTS, ids=["ChatGPT", "Label", "Argilla", "OpenAI", "Claude"]
)
def test_exports_are_named_and_their_advice_works(
    write: Write, row: dict[str, Any], advice: str, follow: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    message = refusal(write("train.json", [row]))
    assert advice in message
    assert all(name in message for name in row)
    assert turns(write("train.json", [follow(row)])) == TWO[:1]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.json", SHAREGPT[0]),
        ("train.jsonl", "\n".join(json.dumps(turn) for turn in CHATS[0])),
        ("train.csv", "role,content\nuser,a\nassistant,b\n"),
    ],
)
def test_a_turn_a_row_is_shown_the_form_of_a_conversation(write: Write, name: str, content: Any) -> None:
    message = refusal(write(name, content))
    assert "describe one turn, but a row is a whole conversation: {" in message


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("train.csv.gz", b"\x1f\x8b..", "gunzip -k train.csv.gz"),
        ("train.zip", b"PK\x03\x04..", "unzip train.zip"),
        ("train.xlsx", b"PK\x03\x04..", "Save its sheet as CSV UTF-8"),
        ("train.xls", b"\xd0\xcf\x11\xe0..", "Save its sheet as CSV UTF-8"),
        ("train.ods", b"PK\x03\x04..", "Save its sheet as CSV UTF-8"),
        ("train.numbers", b"PK\x03\x04..", "Save its sheet as CSV UTF-8"),
        ("train.arrow", b"ARROW1..", "datasets.Dataset.from_file('train.arrow')"),
        ("train.pkl", b"\x80\x04..", "reading it could run code"),
        ("train.csv", b"\xd0\xcf\x11\xe0..", "this is an old Excel workbook"),
        ("train.csv", b"\n<!DOCTYPE html><html>", "this is a web page, not the data"),
        ("train.json", b"<html lang=en>", "this is a web page, not the data"),
    ],
)
def test_files_of_other_kinds_come_with_what_to_do(write: Write, name: str, content: bytes, advice: str) -> None:
    assert advice in refusal(write(name, content))


@pytest.mark.parametrize(
    ("content", "better"),
    [
        ("\n".join(json.dumps(row) for row in ROWS), "train.jsonl"),
        (json.dumps(ROWS), "train.jsonl"),
        (json.dumps(ROWS, indent=1), "train.json"),
        ("instruction,output\na,b\nc,d\n", "train.csv"),
        ('"instruction"\t"output"\na\tb\nc\td\n', "train.tsv"),
        ("instruction;output\na;b\nc;d\n", "train.csv"),
    ],
)
def test_a_file_of_another_name_is_read_under_the_one_that_is_advised(
    write: Write, content: str, better: str
) -> None:
    assert refusal(write("train.txt", content)).endswith(f"Rename it to {better}.")
    assert turns(write(better, content)) == TWO


def test_what_is_not_read_in_a_folder_is_told(write: Write) -> None:
    write("d/a.csv", "instruction,output\na,b\n")
    write("d/b.csv.gz", b"\x1f\x8b")
    write("d/more/c.csv", "instruction,output\nc,d\n")
    write("d/.hidden.csv", "x")
    account = prepared("d").account
    assert account.file_notes == {"d": ["not read in this folder: b.csv.gz, more/"]}
    assert "d: not read in this folder: b.csv.gz, more/" in account_lines(account, max_length=1000)


def test_notes_of_held_out_files_are_in_their_own_account(write: Write) -> None:
    write("train.csv", "instruction,output\na,b\n")
    write("held.csv", "sep=,\ninstruction,output\na,b\n")
    made, held_out = load_splits(DataConfig(data="train.csv"), TEMPLATE, max_length=1000, eval_data=["held.csv"])
    assert held_out is not None
    assert made.account.file_notes == {}
    assert list(held_out.account.file_notes) == ["held.csv"]


def test_carriage_returns_are_gone_after_following_the_documentation(write: Write) -> None:
    name = write("train.csv", 'instruction,output\r\na,"1\r\n2_x000D_"\r\n')
    documented = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    command = r"sed -i 's/\r$//; s/_x000D_//g' train.csv"
    assert command in documented
    subprocess.run(shlex.split(command), check=True)
    assert read(name) == ([{"instruction": "a", "output": "1\n2"}], [])
    assert prepared(name).account.notes == []


@pytest.mark.parametrize("command", ["preflight", "preview", "eval"])
def test_a_file_is_read_once(
    write: Write,
    tiny_folder: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A million rows take minutes to read, and were read twice."""
    write("train.csv", "sep=;\ninstruction;output\na;b\na;b\nc;N/A\n")
    read: list[str] = []

    def read_and_count(path: Path, *arguments: Any) -> list[dict[str, Any]]:
        read.append(path.name)
        return read_file(path, *arguments)

    monkeypatch.setattr("handspun.data.rows.read_file", read_and_count)
    assert main([command, "--data", "train.csv", "--model", str(tiny_folder), "--no-cache-examples"]) == 0
    assert read == ["train.csv"]
    printed = capsys.readouterr().out
    assert "sep=;, is Excel's hint" in printed
    assert command != "preflight" or "the same as an earlier one: 1 of 3" in printed


def test_tokenizing_says_how_far_it_has_come(monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setattr(prepare, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(prepare, "_LARGE", 10_000)
    name = write("train.csv", "instruction,output\n" + "a,b\n" * 2500)
    with captured_log() as log:
        load_splits(DataConfig(data=name), TEMPLATE, max_length=100)
    assert log[:3] == [
        "reading train.csv (0 MB)",
        "1,000 of 2,500 rows tokenized",
        "2,000 of 2,500 rows tokenized",
    ]
    assert len(log) == 4
    assert log[3].startswith("2,500 rows tokenized in ")


def test_rows_are_let_go(write: Write) -> None:
    made = prepared(write("train.csv", "instruction,output\na,b\nc,\n"))
    assert len(made.rows) == 2
    made.release_rows()
    assert made.rows == []
    assert [row.number for row in made.accounted] == [2]
