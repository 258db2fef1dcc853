"""Ids beyond the embedding are one error before anything is computed; a padded embedding is fine."""

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

import handspun
from handspun.cli import main
from handspun.errors import ModelError
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

ADDED = ("<item>", "</item>")


def folder_with(rows: int, folder: Path) -> Path:
    """A model whose tokenizer has two tokens more than tiny_tokenizer, and an embedding of so many rows."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tiny_model("qwen2", vocab_size=rows, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_with(len(tiny_tokenizer()), tmp_path_factory.mktemp("short") / "model")


def rows_file(folder: Path, *answers: str) -> str:
    rows = [{"prompt": f"Say {i}", "completion": answer} for i, answer in enumerate(answers)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize("command", ["train", "preflight", "preview", "eval"])
def test_every_command_that_reads_rows_names_the_tokens_and_both_sizes(
    command: str, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows_file(tmp_path, "yes", "<item>one</item>", "<item>two")
    options = {
        "train": ["--output-dir", str(tmp_path / "out")],
        "preflight": ["--output-dir", str(tmp_path / "out")],
    }
    arguments = [command, "--model", str(short), "--data", data, "--no-cache-examples", *options.get(command, [])]
    if command in options:
        arguments += ["--dtype", "float32"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    tokens = len(tiny_tokenizer())
    assert f"the embedding has {tokens} rows and the tokenizer {tokens + 2} tokens" in error
    assert f"'<item>' (id {tokens}), '</item>' (id {tokens + 1}) have no row" in error
    assert "2 of 3 examples" in error
    assert "row 2" in error
    assert "resize_token_embeddings" in error
    assert not list((tmp_path / "out").glob("checkpoint*"))


def test_generate_refuses_a_prompt_that_holds_such_a_token(short: Path) -> None:
    model = handspun.load(str(short))
    conversation = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<item>one</item>"},
        {"role": "user", "content": "more"},
    ]
    with pytest.raises(ModelError, match=r"'<item>' \(id \d+\).*prompt 1"):
        handspun.generate(model, [conversation], max_new_tokens=2)
    with pytest.raises(ModelError, match="prompt 2"):
        handspun.generate(model, ["Hi", "<item>"], chat=False, max_new_tokens=2)


def test_tokens_without_a_row_that_nothing_uses_are_no_error(short: Path, tmp_path: Path) -> None:
    data = rows_file(tmp_path, "yes", "no")
    assert main(["preview", "--model", str(short), "--data", data, "--no-cache-examples"]) == 0
    model = handspun.load(str(short))
    assert len(handspun.generate(model, "Hi", max_new_tokens=2)) == 1


def test_an_embedding_with_more_rows_than_tokens_is_fine(tmp_path: Path) -> None:
    padded = folder_with(384, tmp_path / "model")
    data = rows_file(tmp_path, "<item>one</item>")
    assert main(["preview", "--model", str(padded), "--data", data, "--no-cache-examples"]) == 0


def test_generate_names_the_token_for_a_model_in_memory() -> None:
    model = ChatModel(tiny_model("qwen2", vocab_size=20), tiny_tokenizer(), "few rows")
    with pytest.raises(ModelError, match="the embedding has 20 rows"):
        handspun.generate(model, "Hi", max_new_tokens=1)
