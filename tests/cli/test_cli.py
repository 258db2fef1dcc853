"""The command line as a person meets it: what mistakes are answered with; `--config` and help are true."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import fail
from handspun import __version__
from handspun.cli import main
from handspun.cli.app import app
from handspun.cli.entry import ALIASES
from handspun.cli.views.help import COMMANDS

GOOD = "instruction,input,output\nSay hi.,,Hi.\nSay yes.,,Yes.\n"


def train_on(capsys: pytest.CaptureFixture[str], model: Path, data: Path, content: str | bytes, *more: str) -> str:
    data.write_bytes(content if isinstance(content, bytes) else content.encode())
    output = data.with_name("output")
    return fail(capsys, "train", "--model", str(model), "--data", str(data), "--output-dir", str(output), *more)


@pytest.mark.parametrize("command", ["train", "preflight", "preview", "eval"])
def test_data_that_is_not_there_is_named_before_a_model_is_looked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    message = fail(capsys, command, "--model", "nobody/no-such-model", "--data", "trian.csv")
    assert message.startswith("error: trian.csv: there is no such file or folder.")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.csv", "", ["train.csv", "empty"]),
        ("train.csv", "instruction,output\n", ["train.csv", "no row"]),
        ("train.csv", "instructoin,output\na,b\n", ["instructoin", "instruction"]),
        ("train.csv", "instruction,output\na,b\nc,d,e\n", ["train.csv, line 3"]),
        ("train.csv", b"instruction,output\na,caf\xe9\n", ["train.csv", "UTF-8", "line 2"]),
        ("train.csv", "instruction,output\na,\nb, \n", ["none of its 2 rows", "empty output: 2"]),
        ("train.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": \n', ["train.jsonl, line 2"]),
        ("train.json", '[{"instruction": "a", "output": 3}]', ["train.json", "row 1", "output"]),
        ("train.txt", "hello", ["train.txt", ".csv"]),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else None,
)
def test_data_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str],
    tiny_folder: Path,
    tmp_path: Path,
    name: str,
    content: str | bytes,
    expected: list[str],
) -> None:
    message = train_on(capsys, tiny_folder, tmp_path / name, content)
    for part in expected:
        assert part in message


def test_a_mistake_in_a_config_file_is_said_without_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {tmp_path / 'nothing'}\noutput_dir: {tmp_path / 'output'}\n")
    for options, traces in (([], False), (["--traceback"], True)):
        assert main(["train", "--config", str(tmp_path / "run.yaml"), *options]) == 2
        assert ("Traceback" in capsys.readouterr().err) == traces


def test_a_misspelt_file_is_told_its_neighbor(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    message = fail(capsys, "preview", "--model", str(tiny_folder), "--data", str(tmp_path / "trian.csv"))
    assert "train.csv" in message


def test_a_misspelt_option_is_told_its_neighbor(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch-size" in fail(capsys, "train", "--bach-size", "4")


def test_a_value_of_the_wrong_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch-size" in fail(capsys, "train", "--batch-size", "many")


def test_a_preview_has_the_same_limits_as_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--max-length is 1: expected at least 2." in fail(capsys, "preview", "--max-length", "1")


def test_a_misspelt_command(capsys: pytest.CaptureFixture[str]) -> None:
    message = fail(capsys, "trian")
    assert "train" in message
    assert "handspun --help" in message


def test_options_that_exclude_each_other(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    message = fail(capsys, "generate", "--model", str(tiny_folder), "--num-beams", "4", "--top-p", "0.9", "Hi")
    assert "does not sample" in message


def test_a_model_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such folder" in fail(capsys, "generate", "--model", str(tmp_path / "nothing"), "Hi")


def test_a_prompt_that_is_missing(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("  \n"))
    assert "there is no prompt" in fail(capsys, "generate", "--model", str(tiny_folder))


def test_traceback_is_shown_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", "--traceback", "--model", str(tmp_path / "nothing"), "Hi"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_config_files_give_defaults_and_options_win(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text(GOOD)
    (tmp_path / "run.yaml").write_text(
        f"model: {tiny_folder}\ndata: {tmp_path / 'train.csv'}\noutput_dir: {tmp_path / 'output'}\n"
        "num_epochs: 2\nbatch_size: 1\nlora: false\nlearning_rate: 1e-3\nsample_answers: false\n"
    )
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--num-epochs", "1"]) == 0
    record = json.loads((tmp_path / "output" / "run.json").read_text())["config"]
    assert (record["num_epochs"], record["batch_size"], record["learning_rate"]) == (1, 1, 1e-3)
    printed = capsys.readouterr().out
    assert "finished in" in printed
    assert f"report: {tmp_path / 'output' / 'report.html'}" in printed


def test_config_files_hold_mappings_with_numbers_as_keys(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("logit_bias: {5: -3.5}\njson_schema: {enum: [{a: 7}]}\n")
    assert main(["generate", "--model", str(tiny_folder), "--config", str(tmp_path / "run.yaml"), "Hi"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 7}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("bach_size: 4\n", "bach-size"),
        ("batch_size: many\n", "many"),
        ("- 1\n", "one option per line"),
        ("a: [", "YAML"),
    ],
)
def test_config_files_that_cannot_be_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, expected: str
) -> None:
    (tmp_path / "run.yaml").write_text(content)
    assert expected in fail(capsys, "train", "--config", str(tmp_path / "run.yaml"))


def test_preview_marks_what_is_learned_and_accounts_for_every_row(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "train.csv").write_text(GOOD + "Say nothing.,,\n")
    assert main(["preview", "--model", str(tiny_folder), "--data", str(tmp_path / "train.csv"), "--plain"]) == 0
    printed = capsys.readouterr().out
    assert "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n⟦Hi.<|im_end|>⟧" in printed
    assert "rows: 3 read, 2 kept, 1 dropped" in printed
    assert "empty output: 1 (row 3)" in printed


def test_generate_prints_text_or_json(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    options = ["--model", str(tiny_folder), "--max-new-tokens", "3"]
    assert main(["generate", *options, "--json", "--logprobs", "Hi", "Yes"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in records] == ["Hi", "Yes"]
    assert [len(record["logprobs"]) for record in records] == [len(record["token_ids"]) for record in records]
    assert main(["generate", *options, "Hi", "Yes"]) == 0
    assert "> Hi\n" in capsys.readouterr().out


def test_a_wrong_value_does_not_hide_an_unknown_option(capsys: pytest.CaptureFixture[str]) -> None:
    printed = fail(capsys, "train", "--base-learning-rate", "1e-4", "--epochs", "1.5")
    assert "--num-epochs is '1.5': expected a whole number" in printed
    assert "there is no option --base-learning-rate" in printed
    assert "--learning-rate" in printed


def test_chat_remembers_and_ends(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = io.StringIO("Hi\nAgain\n/reset\n/quit\nnot read\n")
    monkeypatch.setattr("sys.stdin", lines)
    assert main(["chat", "--model", str(tiny_folder), "--max-new-tokens", "3"]) == 0
    assert lines.read() == "not read\n"
    assert "you:" not in capsys.readouterr().out  # into a pipe go answers alone


def test_chat_streams_the_best_answer_of_a_beam_search(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n"))
    options = ["--num-beams", "4", "--num-return-sequences", "2", "--choice", "yes", "--choice", "yesterday"]
    assert main(["chat", "--model", str(tiny_folder), *options]) == 0
    assert re.search("^(yes|yesterday)$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the processor time of a child")
def test_help_answers_at_once() -> None:
    """By processor time, which other work on the machine does not change much."""
    assert min(processor_seconds([sys.executable, "-m", "handspun", "--help"]) for _ in range(3)) < 0.6


def processor_seconds(command: list[str]) -> float:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize(
    "command",
    [
        "train",
        "preview",
        "generate",
        "chat",
        "demo",
        "verify",
        "verify-resume",
        "eval",
        "compare",
        "export",
    ],
)
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    printed = capsys.readouterr().out
    assert "Usage: handspun" in printed
    assert "[default: " in printed


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_answers_of_a_form_can_be_had_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path
) -> None:
    command = ["generate", "--model", str(tiny_folder), "Hi", "--max-new-tokens", "400"]
    assert main([*command, "--choice", "yes", "--choice", "no"]) == 0
    assert capsys.readouterr().out in ("yes\n", "no\n")
    assert main([*command, "--json-schema", '{"enum": [{"a": 7}]}']) == 0
    assert json.loads(capsys.readouterr().out) == {"a": 7}
    assert main([*command, "--regex", "(ab){3}", "--logit-bias.5=-3.5", "--bad-words", "joke"]) == 0
    assert capsys.readouterr().out == "ababab\n"
    assert "unclosed group" in fail(capsys, *command, "--regex", "a(b")


def test_tokens_are_explained_in_a_table_or_in_json(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    command = ["generate", "--model", str(tiny_folder), "Hi", "--choice", "yes", "--explain"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("yes\n")
    assert "runner-up" in printed
    assert "choice -3" in printed
    assert main([*command, "--json"]) == 0
    [*_, last] = json.loads(capsys.readouterr().out)["explanation"]
    assert (last["left"], last["chosen"]["text"]) == (2, "<|im_end|>")  # of the two eos
    assert [effect["processor"] for effect in last["effects"]] == ["choice"]


def test_a_beam_search_is_shown_as_a_tree(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    command = ["generate", "--model", str(tiny_folder), "Hi", "--choice", "yes", "--choice", "no"]
    assert main([*command, "--num-beams", "2", "--show-tree"]) == 0
    assert "answer 1" in capsys.readouterr().out


FOUR_PROMPTS = (
    "\ufeffFirst prompt\r\nSecond\u2028still second\rThird\x0cstill third\n \r\n\r\nFourth\x85still fourth\r\n"
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_line_of_a_prompts_file_ends_where_a_line_ends(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path, encoding: str
) -> None:
    (tmp_path / "prompts.txt").write_bytes(FOUR_PROMPTS.encode(encoding))
    command = ["generate", "--model", str(tiny_folder), "--max-new-tokens", "1", "--json"]
    assert main([*command, "--prompts-file", str(tmp_path / "prompts.txt")]) == 0
    answers = capsys.readouterr().out.splitlines()  # which ends lines at U+2028 and NEL too
    assert [json.loads(line)["prompt"] for line in answers] == [
        "First prompt",
        "Second\u2028still second",
        "Third\x0cstill third",
        "Fourth\x85still fourth",
    ]


def test_a_prompt_on_standard_input_is_read_as_a_file_is(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO("Wörter\r\n\u2028und mehr\r\n".encode("utf-16")), encoding="ascii")
    monkeypatch.setattr("sys.stdin", typed)
    assert main(["generate", "--model", str(tiny_folder), "--max-new-tokens", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "Wörter\n\u2028und mehr"


@pytest.mark.parametrize(
    ("prompts", "text", "expected"),
    [
        (["Summarize this."], "a mail\nof two lines\n", ["Summarize this.\n\na mail\nof two lines"]),
        (["Hi"], "\n", ["Hi"]),
        (["Hi", "Ho"], "not read", ["Hi", "Ho"]),
    ],
)
def test_a_redirected_file_is_added_to_a_single_prompt(
    prompts: list[str],
    text: str,
    expected: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "mail.txt").write_text(text)
    with (tmp_path / "mail.txt").open(encoding="utf-8") as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["generate", *prompts, "-m", str(tiny_folder), "--max-new-tokens", "1", "--json"]) == 0
    printed = capsys.readouterr()
    assert [json.loads(line)["prompt"] for line in printed.out.splitlines()] == expected
    assert ("standard input is added" in printed.err) == (len(prompts) == 1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_schemas_and_configs_may_have_a_byte_order_mark(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path, encoding: str
) -> None:
    (tmp_path / "schema.json").write_bytes('{"enum": [7]}\r\n'.encode(encoding))
    config = f"model: {tiny_folder}\r\njson_schema: {tmp_path / 'schema.json'}\r\nmax_new_tokens: 4\r\n"
    (tmp_path / "run.yaml").write_bytes(config.encode(encoding))
    assert main(["generate", "--config", str(tmp_path / "run.yaml"), "Hi"]) == 0
    assert capsys.readouterr().out == "7\n"


@pytest.mark.parametrize("option", ["--prompts-file", "--json-schema", "--config"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "a: b\ncafé: x".encode("latin-1"),
            ", line 2: the byte 0xE9 at character 4 of the line (offset 8) is not UTF-8",
        ),
        ("a: b\n".encode("utf-16-le"), ", line 1: there is a NUL character in the text, at character 2"),
        (b"\x1f\x8b", ": this is a gzip file"),
    ],
    ids=["Latin-1", "UTF-16 without a mark", "gzip"],
)
def test_text_files_that_cannot_be_read_are_named_with_the_place_and_what_to_do(
    capsys: pytest.CaptureFixture[str],
    tiny_folder: Path,
    tmp_path: Path,
    option: str,
    content: bytes,
    expected: str,
) -> None:
    (tmp_path / "file").write_bytes(content)
    message = fail(capsys, "generate", "--model", str(tiny_folder), option, str(tmp_path / "file"), "Hi")
    assert f"{option} {tmp_path / 'file'}{expected}" in message


def test_short_names_stand_for_options(capsys: pytest.CaptureFixture[str], tiny_folder: Path) -> None:
    """After `--` they are prompts like any other."""
    options = ["-m", str(tiny_folder), "--batch=1", "--max-new-tokens", "2", "--json"]
    assert main(["generate", *options, "-p", "Hi", "--", "--lr"]) == 0
    prompts = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
    assert prompts == ["Hi", "--lr"]
    assert main(["train", "-m", str(tiny_folder), "--lr", "-1", "--epochs", "0", "--rank", "0"]) == 2
    printed = capsys.readouterr().err
    assert "--learning-rate is -1" in printed
    assert "--num-epochs is 0" in printed
    assert "--lora-rank is 0" in printed


def test_aliases_are_no_options_of_their_own() -> None:
    arguments = [argument for command in COMMANDS for argument in app[command].assemble_argument_collection()]
    known = {name for argument in arguments for name in argument.names}
    assert not set(ALIASES) & known
    assert set(ALIASES.values()) <= known
