"""Plain text: every token is trained on, long documents in pieces, and nothing else in the file."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate, TokenizedExample
from handspun.data.dataset import load_splits
from handspun.data.documents import SPLIT, end_of_text, lay_out_document, pieces
from handspun.data.examples import build_examples
from handspun.data.formats import recognize_format
from handspun.data.rows import Row, read_rows
from handspun.errors import DataError
from tiny import tiny_tokenizer

TEMPLATE = ChatTemplate(tiny_tokenizer())


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def written(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return written


def ids_of(text: str) -> list[int]:
    return list(TEMPLATE.tokenizer(text)["input_ids"])


def test_every_token_is_trained_on_and_the_eos_ends_the_document() -> None:
    eos, token = end_of_text(TEMPLATE)
    assert (eos, token) == (TEMPLATE.tokenizer.eos_token_id, TEMPLATE.tokenizer.eos_token)
    examples, account = build_examples([Row("a.csv", 1, {"text": "Hello, you."})], TEMPLATE, max_length=99)
    (only,) = examples
    assert only.input_ids == [*ids_of("Hello, you."), eos]
    assert only.loss_mask == [False] + [True] * (len(ids_of("Hello, you.")))
    assert account.formats == {"a.csv": "text"}


def test_a_token_of_turns_inside_of_a_text_is_plain_text() -> None:
    (tokens,) = TEMPLATE.tokenize([lay_out_document("a <|im_end|> b", TEMPLATE)])
    ending = TEMPLATE.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ending not in tokens.input_ids[:-1]
    assert TEMPLATE.tokenizer.decode(tokens.input_ids[:-1]) == "a <|im_end|> b"


def test_a_tokenizer_that_begins_texts_with_bos_begins_documents_with_it() -> None:
    tokenizer: PreTrainedTokenizerBase = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bos)]
    )
    template = ChatTemplate(tokenizer)
    examples, _ = build_examples([Row("a.csv", 1, {"text": "Hi you"})], template, max_length=99)
    (only,) = examples
    assert only.input_ids[0] == bos
    assert only.input_ids.count(bos) == 1
    assert only.loss_mask == [False] + [True] * (len(only) - 1)


@pytest.mark.parametrize(
    ("length", "found"),
    [
        (1, [[0]]),
        (2, [[0, 1]]),
        (4, [[0, 1, 2, 3]]),
        (5, [[0, 1, 2, 3], [3, 4]]),
        (7, [[0, 1, 2, 3], [3, 4, 5, 6]]),
        (8, [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]),
    ],
)
def test_pieces_overlap_by_the_token_that_is_not_trained_on(length: int, found: list[list[int]]) -> None:
    document = TokenizedExample(list(range(length)), [True] * length)
    assert [piece.input_ids for piece in pieces(document, 4)] == found


def test_a_long_document_is_split_and_none_of_its_tokens_is_lost() -> None:
    text = "One two three four five six seven eight nine ten. " * 5
    examples, account = build_examples([Row("a.csv", 7, {"text": text})], TEMPLATE, max_length=16)
    whole = [*ids_of(text), TEMPLATE.tokenizer.eos_token_id]
    trained = [id for e in examples for id, is_target in zip(e.input_ids, e.loss_mask, strict=True) if is_target]
    assert trained == whole[1:]
    assert len(examples) > 2
    assert max(len(example) for example in examples) <= 16
    assert [(note.row, note.text) for note in account.notes] == [(7, SPLIT)]
    assert not account.truncated


def test_what_is_empty_is_dropped_and_said() -> None:
    rows = [Row("a.csv", 1, {"text": "Hello"}), Row("a.csv", 2, {"text": " "})]
    _, account = build_examples(rows, TEMPLATE, max_length=99)
    assert [(note.row, note.text) for note in account.dropped] == [(2, "empty text")]


def test_rows_of_both_kinds_in_one_file_are_an_error_that_says_what_to_do(
    write: Callable[[str, str], str],
) -> None:
    rows = read_rows(write("mixed.jsonl", '{"text": "a"}\n{"prompt": "b", "completion": "c"}\n'))
    with pytest.raises(
        DataError, match=r"mixed\.jsonl: some rows are plain text .* Put them into two files, and g"
    ):
        build_examples(rows, TEMPLATE, max_length=99)


def test_a_conversation_with_a_column_text_beside_it_is_a_conversation() -> None:
    assert recognize_format(["instruction", "input", "output", "text"], "a.csv") == "alpaca"
    assert recognize_format(["id", "text", "source"], "a.csv") == "text"


@pytest.mark.parametrize("label", ["label", "Category", "summary", "answer"])
def test_a_text_with_a_label_beside_it_is_not_guessed(label: str) -> None:
    with pytest.raises(DataError, match=rf"--columns prompt=text,completion={label}; .* --data-format text"):
        recognize_format(["text", label], "a.csv")


def test_texts_and_conversations_are_trained_together_from_two_files(write: Callable[[str, str], str]) -> None:
    sources = [write("notes.txt.csv", "text\nHello there\n"), write("chats.csv", "question,answer\nWho?,Me.\n")]
    made, _ = load_splits(DataConfig(data=tuple(sources)), TEMPLATE, max_length=99)
    assert made.account.formats == {sources[0]: "text", sources[1]: "prompt-completion"}
    token = TEMPLATE.tokenizer.eos_token
    assert made.account.file_notes[sources[0]] == [
        f"plain text: every token is trained on, and {token} ends each row"
    ]
    assert len(made.examples) == 2
