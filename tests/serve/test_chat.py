"""/v1/chat/completions with a real engine thread."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

import handspun
from asking import Asker, served, served_chat
from handspun.serve.chat import chat_completions
from handspun.serve.schemas import ChatRequest

_HI = [{"role": "user", "content": "Tell me a joke about the city"}]
_TOOL = {"type": "function", "function": {"name": "weather", "parameters": {
    "type": "object", "properties": {"city": {"enum": ["Shanghai", "the city"]}}, "required": ["city"],
    "additionalProperties": False}}}  # fmt: skip
_TIME = {"type": "function", "function": {"name": "time"}}


@pytest.fixture(scope="module")
def server() -> Iterator[Asker]:
    with served(served_chat()) as asker:
        yield asker


def _ask(server: Asker, **body: Any) -> dict[str, Any]:
    return server.ask(chat_completions, ChatRequest, **{"messages": _HI, "max_tokens": 12, "seed": 5, **body})


def _stream(server: Asker, **body: Any) -> list[dict[str, Any]]:
    return server.stream(chat_completions, ChatRequest, **{"messages": _HI, "max_tokens": 12, "seed": 5, **body})


def _rebuilt(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choices of a stream, put together as OpenAI's clients do."""
    choices: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            own = choices.setdefault(
                choice["index"], {"index": choice["index"], "content": "", "calls": {}, "logprobs": [], "ids": []}
            )
            delta = choice["delta"]
            own["content"] += delta.get("content") or ""
            own["role"] = own.get("role", "") + delta.get("role", "")
            own["logprobs"] += (choice["logprobs"] or {"content": []})["content"]
            own["ids"] += choice.get("token_ids", [])
            for call in delta.get("tool_calls", []):
                kept = own["calls"].setdefault(call["index"], {"id": "", "name": "", "arguments": ""})
                kept["id"] += call.get("id", "")
                kept["name"] += call["function"].get("name", "")
                kept["arguments"] += call["function"].get("arguments", "")
            assert "finish_reason" not in own  # nothing comes after it
            if choice["finish_reason"] is not None:
                own["finish_reason"] = choice["finish_reason"]
    return [choices[index] for index in sorted(choices)]


def test_an_answer_has_openais_form(server: Asker) -> None:
    answer = _ask(server, model="tiny")
    assert answer["object"] == "chat.completion"
    assert answer["id"] == "chatcmpl-test"
    assert answer["model"] == "tiny"
    assert answer["system_fingerprint"].startswith("fp_")
    [choice] = answer["choices"]
    assert choice["index"] == 0
    assert choice["logprobs"] is None
    assert choice["message"].keys() == {"role", "content", "refusal"}
    assert choice["finish_reason"] in ("stop", "length")
    assert answer["handspun"] == {"seed": 5}
    assert server.log["completion_tokens"] == answer["usage"]["completion_tokens"]


def test_the_answer_is_that_of_generate(server: Asker) -> None:
    chat = server.models["tiny"].chat
    own = {"max_new_tokens": 12, "do_sample": True, "seed": (5,), "stop_strings": ("<|im_end|>",)}
    [expected] = handspun.generate(chat, [_HI], **own)  # type: ignore[arg-type]
    answer = _ask(server, return_token_ids=True, temperature=1)
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert answer["choices"][0]["token_ids"] == expected.token_ids
    assert answer["prompt_token_ids"] == expected.prompt_token_ids
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    assert answer["usage"]["completion_tokens"] == len(expected.token_ids)


