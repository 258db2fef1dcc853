"""Conversations: what a row says in each format, and the reason where it cannot be learned."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation_rows import CALL, assistant, chat, conversation, dropped, refusal, user
from handspun.data.conversations import Conversation
from handspun.data.formats import recognize_format
from handspun.data.messages import Message
from handspun.data.rows import DroppedRow
from handspun.errors import DataError

# Alpaca


def test_alpaca_joins_instruction_and_input_with_a_newline() -> None:
    assert conversation("alpaca", instruction="Add.", input="2, 3", output="5") == Conversation(
        [{"role": "user", "content": "Add.\n2, 3"}, {"role": "assistant", "content": "5"}], None, "a.jsonl", 7
    )


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": " \n"}, {"input": None}])
def test_alpaca_without_input_is_the_instruction_alone(given: dict[str, Any]) -> None:
    assert conversation("alpaca", instruction="Add.", output="5", **given).messages == [
        user("Add."),
        assistant("5"),
    ]


texts = st.text(st.characters(exclude_categories=["Cs"])).filter(str.strip)


@pytest.mark.parametrize("layout", ["alpaca", "prompt-completion", "messages", "sharegpt"])
@settings(deadline=None, derandomize=True)
@given(question=texts, answer=texts)
def test_any_text_comes_through_unchanged(layout: str, question: str, answer: str) -> None:
    layouts: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": question, "output": answer},
        "prompt-completion": {"prompt": question, "completion": answer},
        "messages": {"messages": [user(question), assistant(answer)]},
        "sharegpt": {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
    }
    made = conversation(layout, **layouts[layout])
    assert (made.messages, made.notes) == ([user(question), assistant(answer)], ())


def test_alpaca_history_and_system_come_first() -> None:
    pairs = [["One?", "1"], ["Two?", "2"]]
    for history in (pairs, json.dumps(pairs)):
        made = conversation("alpaca", instruction="Three?", output="3", system="Count.", history=history)
        assert [m["content"] for m in made.messages] == ["Count.", "One?", "1", "Two?", "2", "Three?", "3"]
        assert [m["role"] for m in made.messages] == ["system", *["user", "assistant"] * 3]
    assert len(conversation("alpaca", instruction="a", output="b", history="").messages) == 2


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"instruction": "a", "output": ""}, "empty output"),
        ({"instruction": "a", "output": " \n\t"}, "empty output"),
        ({"instruction": "a", "output": None}, "empty output"),
        ({"instruction": "", "input": "x", "output": "b"}, "empty instruction"),
        ({"instruction": "a", "output": "b", "kto_tag": False}, "kto_tag is false: a rejected answer"),
        ({"instruction": "a", "output": "b", "images": ["a.png"]}, "image content"),
        ({"instruction": "a", "output": "b\ud800"}, "broken Unicode (a lone surrogate)"),
    ],
)
def test_alpaca_rows_that_teach_nothing_are_dropped(values: dict[str, Any], reason: str) -> None:
    assert dropped("alpaca", **values) == reason


def test_a_label_of_alpaca_rows_is_not_a_judgement_of_the_answer() -> None:
    assert conversation("alpaca", instruction="Spam?", output="no", label=False).messages


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"instruction": "a"},
            "column 'output': this row does not have the column. alpaca needs instruction and output",
        ),
        ({"instruction": "a", "output": 5}, "column 'output': expected a string, found the number 5."),
        ({"instruction": "a", "output": float("nan")}, "column 'output': expected a string, found NaN (pandas"),
        ({"instruction": ["a"], "output": "b"}, "column 'instruction': expected a string, found a list."),
        ({"instruction": "a", "output": "b", "input": True}, "column 'input': expected a string, found true."),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "column 'history': expected pairs of strings"),
        (
            {"instruction": "a", "output": "b", "history": 3},
            "column 'history': expected a list, found the number 3.",
        ),
    ],
)
def test_alpaca_cells_of_a_wrong_type_are_named(values: dict[str, Any], message: str) -> None:
    assert refusal("alpaca", **values).startswith(f"a.jsonl, row 7, {message}")


# Prompt and completion


def test_prompt_and_completion_may_be_lists_of_messages() -> None:
    made = conversation("prompt-completion", prompt=[user("a")], completion=[assistant("b")])
    assert (made.messages, made.notes) == ([user("a"), assistant("b")], ())
    made = conversation("prompt-completion", prompt=[user("a"), assistant("b"), user("c")], completion="d")
    assert [m["content"] for m in made.messages] == ["a", "b", "c", "d"]
    assert made.notes == ("assistant turns in the prompt are trained on too",)


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [("", "b", "empty prompt"), ("a", " ", "empty completion"), ([user()], [], "empty completion")],
)
def test_an_empty_prompt_or_completion_is_dropped(prompt: Any, completion: Any, reason: str) -> None:
    assert dropped("prompt-completion", prompt=prompt, completion=completion) == reason


def test_a_missing_completion_is_named() -> None:
    message = refusal("prompt-completion", prompt="a", answer="b")
    assert message.endswith("prompt-completion needs prompt and completion; the row has prompt, answer.")


# What nobody answers


def test_turns_behind_the_last_answer_are_cut_off_and_noted() -> None:
    made = chat(user("a"), assistant("b"), user("c"), {"role": "tool", "content": "d"})
    assert made.messages == [user("a"), assistant("b")]
    assert made.notes == ("cut off after the last assistant turn",)


def test_a_conversation_is_cut_off_before_an_empty_turn() -> None:
    made = chat(user("a"), assistant("b"), user("c"), assistant(" "), user("d"), assistant("e"))
    assert made.messages == [user("a"), assistant("b")]
    assert made.notes == ("cut off before an empty assistant turn",)
    made = chat(user("a"), assistant("b"), user(""), assistant("d"))
    assert made.messages == [user("a"), assistant("b")]
    assert made.notes == ("cut off before an empty user turn",)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ([user()], "no assistant turn"),
        ([{"role": "system", "content": "x"}], "no assistant turn"),
        ([user(), assistant(""), user(), assistant()], "empty assistant turn"),
        ([user(), assistant(None, reasoning="Hm.")], "empty assistant turn"),
        ([user(" "), assistant()], "empty user turn"),
    ],
)
def test_a_conversation_without_an_answer_is_dropped(messages: list[Message], reason: str) -> None:
    assert dropped("messages", messages=messages, system_prompt="x") == reason


def test_a_tool_may_return_nothing() -> None:
    called = assistant(tool_calls=[CALL])
    made = chat(user(), called, {"role": "tool", "content": ""}, assistant())
    assert [m["role"] for m in made.messages] == ["user", "assistant", "tool", "assistant"]


# System messages


def test_the_system_prompt_is_for_conversations_without_one() -> None:
    turns = [user(), assistant()]
    given, own = {"role": "system", "content": "given"}, {"role": "system", "content": ""}
    assert conversation("messages", "given", messages=turns).messages == [given, *turns]
    assert conversation("messages", "given", messages=turns, system="").messages == [given, *turns]
    assert conversation("messages", None, messages=turns).messages == turns
    column = {"role": "system", "content": "column"}
    assert conversation("messages", "given", messages=turns, system="column").messages == [column, *turns]
    assert conversation("messages", "given", messages=[own, *turns]).messages == [own, *turns]


def test_two_different_system_messages_are_one_too_many() -> None:
    turns = [{"role": "system", "content": "a"}, user(), assistant()]
    assert conversation("messages", messages=turns, system="a").messages == turns
    assert dropped("messages", messages=turns, system="b").startswith("two system messages")


# Anything else

words = st.sampled_from(
    ["a", "", "text", "image_url", "tool_call", '{"name": "f"}', '{"name": "f", "arguments": "x"}', "[]"]
)
keys = st.sampled_from(["type", "text", "value", "function", "name", "arguments", "thinking"])
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {
        "from": st.sampled_from(["system", "user", "gpt", "gpt", "tool", "function_call"]),
        "content": words | anything,
    },
    optional={"tool_calls": anything, "thinking": anything},
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(messages=st.lists(turns, max_size=4) | anything, tools=st.none() | anything, system=st.none() | anything)
def test_whatever_stands_in_a_row_it_is_a_conversation_or_one_clear_reason(
    messages: Any, tools: Any, system: Any
) -> None:
    try:
        made = conversation("messages", messages=messages, tools=tools, system=system)
    except (DroppedRow, DataError) as reason:
        assert str(reason)  # noqa: PT017
        return
    assert made.messages[-1]["role"] == "assistant"
    assert all(isinstance(m["content"], str) for m in made.messages)
    assert all(
        isinstance(c["function"]["arguments"], dict) for m in made.messages for c in m.get("tool_calls", [])
    )
    assert all(isinstance(tool["function"]["name"], str) for tool in made.tools or [])


def test_questions_without_answers_are_one_clear_error() -> None:
    """As MT-bench's and Vicuna's questions are published."""
    row = {"question_id": 81, "category": "writing", "turns": ["Compose a travel post.", "Rewrite it."]}
    with pytest.raises(DataError, match="`turns` are questions without answers"):
        recognize_format(list(row), "questions.jsonl")
