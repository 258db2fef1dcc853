"""Rows of any text become examples: an answer is trained on whole, with its end and nothing else, and
the ids say what the row said."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import handspun
from handspun.data.chat_template import ChatTemplate
from handspun.data.examples import build_examples
from handspun.data.rows import Row
from handspun.display import captured_log
from handspun.errors import DataError
from handspun.models.load import ChatModel
from tiny import tiny_tokenizer

TINY = ChatTemplate(tiny_tokenizer())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "</think>"]
SMOLLM2_LACKS = bytes.fromhex("04 06 13 14 16 1d f1 f2")
"""Bytes of UTF-8 that its vocabulary does not have."""
SURROGATES = [chr(code) for code in (0xD800, 0xDBFF, 0xDC00, 0xDFFF)]
HARD = [
    '\ue000"0\ue001',
    "\\ue000",
    "\x00",
    "\x1b[31m",
    "\u200d",
    "\u0301",
    "\ufeff",
    "\r\n",
    "{{ x }}",
    "{% if %}",
]

# All of Unicode, halves of surrogate pairs too, with the texts of added tokens and of what is used within.
texts = st.lists(
    st.text(max_size=12) | st.sampled_from(SPECIAL) | st.sampled_from(HARD) | st.sampled_from(SURROGATES),
    max_size=6,
).map("".join)


def is_writable(*given: str) -> bool:
    return not any(0xD800 <= ord(char) < 0xE000 for text in given for char in text)


def rows_of(user: str, answer: str, system: str) -> dict[str, dict[str, Any]]:
    """The same in every format."""
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    turns = [{"from": "human", "value": user}, {"from": "gpt", "value": answer}]
    return {
        "alpaca": {"instruction": user, "output": answer, "system": system},
        "prompt-completion": {"prompt": user, "completion": answer, "system": system},
        "messages": {"messages": messages, "system": system},
        "sharegpt": {"conversations": turns, "system": system},
    }


def check(template: ChatTemplate, user: str, answer: str, system: str, *, lacks: bytes = b"") -> None:
    def left(text: str) -> str:
        return bytes(byte for byte in text.encode() if byte not in lacks).decode(errors="replace")

    rows = rows_of(user, answer, system)
    assert len(rows) == 4
    for values in rows.values():
        row = Row("a.jsonl", 1, values)
        if not (user.strip() and answer.strip()) or not is_writable(
            user, answer, system if system.strip() else ""
        ):
            with pytest.raises(DataError, match="none of its 1 rows can be trained on"):
                build_examples([row], template, max_length=10_000)
            continue
        examples, account = build_examples([row], template, max_length=10_000)
        [made] = examples
        assert (account.kept, account.dropped, account.truncated) == (1, [], [])
        shown = f"{user}{answer}{system if system.strip() else ''}"
        assert any("no tokens for" in note.text for note in account.notes) == (left(shown) != shown)
        target_ids = [id for id, on in zip(made.input_ids, made.loss_mask, strict=True) if on]
        assert decoded(template, target_ids) == f"{left(answer)}{template.end_of_turn}"
        assert made.loss_mask == sorted(made.loss_mask)  # one span, at the end
        whole = decoded(template, made.input_ids)
        assert whole.endswith(
            f"{left(user)}{template.end_of_turn}\n<|im_start|>assistant\n{left(answer)}{template.end_of_turn}"
        )
        assert not system.strip() or f"system\n{left(system)}{template.end_of_turn}" in whole
        forged = made.input_ids.count(template.end_of_turn_id) - (2 if not has_system(whole, template) else 3)
        assert forged == 0


def has_system(whole: str, template: ChatTemplate) -> bool:
    return whole.startswith("<|im_start|>system\n") and template.end_of_turn in whole


def decoded(template: ChatTemplate, ids: list[int]) -> str:
    return str(template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(texts, texts, texts)
def test_an_answer_is_trained_on_whole_whatever_the_texts(user: str, answer: str, system: str) -> None:
    check(TINY, user, answer, system)


@pytest.mark.slow
@pytest.mark.embedded
@settings(deadline=None, derandomize=True, max_examples=100)
@given(texts, texts, texts)
@example("\x16", "\x04\x06", "\U000a8573")
def test_so_it_is_with_smollm2s_tokenizer(smollm2: ChatModel, user: str, answer: str, system: str) -> None:
    """But for characters that it has no tokens for: the account notes those rows."""
    check(smollm2.template, user, answer, system, lacks=SMOLLM2_LACKS)


@pytest.mark.embedded
def test_prompts_that_lose_characters_are_named(smollm2: ChatModel) -> None:
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\x04"}]
    prompts: list[Any] = ["\t\r\n", "ring the \x16", [*conversation, {"role": "user", "content": "So?"}]]
    with captured_log() as decoded:
        handspun.generate(smollm2, prompts, max_new_tokens=1)
    assert [text for text in decoded if "no tokens" in text] == [
        "prompts 2, 3: the tokenizer has no tokens for some characters and drops them"
    ]
    with captured_log() as decoded:
        handspun.generate(smollm2, "\U000a8573", chat=False, max_new_tokens=1)
    assert "prompt 1: the tokenizer has no tokens for some characters and drops them" in decoded
