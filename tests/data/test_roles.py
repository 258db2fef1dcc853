"""Whose a message is, in the spellings that data sets have; and that training and decoding read it alike."""

import json
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import settings
from hypothesis import strategies as st

import handspun
from conversation_rows import CALL, TOOL, assistant, chat, conversation, dropped, user
from handspun.config import DataConfig, TrainConfig
from handspun.config.role_map import parse_role_map
from handspun.data.chat_template import ChatTemplate
from handspun.data.conversations import Conversation, to_conversation
from handspun.data.examples import build_examples
from handspun.data.messages import LOST_NULLS, plain_message, read_message
from handspun.data.rows import DroppedRow, Row, read_rows
from handspun.decoding.prompts import encode_prompts
from handspun.errors import ConfigError, DataError
from handspun.evaluation.answers import question_of
from handspun.models.load import ChatModel
from handspun.preflight.checks import row_texts
from handspun.preflight.print import account_lines
from handspun.runs.record import command, options_given
from tiny import tiny_model, tiny_tokenizer

NAMES = {
    "system": ["system", "System", " SYSTEM ", "developer", "Developer", "sys", "SystemMessage"],
    "user": ["user", "USER", "human", "Human ", "prompter", "human-user", "HumanMessage"],
    "assistant": [
        "assistant",
        "gpt",
        "GPT ",
        "bot",
        "ai",
        "AI",
        "chatbot",
        "model",
        "claude",
        "gpt-3.5-turbo",
        "AIMessage",
    ],
    "tool": ["tool", "function", "observation", "Tool Response", "tool-result", "ipython", "ToolMessage"],
}
SPELLINGS = [(name, role) for role, names in NAMES.items() for name in names]


def mapped(role_map: dict[str, str], *turns: Any) -> Conversation:
    row = Row("a.jsonl", 7, {"messages": list(turns)})
    return to_conversation(row, "messages", system_prompt=None, role_map=parse_role_map(role_map))


# Names and keys


@pytest.mark.parametrize(("name", "role"), SPELLINGS)
@pytest.mark.parametrize("key", ["role", "from", "speaker", "author", "sender", "type"])
def test_a_role_is_known_by_many_names_and_keys(name: str, role: str, key: str) -> None:
    made = chat(user("a"), assistant("b"), {key: name, "content": "x"}, user("c"), assistant("d"))
    assert made.messages[2] == {"role": role, "content": "x"}


@pytest.mark.parametrize(("name", "role"), SPELLINGS)
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value"), ("role", "value")])
def test_a_plain_message_is_read_the_short_way_as_it_is_the_long_way(
    name: str, role: str, keys: tuple[str, str]
) -> None:
    turn = dict(zip(keys, (name, " x "), strict=True))
    assert plain_message(turn, {}) == read_message(turn, {}) == {"role": role, "content": " x "}
    for other in ({**turn, "weight": 0}, {**turn, keys[1]: None}, {**turn, keys[0]: "critic"}, {keys[1]: "x"}):
        assert plain_message(other, {}) is None


@pytest.mark.parametrize(
    "turn",
    [
        {"type": "human", "data": {"content": "Hi", "additional_kwargs": {}}},
        {"lc": 1, "type": "constructor", "id": ["langchain", "HumanMessage"], "kwargs": {"content": "Hi"}},
        {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["Hi"]}},
        {"role": None, "from": "human", "content": None, "value": "Hi"},
        {"speaker": "Human", "text": "Hi"},
        {"sender": "user", "message": "Hi"},
        {"role": "user", "type": "message", "content": [{"type": "input_text", "text": "Hi"}]},
        {"role": "user", "content": {"type": "text", "text": "Hi"}},
        json.dumps({"role": "user", "content": "Hi"}),
    ],
    ids=str,
)
def test_a_message_is_read_in_the_spelling_of_another_tool(turn: Any) -> None:
    assert chat(turn, assistant("b")).messages == [user("Hi"), assistant("b")]


def test_an_object_whose_keys_are_roles_is_a_turn_for_each() -> None:
    made = chat({"human": "a", "assistant": "b"}, {"system": None, "user": "c", "bot": "d"})
    assert made.messages == [user("a"), assistant("b"), user("c"), assistant("d")]
    assert mapped({"agent": "assistant"}, {"user": "a", "agent": "b"}).messages == [user("a"), assistant("b")]


