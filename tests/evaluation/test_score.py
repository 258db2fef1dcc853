"""Scores of a model: means over tokens, whatever the batch; answers that are the rows' own."""

import json
from pathlib import Path

import pytest
import torch

from handspun.config import DataConfig
from handspun.data.dataset import load_splits
from handspun.data.examples import Example
from handspun.data.messages import Message
from handspun.decoding.engines.choose import make_engine
from handspun.decoding.generate import generate
from handspun.decoding.results import GenerationResult
from handspun.evaluation.answers import Question, is_exact_match
from handspun.evaluation.losses import _answer_loss, row_losses
from handspun.evaluation.score import RowScore, Scores, score
from handspun.models.fused import fused_weights
from handspun.models.load import ChatModel
from tiny import tiny_model, tiny_tokenizer

PROMPTS = ["Give me a joke.", "List three colors.", "Tell me the sum.", "Hi.", "Rewrite this sentence. " * 4]


@pytest.fixture(scope="module")
def chat() -> ChatModel:
    """Peaked, so that no two tokens come out nearly equal."""
    return ChatModel(tiny_model("qwen2"), tiny_tokenizer(), "tiny")


@pytest.fixture(scope="module")
def rows(chat: ChatModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven rows; the outputs of the second and the fifth are the model's own answers, with other white space."""
    file = tmp_path_factory.mktemp("rows") / "held_out.jsonl"
    own = [result.text for result in generate(chat, PROMPTS, max_new_tokens=6)]
    outputs = ["No.", f" {own[1]}\n", "Red, green.", "The answer is that.", own[4], "Hi.", "A longer answer. " * 9]
    records = [{"prompt": p, "completion": c} for p, c in zip([*PROMPTS, "What?", "Why?"], outputs, strict=True)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def scores_of(chat: ChatModel, file: Path, **options: object) -> Scores:
    return score(chat, DataConfig(data=str(file)), **options)  # type: ignore[arg-type]


def question(row: int, expected: str = "") -> Question:
    messages: list[Message] = [{"role": "user", "content": "?"}]
    return Question("rows.csv", row, messages, expected)


def test_the_loss_is_a_mean_over_tokens_not_over_rows() -> None:
    """One token of loss 2 and three of 1: (2 + 3) / 4, where the mean of the rows' means would be 1.5."""
    rows = [RowScore(question(1), 2.0, 1, None), RowScore(question(2), 3.0, 3, None)]
    scores = Scores("m", "rows.csv", "", 512, rows, None)
    assert scores.loss == 1.25
    assert scores.perplexity == pytest.approx(3.4903, abs=1e-4)
    assert [row.loss for row in rows] == [2.0, 1.0]


def test_scores_do_not_depend_on_the_batch_size(chat: ChatModel, rows: Path) -> None:
    found = {size: scores_of(chat, rows, batch_size=size, ask=True, max_new_tokens=6) for size in (1, 3, 8)}
    alone = found[1]
    assert alone.loss is not None
    for scores in found.values():
        assert scores.loss == pytest.approx(alone.loss, rel=1e-6)
        assert scores.tokens == alone.tokens
        for row, expected in zip(scores.rows, alone.rows, strict=True):
            assert row.loss == pytest.approx(expected.loss, rel=1e-6)
        assert [row.question.row for row in scores.rows if row.exact_match] == [2, 5]


def test_the_loss_is_transformers_own(chat: ChatModel, rows: Path) -> None:
    examples = load_splits(DataConfig(data=str(rows)), chat.template, max_length=512)[0].examples
    scores = scores_of(chat, rows)
    assert len(examples) == 7
    for example, row in zip(examples, scores.rows, strict=True):
        labels = [
            id if is_target else -100 for id, is_target in zip(example.input_ids, example.loss_mask, strict=True)
        ]
        with torch.no_grad():
            loss = chat.model(torch.tensor([example.input_ids]), labels=torch.tensor([labels])).loss
        assert row.loss == pytest.approx(loss.item(), rel=1e-5)
        assert row.tokens == example.learned_tokens


def test_the_engine_that_decodes_gives_the_same_losses(chat: ChatModel, rows: Path) -> None:
    """With logits for two positions at a time; int8 comes this way, and stays near."""
    examples = load_splits(DataConfig(data=str(rows)), chat.template, max_length=512)[0].examples
    expected = row_losses(chat, examples, batch_size=8)
    assert len(examples) == len(expected) == 7
    for example in examples:
        loss, tokens = expected[example.file, example.row]
        assert _answer_loss(make_engine(chat), example, 2) == pytest.approx(loss, rel=1e-5)
        assert tokens == example.learned_tokens


def test_int8_weights_are_scored_as_they_decode(chat: ChatModel, rows: Path) -> None:
    model = tiny_model("qwen2")  # which is emptied
    int8 = ChatModel(model, chat.tokenizer, "tiny", fused_weights(model, int8=True))
    found = {size: scores_of(int8, rows, batch_size=size).loss for size in (1, 8)}
    assert found[1] == found[8]
    assert found[1] == pytest.approx(scores_of(chat, rows).loss, rel=0.02)
    assert found[1] != scores_of(chat, rows).loss


def test_white_space_is_all_that_an_exact_match_overlooks() -> None:
    assert is_exact_match(" 1. Red\n\n2. Green ", "1. Red 2. Green")
    assert not is_exact_match("red", "Red")
    assert not is_exact_match("Red.", "Red")
    assert not is_exact_match("Red and green", "Red")
    assert not is_exact_match("Red", "Red and green")
    assert not is_exact_match("", "Red")
    assert is_exact_match("", " \n")


def test_rows_with_tools_have_a_loss_and_are_not_asked(chat: ChatModel, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    records = [{"messages": turns}, {"messages": turns, "tools": tools}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    scores = scores_of(chat, file, ask=True, max_new_tokens=3)
    assert all(row.tokens for row in scores.rows)
    assert [row.answer is not None for row in scores.rows] == [True, False]
    assert [row.exact_match is not None for row in scores.rows] == [True, False]


def test_dropped_rows_are_not_scored(chat: ChatModel, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("instruction,input,output\nSay hi.,,Hi.\nSay nothing.,,\nSay yes.,,Yes.\n")
    scores = scores_of(chat, file, ask=True, max_new_tokens=3)
    assert [row.question.row for row in scores.rows] == [1, 3]
    assert len(scores.account.dropped) == 1


def test_the_system_prompt_is_in_what_is_scored_and_in_what_is_asked(chat: ChatModel, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("instruction,output\nSay hi.,Hi.\n", encoding="utf-8")
    losses = []
    for given in (None, "Be brief."):
        config = DataConfig(data=str(file), system_prompt=given)
        (row,) = score(chat, config, ask=True, max_new_tokens=5).rows
        system = [{"role": "system", "content": given}] if given else []
        prompt = chat.template.encode_prompt([*system, {"role": "user", "content": "Say hi."}])
        assert row.answer is not None
        assert row.answer.prompt_token_ids == prompt
        assert len(row.answer.token_ids) <= 5
        losses.append(row.loss)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_the_losses_of_a_rows_examples_are_added_up(chat: ChatModel) -> None:
    """Two examples of one row, as where a template renders a turn differently once it is history."""
    one, other = ([5, 6, 7, 8], [False, False, True, True]), ([9, 10, 11], [False, True, True])
    parts = [Example(*part, "a.csv", 3) for part in (one, other)]
    alone = [row_losses(chat, [part], batch_size=1)["a.csv", 3] for part in parts]
    both = row_losses(chat, parts, batch_size=2)
    assert both.keys() == {("a.csv", 3)}
    assert both["a.csv", 3] == (pytest.approx(alone[0][0] + alone[1][0], rel=1e-6), 4)


def test_an_answer_is_compared_with_what_the_row_says() -> None:
    answer = GenerationResult(text="Hi there", token_ids=[1], prompt_token_ids=[], finish_reason="eos")
    assert RowScore(question(1, "Hi  there"), None, 0, answer).exact_match is True
    assert RowScore(question(1, "Hello"), None, 0, answer).exact_match is False
    assert RowScore(question(1, "Hi there"), None, 0, None).exact_match is None
