"""Marks that say what to train on: obeyed to the token where they are certain, and never trained over where they
are not."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversation_rows import CALL, assistant, chat, conversation, dropped, user
from handspun.config import DataConfig
from handspun.data.chat_template import ChatTemplate
from handspun.data.dataset import ExampleCache, load_splits
from handspun.data.examples import build_examples
from handspun.data.marks import mark_kind
from handspun.data.messages import Message
from handspun.data.rows import DroppedRow, Row
from handspun.preflight.print import account_lines
from tiny import tiny_tokenizer

TINY = ChatTemplate(tiny_tokenizer())
SKIPS = [
    *({key: value} for key in ("weight", "train", "loss", "loss_mask") for value in (0, 0.0, False, "0", "false")),
    *({key: False} for key in ("trainable", "training", "learn", "trainOn", "compute_loss", "Loss-Weight")),
    *({key: True} for key in ("masked", "is_masked", "no_loss", "do_not_train", "ignoreLoss")),
    *({"weight": text} for text in ("0.0", " 0 ", "No", "FALSE")),
]
NOTHING: list[Any] = [None, "", []]
TRAINS = [
    *({key: value} for key in ("weight", "train", "loss", "loss_mask") for value in (1, 1.0, True, "1", "True")),
    *({key: value} for key in ("masked", "no_loss") for value in (False, 0, "no")),
    *({key: value} for key in ("weight", "train", "mask", "train_detail") for value in NOTHING),
    {"id": 0, "timestamp": 1, "skip": False},
]
UNCLEAR = [
    *({"weight": value} for value in (0.5, -1, 2, "0.3", "heavy", [0], {"a": 0}, float("nan"))),
    *({key: value} for key in ("mask", "train_mask", "token_mask") for value in (0, 1, True, [0, 1])),
    *({key: True} for key in ("skip", "ignore", "exclude")),
    {"loss_mask": [0, 1, 1]},
    {"train_detail": [{"begin_offset": 0, "end_offset": 3, "train": False}]},
    {"turn_loss": 0},
    {"answer_mask": [0, 0, 1]},
    {"train": True, "weight": 0},
    {"masked": True, "train": 1},
]


def trained_texts(messages: list[Message], template: ChatTemplate = TINY) -> list[str]:
    """The texts that are trained on, stretch by stretch, over all examples of a conversation."""
    texts = []
    for example in template.encode(messages):
        stretch: list[int] = []
        for id, learned in [*zip(example.input_ids, example.loss_mask, strict=True), (0, False)]:
            if learned:
                stretch.append(id)
            elif stretch:
                texts.append(str(template.tokenizer.decode(stretch)))
                stretch = []
    return texts


@pytest.mark.parametrize("mark", SKIPS, ids=str)
def test_a_turn_that_is_marked_as_not_to_be_trained_on_is_context_to_the_last_token(mark: dict[str, Any]) -> None:
    made = chat(user("one"), assistant("bad", **mark), user("two"), assistant("good"))
    assert [message["content"] for message in made.messages] == ["one", "bad", "two", "good"]
    assert trained_texts(made.messages) == ["good<|im_end|>"]
    [note] = made.notes
    assert next(iter(mark)) in note
    assert note.endswith("are context, not trained on")


@pytest.mark.parametrize("mark", TRAINS, ids=str)
def test_a_turn_that_is_marked_as_to_be_trained_on_or_not_at_all_is_trained_on(mark: dict[str, Any]) -> None:
    made = chat(user("one"), assistant("good", **mark))
    assert trained_texts(made.messages) == ["good<|im_end|>"]
    assert made.messages == [user("one"), assistant("good")]
    assert made.notes == ()


@pytest.mark.parametrize("mark", UNCLEAR, ids=str)
def test_a_mark_that_cannot_be_understood_drops_the_row_and_is_named(mark: dict[str, Any]) -> None:
    turns = [user("one"), assistant("good", **mark), user("two"), assistant("fine")]
    assert next(iter(mark)) in dropped("messages", messages=turns)


@pytest.mark.parametrize("spelling", ["sharegpt", "prompt-completion", "json text", "pairs of a call"])
def test_marks_are_obeyed_in_every_layout(spelling: str) -> None:
    bad, good = assistant("bad", weight=0), assistant("good")
    if spelling == "sharegpt":
        turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "bad", "weight": 0}, user("b"), good]
        made = conversation("sharegpt", conversations=turns)
    elif spelling == "prompt-completion":
        made = conversation("prompt-completion", prompt=[user("a"), bad, user("b")], completion="good")
        assert made.notes == ("turns marked 'weight' 0 are context, not trained on",)
    elif spelling == "json text":
        made = conversation("messages", messages=json.dumps([user("a"), bad, user("b"), good]))
    else:
        called = {"role": "function_call", "value": json.dumps(CALL["function"]), "weight": 0}
        made = chat(user("a"), called, {"role": "tool", "content": "5"}, good)
    assert trained_texts(made.messages) == ["good<|im_end|>"]


def test_a_conversation_of_context_only_is_dropped_with_the_marks_named() -> None:
    assert dropped("messages", messages=[user(), assistant(weight=0)]) == (
        "no turn to train on; turns marked 'weight' 0 are context, not trained on"
    )


def test_what_comes_after_the_last_turn_that_is_trained_on_is_cut_off() -> None:
    made = chat(user("a"), assistant("b"), user("c"), assistant("d", train=False))
    assert made.messages == [user("a"), assistant("b")]
    assert made.notes == ("turns marked 'train' false are context, not trained on",)


def test_a_mark_on_what_is_never_trained_on_is_named_where_it_asks_for_more() -> None:
    made = chat({**user("a"), "train": True}, {**assistant("b"), "train": True})
    assert made.notes == ("a user message marked 'train' is not trained on: only assistant messages are",)
    assert chat({**user("a"), "train": False}, assistant("b")).notes == ()


def test_a_mark_in_a_part_of_a_message_drops_the_row() -> None:
    parts = [{"type": "text", "text": "a", "loss": False}, {"type": "text", "text": "b"}]
    assert "a part of a message is marked 'loss' false" in dropped("messages", messages=[user(), assistant(parts)])
    call = {**CALL, "weight": 0}
    assert "marked 'weight' 0" in dropped("messages", messages=[user(), assistant("", tool_calls=[call])])


def test_a_mark_inside_of_an_object_is_not_read_and_not_trained_over() -> None:
    turns = [user(), assistant("bad", metadata={"train": False, "loss": 2.3})]
    assert dropped("messages", messages=turns).startswith("'train' false inside 'metadata'")
    assert dropped("alpaca", instruction="a", output="b", extra={"weight": "0"}).startswith("'weight' 0 inside")
    assert chat(user(), assistant("good", metadata={"train": True, "loss": 2.3})).notes == ()


def test_a_template_that_changes_history_trains_on_the_marked_turns_alone() -> None:
    """Each turn that is rendered otherwise once it is history becomes an example of its own."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    template = ChatTemplate(tokenizer)
    turns = [user("a"), assistant("b"), user("c"), assistant("d", train=0), user("e"), assistant("f")]
    assert trained_texts(chat(*turns).messages, template) == [
        "<think></think>f<|im_end|>",
        "<think></think>b<|im_end|>",
    ]