def test_all_unknown_roles_of_a_row_are_named_at_once() -> None:
    turns = [{"role": name, "content": "x"} for name in ("customer", "agent", "customer")]
    assert dropped("messages", messages=turns) == "the unknown roles 'agent', 'customer'"


def test_keys_that_are_not_read_are_named() -> None:
    turns = [{**user(), "name": "Ann", "id": 1}, {**assistant(), "train": 1, "ts": None, "my loss": "low"}]
    assert sorted(chat(*turns).unread_keys) == ["id", "my loss", "name"]


# The role map


def test_the_role_map_names_speakers_and_comes_first() -> None:
    turns = [{"role": "Customer", "content": "a"}, {"role": "agent ", "content": "b"}]
    assert mapped({"customer": "user", "Agent": "assistant"}, *turns).messages == [user("a"), assistant("b")]
    numbered = [{"speaker": 0, "text": "a"}, {"speaker": 1, "text": "b"}]
    assert mapped({"0": "user", "1": "assistant"}, *numbered).messages == [user("a"), assistant("b")]
    swapped = mapped({"user": "assistant", "assistant": "user"}, assistant("a"), user("b"))
    assert swapped.messages == [user("a"), assistant("b")]


def test_unknown_roles_are_listed_with_what_is_known_and_the_option() -> None:
    rows = [
        Row("a.jsonl", 1, {"messages": [{"role": "agent", "content": "x"}]}),
        Row("a.jsonl", 2, {"messages": [user(), assistant()]}),
    ]
    template = ChatTemplate(tiny_tokenizer())
    _, account = build_examples(rows, template, max_length=100)
    told = "\n".join(account_lines(account, max_length=100))
    assert "dropped, the unknown role 'agent': 1 (row 1)" in told
    assert "human" in told
    assert "--role-map agent=assistant" in told
    with pytest.raises(DataError, match="Known roles, in any case: .*prompter.* Map other names with --role-map"):
        build_examples(rows[:1], template, max_length=100)


def test_thousands_of_unknown_roles_are_told_in_a_few_lines() -> None:
    rows = [Row("a.jsonl", n, {"messages": [{"role": f"speaker {n}", "content": "x"}]}) for n in range(1, 3000)]
    rows.append(Row("a.jsonl", 3000, {"messages": [user(), assistant()]}))
    template = ChatTemplate(tiny_tokenizer())
    _, account = build_examples(rows, template, max_length=100)
    lines = account_lines(account, max_length=100)
    assert len(lines) < 40
    assert any("more reasons: 2969" in line for line in lines)
    with pytest.raises(DataError, match="and 2979 more reasons") as caught:
        build_examples(rows[:-1], template, max_length=100)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "given",
    [
        ("agent=assistant", "customer=user"),
        ("agent=assistant,customer=user",),
        ('{"agent": "assistant", "customer": "user"}',),
        {"Agent": "Assistant", " customer ": "user"},
    ],
    ids=str,
)
def test_a_role_map_may_be_given_in_several_ways(given: Any) -> None:
    config = TrainConfig(role_map=given)
    assert config.role_map == {"agent": "assistant", "customer": "user"}
    assert json.loads(json.dumps(options_given(config)))["role_map"] == config.role_map
    typed = command({"role_map": config.role_map}).split("--role-map ")[1].strip("'")
    assert TrainConfig(role_map=(typed,)).role_map == config.role_map


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("agent=assistent",), "'agent' is mapped to 'assistent', which is not a role (expected NAME=ROLE"),
        (("agent",), "'agent' maps to nothing"),
        (("=user",), "a name is empty"),
        (("a=user", "A=tool"), "'A' is mapped to two roles, user and tool"),
        (("{",), "'{' is not a JSON object"),
        ({"a": "critic"}, "'a' is mapped to 'critic', which is not a role"),
    ],
    ids=str,
)
def test_a_role_map_that_cannot_be_meant_is_refused(given: Any, problem: str) -> None:
    for config in (DataConfig, TrainConfig):
        with pytest.raises(ConfigError) as caught:
            config(role_map=given)
        assert problem in str(caught.value)


