"""/collect: rows to train on, appended to the server's own file."""

import json
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import handspun
from handspun.cli import main
from handspun.config.serving import ServeOptions
from handspun.data.rows import read_rows
from handspun.errors import ConfigError, OutputError
from handspun.models.load import ChatModel
from handspun.serve.app import Service, make_app
from handspun.serve.collect import append_line, check_collect_file
from handspun.serve.guard import Keys
from handspun.serve.metrics import Metrics
from handspun.serve.routes import ENDPOINTS
from handspun.serve.served import ServedModel
from handspun.serve.worker import Worker
from serving import ask, served

USER: dict[str, Any] = {"role": "user", "content": "Say 3."}
ANSWER: dict[str, Any] = {"role": "assistant", "content": 'It is 3.\n\u2028"\x85 🙂'}
ROW: dict[str, Any] = {"messages": [USER, ANSWER]}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("collected") / "rows.jsonl"
    check_collect_file(path)
    return path


@pytest.fixture(scope="module")
def port(worker: Worker, chat: ChatModel, file: Path) -> Iterator[int]:
    options = ServeOptions(collect=str(file), log_requests=False)
    service = Service(options, Metrics(), Keys(["sesame"]), {"tiny": ServedModel.of("tiny", chat)}, worker)
    with served(make_app(service, ENDPOINTS), options) as port:
        yield port


def collect(port: int, body: Any, *headers: tuple[str, str], key: str = "sesame") -> Any:
    return ask(port, "/collect", body, ("Authorization", f"Bearer {key}"), *headers)


def test_collect_appends_rows_that_training_reads(port: int, file: Path, tiny_folder: Path) -> None:
    file.write_text("")
    context = {**ANSWER, "content": "It is 4.", "weight": 0}
    system = {"role": "system", "content": "Count."}
    result = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "3"}
    rows: list[dict[str, Any]] = [
        ROW,
        {"messages": [system, USER, context, USER, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": TOOLS},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, result, ANSWER]},
    ]
    for row in rows:
        assert collect(port, row).status == 200
    assert file.read_bytes().count(b"\n") == len(rows)
    read = [row.values for row in read_rows(str(file))]
    assert read[:2] == rows[:2]
    assert read[2]["tools"] == TOOLS
    assert read[2]["messages"][1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert [message["role"] for message in read[3]["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert handspun.preview(str(file), tiny_folder).report.kept == len(rows)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": []}, "messages: expected"),
        ({"messages": [USER]}, "training would drop the row: no assistant turn. Fix it."),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "training would drop the row: empty assistant turn."),
        ({"messages": [USER, ANSWER, USER]}, "training would read 2 of 3 messages"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "training would drop the row: no turn to train on"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "messages[1].weight: expected"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content: it is missing"),
        ({"messages": [{"role": "owl", "content": "u"}, ANSWER]}, "messages[0].role: expected"),
        ({**ROW, "file": "/etc/passwd"}, "file: there is no such field."),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
         "training would drop the row: tool call arguments that are not JSON"),
        ({**ROW, "tools": TOOLS * 2}, "two tools are named 'add'"),
    ],
)  # fmt: skip
def test_collect_refuses_what_training_would_not_read(
    port: int, file: Path, body: dict[str, Any], said: str
) -> None:
    before = file.read_bytes()
    reply = collect(port, body)
    assert reply.status == 400
    assert said in reply.json()["error"]["message"]
    assert file.read_bytes() == before


def test_collect_asks_as_much_of_a_request_as_other_routes(port: int, file: Path) -> None:
    before = file.read_bytes()
    assert collect(port, ROW, key="open").status == 401
    assert collect(port, ROW, ("Origin", "http://evil.example")).status == 403
    assert collect(port, ROW, ("Host", "evil.example")).status == 403
    assert collect(port, ROW, ("Content-Type", "text/plain")).status == 415
    assert collect(port, b'{"messages": [').status == 400
    assert collect(port, {"messages": [{**USER, "content": "x" * 2**21}, ANSWER]}).status == 413
    assert file.read_bytes() == before


def test_collect_is_off_by_default(product: int) -> None:
    reply = ask(product, "/collect", ROW)
    assert (reply.status, reply.code) == (404, "not_collecting")
    assert "--collect rows.jsonl" in reply.json()["error"]["message"]
    assert ask(product, "/version").json()["collects_rows"] is False


def test_version_says_that_rows_are_collected(port: int) -> None:
    assert ask(port, "/version", None, ("Authorization", "Bearer sesame")).json()["collects_rows"] is True


def test_collect_tells_that_the_disk_failed(port: int, file: Path) -> None:
    before = file.read_bytes()
    file.chmod(0o444)
    moved = file.rename(file.with_suffix(".kept"))
    file.mkdir()
    try:
        reply = collect(port, ROW)
    finally:
        file.rmdir()
        moved.rename(file).chmod(0o644)
    assert (reply.status, reply.code) == (500, "row_not_saved")
    assert "Is a directory" in reply.json()["error"]["message"]
    assert str(file.parent) not in reply.json()["error"]["message"]
    assert file.read_bytes() == before


def test_append_line_keeps_lines_whole_among_several_writers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps({"number": number, "text": "x" * 5000}) + "\n" for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(append_line, path, line.encode()) for line in lines]:
            done.result()
    assert sorted(path.read_text().splitlines(keepends=True)) == sorted(lines)


def test_append_line_ends_a_line_that_an_editor_left_open(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}')
    append_line(path, b'{"b": 2}\n')
    assert path.read_bytes() == b'{"a": 1}\n{"b": 2}\n'


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of a file's size")
def test_append_line_leaves_the_file_as_it_was_if_only_a_part_is_written(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 90 + b"\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            append_line(path, b"y" * 50 + b"\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"x" * 90 + b"\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_new_file_has_an_ordinary_mode(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    before = os.umask(0o027)
    try:
        check_collect_file(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("content", [b"", b"\n", b'{"messages": []}\n', b'{"id": 1, "messages": []}'])
def test_check_collect_file_takes_rows_of_the_format(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    check_collect_file(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "content", [b"instruction,output\n", b'{"prompt": "a", "completion": "b"}\n', b"\xff\xfe"]
)
def test_check_collect_file_refuses_rows_of_another_format(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="its first line is no row of the format messages"):
        check_collect_file(path)


def test_check_collect_file_refuses_a_folder(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"is no regular file\. Choose another --collect\."):
        check_collect_file(tmp_path / "rows.jsonl")


def test_serve_tells_a_wrong_file_before_it_loads_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "nothing", "--collect", "rows.csv"]) == 2
    assert "--collect is 'rows.csv': expected a file that ends with .jsonl." in capsys.readouterr().err
    (tmp_path / "rows.jsonl").mkdir()
    assert main(["serve", "nothing", "--port", "0", "--collect", str(tmp_path / "rows.jsonl")]) == 2
    assert "is no regular file" in capsys.readouterr().err
