"""A model that says exactly what it was trained to say matches, whatever its template writes around the answer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from chat_templates import KINDS, chat_of
from handspun.config import DataConfig
from handspun.data.rows import Row
from handspun.decoding.generate import generate, stream
from handspun.decoding.results import GenerationChunk
from handspun.display import captured_log
from handspun.evaluation.answers import is_exact_match, question_of, trained_answer_ids
from handspun.evaluation.score import RowScore, score
from handspun.models.load import ChatModel
from tiny import tiny_model

CHATS = {kind: chat_of(kind) for kind in KINDS}
ANSWERS = [
    "6",
    " 6\n",
    "two\n\nlines  and spaces ",
    "stop\nUser: no",
    "a <|im_end|> b </s> c",
    "<think>\nhm\n</think>\n\n6",
    "caf\u00e9 \U0001f44d\U0001f3fd \u4f60\u597d",
    "\u200b",
]


def follows(wanted: dict[tuple[int, ...], list[int]]) -> Callable[[Tensor, Any], Tensor]:
    """A processor that makes each prompt's answer come out as wanted: a perfect model."""

    def follow(logits: Tensor, token_ids: Any) -> Tensor:
        ids = [int(id) for id in token_ids]
        [(prompt, answer)] = [pair for pair in wanted.items() if tuple(ids[: len(pair[0])]) == pair[0]]
        chosen = torch.full_like(logits, -1e9)
        chosen[answer[len(ids) - len(prompt)]] = 0.0
        return chosen

    return follow


def perfect_score(chat: ChatModel, answer: str) -> RowScore:
    """The score of a row that a perfect model answers."""
    row = Row("rows.jsonl", 1, {"prompt": "3 and 3?", "completion": answer})
    question = question_of(row, {"rows.jsonl": "prompt-completion"}, system_prompt=None, chat=chat)
    messages = [*question.messages, {"role": "assistant", "content": str(question.expected)}]
    ids = trained_answer_ids(chat, messages)
    prompt = tuple(chat.template.encode_prompt(question.messages))
    [made] = generate(
        chat, [question.messages], processors=[follows({prompt: ids})], max_new_tokens=len(ids), stop_strings=(),
    )  # fmt: skip
    assert made.token_ids == ids
    assert question.trained_tokens == len(ids)
    return RowScore(question, None, 0, made)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_answer_is_an_exact_match(kind: str, answer: str) -> None:
    assert perfect_score(CHATS[kind], answer).exact_match is True


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip),
    st.sampled_from(sorted(KINDS)),
)
def test_a_perfect_answer_of_any_text_is_an_exact_match(answer: str, kind: str) -> None:
    assert perfect_score(CHATS[kind], answer).exact_match is True


def test_a_tokenizer_that_changes_text_has_its_own_answer() -> None:
    pieces = {piece: id for id, piece in enumerate(["<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz36?."])}
    backend = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("</s>", "<s>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", chat_template=KINDS["plain roles"].template
    )
    chat = ChatModel(tiny_model("qwen2", vocab_size=40), tokenizer, "lower case")
    found = perfect_score(chat, "It Is \u4f60 Six.")
    assert found.answer is not None
    assert found.answer.text != "It Is \u4f60 Six."
    assert found.exact_match is True


@pytest.mark.parametrize("kind", KINDS)
def test_score_of_a_perfect_model_is_all_matches(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = CHATS[kind]
    rows = [{"prompt": f"{i}?", "completion": answer} for i, answer in enumerate(ANSWERS[:4])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = {}
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        ids = trained_answer_ids(chat, [*asked, {"role": "assistant", "content": row["completion"].strip()}])
        wanted[tuple(chat.template.encode_prompt(asked))] = ids

    def as_a_perfect_model(*arguments: Any, **options: Any) -> Iterator[GenerationChunk]:
        return stream(*arguments, processors=[follows(wanted)], **options)

    monkeypatch.setattr("handspun.evaluation.answers.stream", as_a_perfect_model)
    config = DataConfig(data=str(tmp_path / "rows.jsonl"), cache_examples=False)
    scores = score(chat, config, ask=True, max_new_tokens=80)
    assert [row.exact_match for row in scores.rows] == [True] * 4


def test_answers_longer_than_max_new_tokens_are_said(tmp_path: Path) -> None:
    rows = [{"prompt": "a?", "completion": "b"}, {"prompt": "c?", "completion": "a long answer, of many tokens"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(data=str(tmp_path / "rows.jsonl"), cache_examples=False)
    with captured_log() as notices:
        score(CHATS["plain roles"], config, ask=True, max_new_tokens=3)
    assert any("1 of 2 rows expect more than 3 tokens" in text for text in notices)


@pytest.mark.parametrize(
    ("answer", "expected", "is_match"),
    [
        ("<think>\n\n</think>\n\n6", "6", True),
        ("<think>three and three</think>6", "6", True),
        ("three and three</think>\n6", "6", True),
        ("<think>6", "6", False),
        ("<think>6</think>7", "6", False),
        ("<think>a</think>6", "<think>b</think>6", False),
        ("<think>a</think> 6", "<think>a</think>\n6", True),
    ],
)
def test_what_is_thought_does_not_count(answer: str, expected: str, is_match: bool) -> None:
    assert is_exact_match(answer, expected) is is_match