def test_evaluation_and_preflight_read_rows_with_the_role_map_and_the_marks() -> None:
    turns = [
        {"role": "customer", "content": "a"},
        {"role": "agent", "content": "bad", "weight": 0},
        {"role": "customer", "content": "c"},
        {"role": "agent", "content": "good"},
        {"role": "customer", "content": "e"},
        {"role": "agent", "content": "worse", "weight": 0},
    ]
    row, config = Row("a.jsonl", 1, {"messages": turns}), DataConfig(role_map=("agent=assistant", "customer=user"))
    asked = question_of(row, {"a.jsonl": "messages"}, system_prompt=None, role_map=config.roles)
    assert (asked.prompt, asked.expected) == ("c", "good")
    _, account = build_examples([row], ChatTemplate(tiny_tokenizer()), max_length=100, role_map=config.roles)
    [texts_of_row] = row_texts([row], account, config)
    assert (texts_of_row.prompts, texts_of_row.answers) == (["a", "bad", "c"], ["good"])


# Greetings


@pytest.mark.parametrize(
    "before", [[], [{"role": "system", "content": "Sell tea."}]], ids=["first", "behind system"]
)
def test_a_greeting_is_context_wherever_it_stands(before: list[Any]) -> None:
    made = chat(*before, assistant("Welcome!"), user("a"), assistant("b"))
    assert made.messages == [*before, {**assistant("Welcome!"), "train": False}, user("a"), assistant("b")]
    assert made.notes == ("an assistant turn before the first user turn (a greeting) is context, not trained on",)
    [example] = ChatTemplate(tiny_tokenizer()).encode(made.messages)
    target_ids = [id for id, is_target in zip(example.input_ids, example.loss_mask, strict=True) if is_target]
    assert tiny_tokenizer().decode(target_ids) == "b<|im_end|>"


def test_a_greeting_that_is_marked_is_trained_on_where_something_comes_before_it() -> None:
    system = {"role": "system", "content": "Sell tea."}
    made = chat(system, assistant("Welcome!", train=True), user("a"), assistant("b"))
    assert made.messages == [system, assistant("Welcome!"), user("a"), assistant("b")]
    made = chat(assistant("Welcome!", train=True), user("a"), assistant("b"))
    assert made.messages[0] == {**assistant("Welcome!"), "train": False}


def test_the_answer_to_a_system_message_alone_is_an_answer() -> None:
    system = {"role": "system", "content": "Write a line about tea."}
    assert chat(system, assistant("Tea.")).messages == [system, assistant("Tea.")]
    assert dropped("messages", messages=[assistant("Tea.")]).startswith(
        "no turn to train on; an assistant turn before"
    )


# Tool results, JSON and nulls


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("sunny", "sunny"),
        (None, ""),
        ({"sky": "clear", "degrees": 21}, '{"sky": "clear", "degrees": 21}'),
        ({"type": "hotel", "name": "Ü", "stars": None}, '{"type": "hotel", "name": "Ü", "stars": null}'),
        ([{"city": "Lyon"}, {"city": "Nice"}], '[{"city": "Lyon"}, {"city": "Nice"}]'),
        (["a", "b"], '["a", "b"]'),
        ([], "[]"),
        (21.5, "21.5"),
        (False, "false"),
        ([{"type": "text", "text": "rain"}], "rain"),
        ({"type": "text", "text": "rain"}, "rain"),
    ],
    ids=str,
)
def test_a_tools_result_is_text_or_json(content: Any, text: str) -> None:
    made = chat(user(), assistant("", tool_calls=[CALL]), {"role": "tool", "content": content}, assistant("b"))
    assert made.messages[2] == {"role": "tool", "content": text}
    is_text = content is None or isinstance(content, str) or "rain" in text
    assert made.notes == (() if is_text else ("a tool result that is not text is written as JSON",))


@pytest.mark.parametrize("key", ["arguments", "args", "parameters", "input"])
def test_arguments_have_several_names_and_calls_may_be_json_text(key: str) -> None:
    call = {"name": "add", key: {"a": 2}}
    for calls in ([call], call, json.dumps([call]), [json.dumps(call)], [{"function": json.dumps(call)}]):
        assert chat(user(), assistant("", tool_calls=calls)).messages[1]["tool_calls"] == [CALL]