@pytest.mark.parametrize(
    "body",
    [
        {}, {"n": 4}, {"temperature": 0}, {"temperature": 0, "n": 3}, {"logprobs": True, "top_logprobs": 3},
        {"num_beams": 3, "n": 2}, {"num_beams": 2, "logprobs": True}, {"stop": ["e", " the"]}, {"max_tokens": 1},
        {"tools": [_TOOL]}, {"logprobs": True, "stop": "t"}, {"prompt_lookup_num_tokens": 4, "temperature": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_stream_adds_up_to_the_answer(server: Asker, body: dict[str, Any]) -> None:
    whole = _ask(server, **body, return_token_ids=True)
    events = _stream(server, **body, return_token_ids=True, stream_options={"include_usage": True})
    *chunks, last = events
    assert last["usage"] | {"prompt_tokens_details": 0} == whole["usage"] | {"prompt_tokens_details": 0}
    assert last["choices"] == []
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["object"] for chunk in events} == {"chat.completion.chunk"}
    rebuilt = _rebuilt(chunks)
    assert [choice["role"] for choice in rebuilt] == ["assistant"] * len(whole["choices"])
    for choice, expected in zip(rebuilt, whole["choices"], strict=True):
        assert choice["content"] == (expected["message"]["content"] or "")
        assert choice["finish_reason"] == expected["finish_reason"]
        assert choice["ids"] == expected["token_ids"]
        assert choice["logprobs"] == (expected["logprobs"] or {"content": []})["content"]
    assert whole["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in whole["choices"])


def test_logprobs_list_the_tokens_that_are_shown(server: Asker) -> None:
    whole = _ask(server, logprobs=True, top_logprobs=2, return_token_ids=True)["choices"][0]
    entries = whole["logprobs"]["content"]
    assert (
        b"".join(bytes(entry["bytes"]) for entry in entries).decode("utf-8", "replace")
        == (whole["message"]["content"])
    )
    assert len(entries) > 3
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert all(entry["logprob"] <= entry["top_logprobs"][0]["logprob"] <= 0 for entry in entries)
    assert len({entry["logprob"] for entry in entries}) > 3


def test_tokens_behind_a_stop_string_are_not_listed(server: Asker) -> None:
    text = _ask(server)["choices"][0]["message"]["content"]
    stop = text[4:6]
    cut = _ask(server, stop=stop, logprobs=True, explain=True)["choices"][0]
    assert cut["message"]["content"] == text[: text.index(stop)]
    assert cut["finish_reason"] == "stop"
    shown = b"".join(bytes(entry["bytes"]) for entry in cut["logprobs"]["content"]).decode("utf-8", "replace")
    assert shown.startswith(cut["message"]["content"])
    assert len(cut["explanation"]) == len(cut["logprobs"]["content"])


def test_without_a_seed_answers_differ_and_the_seed_is_told(server: Asker) -> None:
    answers = [_ask(server, seed=None) for _ in range(5)]
    texts = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) > 1
    again = _ask(server, seed=answers[0]["handspun"]["seed"])
    assert again["choices"][0]["message"] == answers[0]["choices"][0]["message"]


def test_several_answers_of_a_seed_differ_and_the_first_is_the_one_alone(server: Asker) -> None:
    texts = [choice["message"]["content"] for choice in _ask(server, n=4)["choices"]]
    assert len(set(texts)) > 1
    assert texts[0] == _ask(server)["choices"][0]["message"]["content"]


def test_negative_seeds_are_taken(server: Asker) -> None:
    assert _ask(server, seed=-1)["handspun"]["seed"] == 2**64 - 1


def test_a_required_tool_is_called(server: Asker) -> None:
    body = {"tools": [_TOOL, _TIME], "tool_choice": "required", "max_tokens": 200, "parallel_tool_calls": False}
    [choice] = _ask(server, **body)["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    assert call["type"] == "function"
    assert isinstance(json.loads(call["function"]["arguments"]), dict)
    [streamed] = _rebuilt(_stream(server, **body))
    assert list(streamed["calls"].values()) == [{"id": call["id"], **call["function"]}]
    assert (streamed["content"], streamed["finish_reason"]) == ("", "tool_calls")


def test_required_calls_may_be_several_but_not_endless(server: Asker) -> None:
    """The bias makes the end of an answer impossible, as far as the grammar lets it go on."""
    never = {"320": -100, "322": -100}
    body = {"tools": [_TOOL], "tool_choice": "required", "max_tokens": 560, "logit_bias": never, "temperature": 0}
    messages = [{"role": "user", "content": "x"}]
    [choice] = _ask(server, messages=messages, **body)["choices"]
    assert len(choice["message"]["tool_calls"]) in range(2, 17)
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == len(choice["message"]["tool_calls"])


def test_a_named_tool_is_called_with_its_arguments(server: Asker) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    [answer] = _ask(server, tools=[_TIME, _TOOL], tool_choice=choice, max_tokens=200)["choices"]
    [call] = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Shanghai", "the city")


def test_no_tool_is_in_the_prompt_if_none_may_be_called(server: Asker) -> None:
    without = _ask(server)["usage"]["prompt_tokens"]
    assert _ask(server, tools=[_TOOL], tool_choice="none")["usage"]["prompt_tokens"] == without
    assert _ask(server, tools=[_TOOL])["usage"]["prompt_tokens"] > without


def test_a_schema_is_held_to(server: Asker) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    content = _ask(server, response_format=form, max_tokens=60)["choices"][0]["message"]["content"]
    assert json.loads(content)["a"] in (1, 2)
    for body in ({"guided_json": schema}, {"structured_outputs": {"json": json.dumps(schema)}}):
        assert json.loads(_ask(server, **body, max_tokens=60)["choices"][0]["message"]["content"])["a"] in (1, 2)
    [choice] = _ask(server, guided_choice=["red", "green"])["choices"]
    assert choice["message"]["content"] in ("red", "green")


def test_continue_final_message_goes_on_inside_the_message(server: Asker) -> None:
    messages = [*_HI, {"role": "assistant", "content": "The city"}]
    goes_on = _ask(server, messages=messages, continue_final_message=True, return_token_ids=True)
    own = {"max_new_tokens": 12, "do_sample": True, "seed": (5,), "continue_final_message": True}
    [expected] = handspun.generate(
        server.models["tiny"].chat, [messages], stop_strings=("<|im_end|>",), **own  # type: ignore[arg-type]
    )  # fmt: skip
    assert goes_on["choices"][0]["message"]["content"] == expected.text


def test_an_answer_goes_on_behind_its_own_tokens_as_if_they_had_been_drawn(server: Asker) -> None:
    body = {"return_token_ids": True, "logprobs": True}
    [whole] = _ask(server, **body)["choices"]
    begun = whole["token_ids"][:5]
    answer = _ask(server, **body, answer_token_ids=begun)
    [choice] = answer["choices"]
    assert choice["message"] == whole["message"]
    assert choice["token_ids"] == whole["token_ids"]
    assert answer["usage"]["completion_tokens"] == len(whole["token_ids"])
    [streamed] = _rebuilt(_stream(server, **body, answer_token_ids=begun))
    assert streamed["ids"] == whole["token_ids"][5:]
    assert whole["message"]["content"].endswith(streamed["content"])
    assert [one["logprob"] for one in streamed["logprobs"]] == [
        one["logprob"] for one in whole["logprobs"]["content"][5:]
    ]


def test_harmless_fields_change_nothing(server: Asker) -> None:
    harmless = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "reasoning_effort": "low",
    }
    assert _ask(server, **harmless)["choices"] == _ask(server)["choices"]


def test_stop_token_ids_end_an_answer(server: Asker) -> None:
    ids = _ask(server, return_token_ids=True)["choices"][0]["token_ids"]
    cut = _ask(server, stop_token_ids=[ids[3]], return_token_ids=True)["choices"][0]
    assert cut["token_ids"] == ids[: ids.index(ids[3]) + 1]
    assert cut["finish_reason"] == "stop"


def test_parts_of_content_are_joined(server: Asker) -> None:
    text = _HI[0]["content"]
    parts = [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]
    assert _ask(server, messages=[{"role": "user", "content": parts}])["choices"] == _ask(server)["choices"]


def test_beams_can_show_their_tree(server: Asker) -> None:
    answer = _ask(server, num_beams=2, show_tree=True)
    assert answer["choices"][0]["tree"][0]["parent"] is None


def test_the_tree_of_beams_is_streamed_step_by_step(server: Asker) -> None:
    whole = _ask(server, num_beams=3, n=3, show_tree=True)["choices"][0]["tree"]
    choices = [
        choice for event in _stream(server, num_beams=3, n=3, show_tree=True) for choice in event["choices"]
    ]
    steps = [choice["tree_nodes"] for choice in choices if "tree_nodes" in choice]
    assert len(steps) > 3
    assert [{**node, "return_index": None} for step in steps for node in step] == [
        {**node, "return_index": None} for node in whole
    ]
    assert [choice["tree"] for choice in choices if "tree" in choice] == [whole]
    assert b"".join(bytes(node["bytes"]) for node in whole).decode(errors="replace")


def test_progress_of_a_prompt_is_told(server: Asker) -> None:
    events = _stream(server, return_progress=True)
    assert _rebuilt(events)[0]["content"] == _ask(server)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"answer_token_ids": [330]}, "answer_token_ids"),
        ({"answer_token_ids": [1] * 12}, "answer_token_ids"),
        ({"answer_token_ids": [1], "num_beams": 2}, "answer_token_ids"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"n": 17}, "n"),
        ({"num_beams": 2, "n": 3}, "n"),
        ({"num_beams": 2, "temperature": 0.5}, "temperature"),
        ({"num_beams": 2, "explain": True}, "explain"),
        ({"show_tree": True}, "show_tree"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"330": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias"),
        ({"stop_token_ids": [330]}, "stop_token_ids"),
        ({"min_tokens": 13}, "min_tokens"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tools": [_TOOL, _TOOL]}, "tools"),
        ({"tools": [_TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [_TOOL], "guided_regex": "a"}, "tools"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": "a" * 4097}, "guided_regex"),
        ({"guided_json": "/etc/passwd"}, "guided_json"),
        ({"guided_json": {"type": "object", "minimun": 1}}, "guided_json"),
        ({"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"model": "../../etc/passwd"}, "model"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [*_HI, {"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": _HI, "continue_final_message": True}, "continue_final_message"),
        ({"messages": _HI, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": _HI * 2049}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 2000}]}, "messages"),
        ({"messages": [*_HI, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}, *_HI]}, "messages"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_what_cannot_be_is_refused(server: Asker, body: dict[str, Any], param: str, stream: bool) -> None:
    error = server.refused(
        chat_completions, ChatRequest, **{"messages": _HI, "max_tokens": 12, "stream": stream, **body}
    )
    assert (error.status, error.param) == (404 if param == "model" else 400, param)
    assert "--" not in error.message
    assert "passwd" not in error.message


def test_stream_options_need_a_stream(server: Asker) -> None:
    body = {"messages": _HI, "stream_options": {"include_usage": True}}
    assert server.refused(chat_completions, ChatRequest, **body).param == "stream_options"


def test_a_prompt_beyond_the_context_is_refused_with_both_counts(server: Asker) -> None:
    messages = [{"role": "user", "content": "a " * 2000}]
    error = server.refused(chat_completions, ChatRequest, messages=messages)
    assert error.code == "context_length_exceeded"
    assert error.details["n_ctx"] == 600
    assert error.details["n_prompt_tokens"] > 2000


@pytest.mark.parametrize("max_tokens", [1, 5, 4096, 10**8, None, 12.0])
def test_more_tokens_than_there_is_room_for_are_cut(server: Asker, max_tokens: Any) -> None:
    answer = _ask(server, max_tokens=max_tokens, ignore_eos=max_tokens == 5)
    assert 1 <= answer["usage"]["completion_tokens"] <= 600


def test_a_model_without_settings_samples_and_one_with_them_obeys() -> None:
    chat = served_chat()
    chat.model.generation_config.do_sample = False
    with served(chat) as greedy:
        answers = [_ask(greedy, seed=None)["choices"][0]["message"]["content"] for _ in range(3)]
        assert len(set(answers)) == 1
        assert greedy.models["tiny"].describe()["defaults"]["do_sample"] is False
        assert _ask(greedy, n=3)["usage"]["completion_tokens"] % 3 == 0


def test_a_beam_search_may_find_fewer_answers_than_were_asked_for(server: Asker) -> None:
    body = {"num_beams": 4, "n": 3, "structured_outputs": {"choice": ["yes", "no"]}}
    answer, events = _ask(server, **body), _stream(server, **body)
    assert sorted(choice["message"]["content"] for choice in answer["choices"]) == ["no", "yes"]
    assert sorted(choice["content"] for choice in _rebuilt(events)) == ["no", "yes"]