def test_a_template_never_sees_a_mark() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = str(tokenizer.chat_template).replace(
        "<|im_start|>{{ message.role }}", "<|im_start|>{{ message.role }}{{ message.train }}"
    )
    made = chat(user("a"), assistant("b", train=False), user("c"), assistant("d"))
    [example] = ChatTemplate(tokenizer).encode(made.messages)
    assert "False" not in tokenizer.decode(example.input_ids)


# Of a row


@pytest.mark.parametrize(
    "column",
    [{"train": False}, {"weight": "0"}, {"loss_mask": 0}, {"masked": True}, {"Do Not Train": "yes"}, {"skip": 1}],
    ids=str,
)
@pytest.mark.parametrize("layout", ["alpaca", "prompt-completion", "messages"])
def test_a_row_that_is_marked_as_not_to_be_trained_on_is_dropped(layout: str, column: dict[str, Any]) -> None:
    values = {
        "instruction": "a",
        "output": "b",
        "prompt": "a",
        "completion": "b",
        "messages": [user(), assistant()],
    }
    assert next(iter(column)) in dropped(layout, **values, **column)


@pytest.mark.parametrize(
    "column", [{"weight": 0.5}, {"sample_weight": "-1"}, {"loss_mask": [0, 1]}, {"mask": "[0,1]"}]
)
def test_a_row_that_may_not_be_meant_whole_is_dropped(column: dict[str, Any]) -> None:
    assert "is neither 0 nor 1" in dropped("prompt-completion", prompt="a", completion="b", **column)