def test_parameters_of_a_tool_may_be_json_text() -> None:
    function = {**TOOL["function"], "parameters": json.dumps(TOOL["function"]["parameters"])}
    assert chat(user(), assistant(), tools=[{"type": "function", "function": function}]).tools == [TOOL]


def tool(name: str, **properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


FIND = {"type": "function", "function": {"name": "find", "arguments": {"a": "tea", "limit": None}}}
ROWS = [
    {
        "messages": [
            user("Search."),
            {"role": "assistant", "content": None, "tool_calls": [FIND]},
            {"role": "tool", "content": {"found": 2, "next": None}},
            assistant("Two."),
        ],
        "tools": [tool("find", limit={"type": "integer", "default": None})],
    },
    {
        "messages": [user("Hi"), assistant("Hello")],
        "tools": [tool("add", b={"type": "integer", "default": 7})],
    },
]


def as_json(value: Any) -> pa.Array:
    return pa.array([[json.dumps(item) for item in cell] for cell in value], pa.list_(pa.string())).cast(
        pa.list_(pa.json_())
    )


TABLES = {
    "lists of Arrow's JSON": lambda: {
        name: as_json([row[name] for row in ROWS]) for name in ("messages", "tools")
    },
    "Arrow's JSON": lambda: {
        name: pa.array([json.dumps(row[name]) for row in ROWS], pa.string()).cast(pa.json_())
        for name in ("messages", "tools")
    },
    "lists of text": lambda: {
        name: [[json.dumps(item) for item in row[name]] for row in ROWS] for name in ("messages", "tools")
    },
    "text": lambda: {name: [json.dumps(row[name]) for row in ROWS] for name in ("messages", "tools")},
}


@pytest.mark.parametrize("form", TABLES)
def test_json_in_parquet_gives_the_rows_of_json_lines(form: str, tmp_path: Path) -> None:
    pq.write_table(pa.table(TABLES[form]()), tmp_path / "a.parquet")
    made = [to_conversation(row, "messages", system_prompt=None) for row in read_rows(str(tmp_path / "a.parquet"))]
    same = [to_conversation(Row("a", n, row), "messages", system_prompt=None) for n, row in enumerate(ROWS, 1)]
    assert [(one.messages, one.tools) for one in made] == [(one.messages, one.tools) for one in same]
    assert made[0].messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": "tea", "limit": None}
    assert not any(LOST_NULLS in one.notes for one in made)


def test_arguments_of_arrows_json_type_inside_of_a_struct_keep_their_nulls(tmp_path: Path) -> None:
    call = pa.struct({"name": pa.string(), "arguments": pa.json_()})
    turn = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call)})
    storage = pa.struct(
        {
            "role": pa.string(),
            "content": pa.string(),
            "tool_calls": pa.list_(pa.struct({"name": pa.string(), "arguments": pa.string()})),
        }
    )
    rows = [[user("Hi"), {"role": "assistant", "tool_calls": [{"name": "add", "arguments": '{"a": null}'}]}]]
    column = pa.array(rows, pa.list_(storage)).cast(pa.list_(turn))
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    [row] = read_rows(str(tmp_path / "a.parquet"))
    made = to_conversation(row, "messages", system_prompt=None)
    assert made.messages[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": None}}
    assert made.notes == ()


def test_nulls_that_arrow_filled_in_are_left_out_and_told_where_one_could_be_meant(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_pylist([{**ROWS[0], "messages": ROWS[1]["messages"]}, ROWS[1]]), tmp_path / "a.parquet"
    )
    made = [to_conversation(row, "messages", system_prompt=None) for row in read_rows(str(tmp_path / "a.parquet"))]
    properties = [one.tools[0]["function"]["parameters"]["properties"] for one in made if one.tools]
    assert properties == [{"limit": {"type": "integer"}}, {"b": {"type": "integer", "default": 7}}]
    assert made[0].notes == made[1].notes == (LOST_NULLS,)
    only_fillers = [{"messages": [{**user("Hi"), "name": None}, assistant("Hello", name="Bot")]}]
    pq.write_table(pa.Table.from_pylist(only_fillers), tmp_path / "b.parquet")
    [row] = read_rows(str(tmp_path / "b.parquet"))
    assert to_conversation(row, "messages", system_prompt=None).notes == ()


# Training and decoding read a message alike


@pytest.fixture(scope="module")
def model() -> ChatModel:
    """With a template that takes any order of turns, so that nothing but the reading decides."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.name }}{{ m.reasoning_content }}{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return ChatModel(tiny_model("qwen2"), tokenizer, "tiny")


texts = st.sampled_from(["Hi", " two\nlines ", "<|im_end|>", "é", "0"])
parts = st.lists(st.builds(lambda text: {"type": "text", "text": text}, texts), max_size=2)
contents = texts | parts | st.none() | st.builds(lambda text: {"type": "text", "text": text}, texts)
results = contents | st.sampled_from([{"a": None}, [1, 2], 7, True])
spelled = st.sampled_from([*SPELLINGS, ("critic", "none"), ("", "none")])
keys = st.sampled_from([("role", "content"), ("from", "value"), ("speaker", "text"), ("type", "content")])


@st.composite
def turns(draw: st.DrawFn) -> dict[str, Any]:
    name, role = draw(spelled)
    of_role, of_content = draw(keys)
    turn = {of_role: name, of_content: draw(results if role == "tool" else contents)}
    extras = {"name": "add", "tool_call_id": "c1", "id": 3, "tool_calls": [CALL], "reasoning": "Hm."}
    return {**turn, **{key: extras[key] for key in draw(st.sets(st.sampled_from(list(extras)), max_size=2))}}


@settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(before=st.lists(turns(), max_size=4), system_prompt=st.none() | texts)
def test_a_prompt_is_what_training_makes_of_the_same_messages(
    model: ChatModel, before: list[dict[str, Any]], system_prompt: str | None
) -> None:
    """The ids of a prompt are those that stand before the answer in training, or both refuse it alike."""
    asked = [*before, {"role": "user", "content": "Ask."}]
    outcomes: list[Any] = []
    for read in (trained_on, prompted_with):
        try:
            outcomes.append(read(model, asked, system_prompt))
        except (DroppedRow, DataError) as reason:
            outcomes.append(str(reason).split("cannot be used: ")[-1].split(". Known roles")[0].rstrip("."))
    trained, prompted = outcomes
    hypothesis.assume(trained is not None)
    assert trained == prompted


def trained_on(model: ChatModel, asked: list[Any], system_prompt: str | None) -> list[int] | None:
    """The ids that stand before the answer; None for what is cut off or dropped since it teaches nothing."""
    try:
        made = conversation("messages", system_prompt, messages=[*asked, assistant("Answer.")])
    except DroppedRow as reason:
        # The last one: all but a greeting was cut off.
        if str(reason).startswith(("empty ", "the unknown roles", "no turn to train on")):
            return None
        raise
    if any(note.startswith("cut off") for note in made.notes):
        return None
    return model.template.encode_prompt(made.messages[:-1])


def prompted_with(model: ChatModel, asked: list[Any], system_prompt: str | None) -> list[int]:
    return encode_prompts(model, [asked], chat=True, system_prompt=system_prompt, tools=None)[0]


@pytest.mark.parametrize("name", NAMES["system"])
def test_the_conversations_own_system_message_wins_in_any_spelling(model: ChatModel, name: str) -> None:
    own = [{"role": name, "content": "Be brief."}, user("Hi")]
    [answer] = handspun.generate(model, [own], system_prompt="Be kind.", max_new_tokens=1)
    prompt = model.tokenizer.decode(answer.prompt_token_ids)
    assert prompt.count("<|im_start|>system") == 1
    assert "Be brief." in prompt
    trained = conversation("messages", "Be kind.", messages=[*own, assistant()])
    assert trained.messages[:2] == [{"role": "system", "content": "Be brief."}, user("Hi")]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [user("a"), {"role": "agent", "content": "x"}],
            "prompt 1, message 2 cannot be used: the unknown role 'agent'. Known roles, in any",
        ),
        ([{"content": "x"}], "prompt 1 cannot be used: a message without a role."),
        ([user(5)], "prompt 1 cannot be used: a user message whose content is a number."),
    ],
)
def test_a_prompts_message_that_cannot_be_read_is_named(model: ChatModel, messages: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        handspun.generate(model, [messages], max_new_tokens=1)
    assert str(caught.value).startswith(message)
