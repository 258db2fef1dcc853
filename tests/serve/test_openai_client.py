"""OpenAI's own client over every feature, against a real server."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from live import HI, Live, live, live_chat

SAMPLED: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 12, "seed": 5}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Place(BaseModel):
    """What an answer must be."""

    city: Literal["Paris", "Rome"]
    is_capital: bool


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(live_chat()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Live) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "handspun"


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**SAMPLED)
    chunks = list(client.chat.completions.create(**SAMPLED, stream=True, stream_options={"include_usage": True}))
    *_, last, counts = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert last.choices[0].finish_reason == whole.choices[0].finish_reason
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-2]] == [None] * (len(chunks) - 2)
    assert [chunk.choices[0].delta.role for chunk in chunks[:-1]] == ["assistant", *[None] * (len(chunks) - 2)]
    assert (counts.choices, counts.usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert {chunk.usage for chunk in chunks[:-1]} == {None}
    assert {(chunk.id, chunk.created, chunk.system_fingerprint) for chunk in chunks} == {
        (last.id, last.created, whole.system_fingerprint)
    }


def test_each_choice_of_a_stream_is_its_choice_of_the_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**SAMPLED, n=4)
    texts, roles, reasons = ([""] * 4, [0] * 4, [list[str]() for _ in range(4)])
    for chunk in client.chat.completions.create(**SAMPLED, n=4, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role is not None
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 4
    assert (roles, reasons) == ([1] * 4, [[choice.finish_reason] for choice in whole.choices])
    assert whole.usage.prompt_tokens == client.chat.completions.create(**SAMPLED).usage.prompt_tokens


def test_the_helper_for_streams_rebuilds_the_answer(client: openai.OpenAI) -> None:
    asked = {**SAMPLED, "max_tokens": 60, "extra_body": {"guided_regex": "[a-z]{5,20}z"}}
    with client.chat.completions.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        rebuilt = stream.get_final_completion()
    expected = client.chat.completions.create(**asked).choices[0].message.content
    assert "".join(deltas) == rebuilt.choices[0].message.content == expected
    with client.chat.completions.stream(**SAMPLED) as stream, pytest.raises(openai.LengthFinishReasonError):
        stream.get_final_completion()


def test_a_seed_repeats_an_answer_and_no_seed_draws_another(client: openai.OpenAI) -> None:
    def text(**options: Any) -> str | None:
        return client.chat.completions.create(**{**SAMPLED, **options}).choices[0].message.content

    assert text() == text() == text(temperature=1)
    assert text(temperature=0) == text(temperature=0, seed=6)
    assert len({text(seed=None) for _ in range(5)}) > 1


def test_a_stop_string_ends_the_answer(client: openai.OpenAI) -> None:
    text = client.chat.completions.create(**SAMPLED).choices[0].message.content or ""
    stop = text[3:5]
    cut = text[: text.index(stop)]
    for stops in (stop, [stop, "no such text"]):
        answer = client.chat.completions.create(**SAMPLED, stop=stops).choices[0]
        assert (answer.message.content, answer.finish_reason) == (cut, "stop")
        chunks = list(client.chat.completions.create(**SAMPLED, stop=stops, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == cut


def test_log_probabilities_are_per_token(client: openai.OpenAI) -> None:
    asked = {**SAMPLED, "logprobs": True, "top_logprobs": 3}
    answer = client.chat.completions.create(**asked).choices[0]
    content = answer.logprobs.content
    assert b"".join(bytes(one.bytes) for one in content).decode("utf-8", "replace") == answer.message.content
    for one in content:
        assert [len(one.top_logprobs), one.logprob <= 0] == [3, True]
        assert one.logprob <= one.top_logprobs[0].logprob
    streamed = [
        one
        for chunk in client.chat.completions.create(**asked, stream=True)
        for one in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else [])
    ]
    assert streamed == content
    only = client.chat.completions.create(**SAMPLED, logprobs=True, top_logprobs=0).choices[0].logprobs.content
    assert [(one.logprob, one.top_logprobs) for one in only] == [(one.logprob, []) for one in content]


def test_logit_bias_decides_the_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**{**SAMPLED, "max_tokens": 3}, logit_bias={"65": 100})
    one = client.completions.create(model="tiny", prompt=[65], max_tokens=0, echo=True).choices[0].text
    assert answer.choices[0].message.content == one * 3


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_streamed_call_is_rebuilt(client: openai.OpenAI, choice: Any) -> None:
    asked = {**SAMPLED, "tools": [WEATHER], "tool_choice": choice, "max_tokens": 200, "parallel_tool_calls": False}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    with client.chat.completions.stream(**asked) as stream:
        rebuilt = stream.get_final_completion().choices[0]
    assert rebuilt.finish_reason == "tool_calls"
    [call], [again] = whole.message.tool_calls, rebuilt.message.tool_calls
    assert call.function.name == again.function.name == "weather"
    assert call.function.arguments == again.function.arguments
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert call.id
    assert again.id
    assert (rebuilt.message.content or None) == whole.message.content


def test_a_call_and_its_result_are_read_back(client: openai.OpenAI) -> None:
    asked = {**SAMPLED, "tools": [WEATHER], "max_tokens": 200}
    call = client.chat.completions.create(**asked, tool_choice="required").choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "sunny"}
    messages = [*HI, call.model_dump(exclude_none=True), result]
    assert client.chat.completions.create(**{**asked, "messages": messages, "max_tokens": 4}).choices[0].message


def test_an_answer_is_parsed(client: openai.OpenAI) -> None:
    asked = {**SAMPLED, "max_tokens": 300}
    parsed = client.chat.completions.parse(**asked, response_format=Place).choices[0].message.parsed
    assert isinstance(parsed, Place)
    with client.chat.completions.stream(**asked, response_format=Place) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed


def test_json_object_is_an_object(client: openai.OpenAI) -> None:
    asked = {**SAMPLED, "max_tokens": 400, "temperature": 0}
    answer = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    assert answer.message.content.lstrip().startswith("{")


def test_vllm_extras_are_taken(client: openai.OpenAI) -> None:
    def text(**extra: Any) -> str | None:
        return client.chat.completions.create(**SAMPLED, extra_body=extra).choices[0].message.content

    assert (
        text(top_k=1) == client.chat.completions.create(**{**SAMPLED, "temperature": 0}).choices[0].message.content
    )
    assert text(guided_choice=["red", "green"]) in ("red", "green")
    assert text(structured_outputs={"regex": "[ab]{3}c"})[-1] == "c"
    assert text(num_beams=3) == text(use_beam_search=True, num_beams=3)


def test_completions_take_text_ids_and_several(server: Live, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    ids = server.answer("/tokenize", content="Give me a")["tokens"]
    one = client.completions.create(**asked, prompt="Give me a")
    assert client.completions.create(**asked, prompt=ids).choices[0].text == one.choices[0].text
    several = client.completions.create(**asked, prompt=["Give me a", "List"], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in several.choices[:2]] == [one.choices[0].text] * 2
    assert client.completions.create(**asked, prompt=[ids, ids]).choices[1].text == one.choices[0].text
    streamed = "".join(
        chunk.choices[0].text for chunk in client.completions.create(**asked, prompt=ids, stream=True)
    )
    assert streamed == one.choices[0].text


def test_completions_score_a_prompt(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Give me a", "temperature": 0}
    answer = client.completions.create(**asked, max_tokens=5, logprobs=2).choices[0]
    scored = client.completions.create(
        **{**asked, "prompt": "Give me a" + answer.text}, max_tokens=0, echo=True, logprobs=2
    )
    [choice] = scored.choices
    assert choice.text == "Give me a" + answer.text
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
    assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset) == scored.usage.prompt_tokens
    assert scored.usage.completion_tokens == 0
    assert len(answer.logprobs.tokens) == len(answer.logprobs.token_logprobs) == len(answer.logprobs.top_logprobs)
    zero = client.completions.create(**asked, max_tokens=5, logprobs=0).choices[0].logprobs
    assert zero.token_logprobs == answer.logprobs.token_logprobs


def test_best_of_is_the_best_of_its_answers(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 4, "seed": 2}
    four = client.completions.create(**asked, n=4, logprobs=0, extra_body={"ignore_eos": True}).choices
    best = max(four, key=lambda choice: sum(choice.logprobs.token_logprobs))
    assert (
        client.completions.create(**asked, best_of=4, extra_body={"ignore_eos": True}).choices[0].text == best.text
    )


def test_errors_are_the_client_s_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**SAMPLED, "model": "gpt-4o"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**{**SAMPLED, "temperature": 3})
    assert (wrong.value.param, wrong.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError, match="seed") as unknown:
        client.chat.completions.create(**SAMPLED, extra_body={"sed": 1})
    assert unknown.value.param == "sed"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[65] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="tiny", input="Hi")


def test_a_response_is_the_answer_of_a_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "Hi", "max_output_tokens": 12}
    seed = {"seed": 5}
    response = client.responses.create(**asked, extra_body=seed)
    expected = client.chat.completions.create(**SAMPLED).choices[0].message.content
    assert response.output_text == expected
    with client.responses.stream(**asked, extra_body=seed) as stream:
        events = list(stream)
    assert (events[0].type, events[-1].type) == ("response.created", "response.incomplete")
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == expected
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_is_parsed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "Hi", "text_format": Place, "max_output_tokens": 300}
    response = client.responses.parse(**asked, extra_body={"seed": 3})
    assert isinstance(response.output_parsed, Place)
    with client.responses.stream(**asked, extra_body={"seed": 3}) as stream:
        assert stream.get_final_response().output_parsed == response.output_parsed


def test_a_response_calls_a_tool(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", **WEATHER["function"]}
    response = client.responses.create(
        model="tiny", input="Hi", tools=[tool], tool_choice="required", max_output_tokens=200
    )
    [call] = [item for item in response.output if item.type == "function_call"][:1]
    assert (call.name, json.loads(call.arguments)["city"] in ("Paris", "Rome")) == ("weather", True)
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    items: Any = [{"role": "user", "content": "Hi"}, call.model_dump(exclude_none=True), output]
    assert client.responses.create(model="tiny", input=items, tools=[tool], max_output_tokens=4).output


async def answers_at_once(url: str, seeds: Sequence[int]) -> list[str | None]:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        asked = [client.chat.completions.create(**{**SAMPLED, "seed": seed}) for seed in seeds]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]


def test_the_async_client_asks_many_at_once(server: Live) -> None:
    found = asyncio.run(answers_at_once(server.url, [0, 1, 2, 3] * 6))
    assert found == found[:4] * 6
    assert len(set(found)) == 4