@pytest.mark.parametrize(
    ("column", "notes"),
    [
        ({"train": True}, ()),
        ({"weight": "1"}, ()),
        ({"id": 0}, ()),
        ({"loss": 2.31}, ("the column 'loss' is ignored as a mark: it is neither 0 nor 1",)),
        ({"train": "IC 12"}, ("the column 'train' is ignored as a mark: it is neither 0 nor 1",)),
        (
            {"train_on_prompt": True},
            ("the column 'train_on_prompt' asks to train on prompts, which is not supported",),
        ),
        (
            {"is_train_row": 0},
            ("the column 'is_train_row' looks like a mark of what to train on, but is ignored",),
        ),
        ({"label": 0}, ("the column 'label' is 0, and read as a class: write false for a rejected answer",)),
    ],
    ids=str,
)
def test_other_columns_keep_the_row_and_are_named(column: dict[str, Any], notes: tuple[str, ...]) -> None:
    assert conversation("prompt-completion", prompt="a", completion="b", **column).notes == notes


@pytest.mark.parametrize("label", [False, "False", " false "])
def test_a_rejected_answer_is_not_trained_on_in_a_csv_cell_either(label: Any) -> None:
    assert dropped("messages", messages=[user(), assistant()], label=label) == "label is false: a rejected answer"
    assert dropped("alpaca", instruction="a", output="b", kto_tag="0") == "kto_tag is false: a rejected answer"


# The account, and the cache


def test_the_account_counts_marked_turns_and_names_what_is_not_read() -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [user("a"), assistant("b", weight=0), user("c"), assistant("d", id=7)], "weight": 1},
        {"messages": [user("a"), assistant("b", weight=0)], "origin": "x"},
    ]
    _, account = build_examples([Row("a.jsonl", i, row) for i, row in enumerate(rows, 1)], TINY, max_length=100)
    lines = account_lines(account, max_length=100)
    assert lines == [
        "a.jsonl: messages format",
        "a.jsonl: columns not read: origin, id (of messages)",
        "rows: 2 read, 1 kept, 1 dropped",
        "  dropped, no turn to train on; turns marked 'weight' 0 are context, not trained on: 1 (row 2)",
        "  turns marked 'weight' 0 are context, not trained on: 1 (row 1)",
    ]


def test_a_changed_mark_is_another_set_in_the_cache(tmp_path: Path) -> None:
    cache, data = ExampleCache(tmp_path / "cache"), tmp_path / "a.jsonl"

    def learned(mark: int) -> int:
        turns = [user("a"), assistant("b", weight=mark), user("c"), assistant("d")]
        data.write_text(json.dumps({"messages": turns}), encoding="utf-8")
        made, _ = load_splits(DataConfig(data=str(data)), TINY, max_length=100, cache=cache)
        return made.examples[0].learned_tokens

    assert learned(1) == 2 * learned(0)
    assert learned(1) == 2 * learned(0)


# Whatever the marks

marks = st.dictionaries(
    st.sampled_from(
        ["weight", "train", "loss", "loss_mask", "masked", "mask", "skip", "train_detail", "my_loss", "x"]
    ),
    st.none()
    | st.booleans()
    | st.sampled_from([0, 1, 0.5, -1, "0", "1", "true", "no", "x", [], [0, 1], [{"a": 1}]]),
    max_size=2,
)
SAYS_NO = {
    **dict.fromkeys(("weight", "train", "loss", "loss_mask"), (0, False, "0", "no")),
    "masked": (1, True, "1", "true"),
}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(of_turns=st.lists(marks, min_size=1, max_size=4))
def test_no_turn_is_ever_trained_on_that_a_mark_excludes(of_turns: list[dict[str, Any]]) -> None:
    turns = [turn for i, mark in enumerate(of_turns) for turn in (user(), assistant(f"answer {i}.", **mark))]
    try:
        made = chat(*turns)
    except DroppedRow as reason:
        assert str(reason)  # noqa: PT017
        return
    excluded = {
        f"answer {i}."
        for i, mark in enumerate(of_turns)
        if any(
            value == no and type(value) is type(no) for key, value in mark.items() for no in SAYS_NO.get(key, ())
        )
    }
    trained = {text.removesuffix("<|im_end|>") for text in trained_texts(made.messages)}
    assert trained == {f"answer {i}." for i in range(len(of_turns))} - excluded


@pytest.mark.parametrize(
    "key", ["id", "content", "role", "name", "timestamp", "from", "Überschrift", "", "weighting"]
)
def test_ordinary_keys_are_no_marks(key: str) -> None:
    assert mark_kind(key) is None
