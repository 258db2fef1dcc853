"""POST /v1/responses, OpenAI's newer interface. Nothing is stored: each request holds its whole conversation."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.serve.answers import TicketStream, finish_reason, log_answers, usage
from handspun.serve.chat import ChatForm, StreamedChoice, prepare_chat
from handspun.serve.errors import ApiError
from handspun.serve.logprobs import ShownTokens, chat_logprobs
from handspun.serve.schemas import (
    ChatRequest,
    ResponseItem,
    ResponsesRequest,
    ResponseText,
    ResponseToolName,
    read,
)
from handspun.serve.served import Context
from handspun.serve.tool_deltas import ToolDeltas
from handspun.serve.translate import refuse

_FIELD_OF = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "logprobs": "include",
}
"""This endpoint's names of a chat request's fields."""

Event = dict[str, Any]


async def responses(context: Context, body: ResponsesRequest) -> dict[str, Any] | AsyncIterator[dict[str, Any]]:
    """Return a response, or the events of its stream."""
    with _own_names():
        form = await prepare_chat(context, as_chat(body))
    ticket = form.prepared.submit(context)
    events = TicketStream(ticket, response_events(context, aiter(ticket), form, body))
    if body.stream:
        return events
    last: Event = {}
    try:
        async for event in events:
            last = event
    finally:
        await events.aclose()
    response: dict[str, Any] = last["response"]
    return response


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """Return the same as a chat request. Raises ApiError."""
    values: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "max_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "min_p": body.min_p,
        "seed": body.seed,
        "cache_salt": body.cache_salt,
        "parallel_tool_calls": body.parallel_tool_calls,
        "top_logprobs": body.top_logprobs,
        "logprobs": bool(body.include) or body.top_logprobs is not None,
        "response_format": _response_format(body),
        "tool_choice": body.tool_choice,
    }
    if body.tools:
        values["tools"] = [
            {"type": "function", "function": tool.model_dump(exclude={"type"}, exclude_none=True)}
            for tool in body.tools
        ]
    if isinstance(body.tool_choice, ResponseToolName):
        values["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    return read(ChatRequest, {name: value for name, value in values.items() if value is not None})


@contextmanager
def _own_names() -> Iterator[None]:
    """Name the fields of refusals as this endpoint does."""
    try:
        yield
    except ApiError as error:
        name = (error.param or "").split(".")[0].split("[")[0]
        if name in _FIELD_OF:
            own = _FIELD_OF[name]
            error.param = own
            error.message = error.message.replace(name, own)
        raise


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    """Return the conversation as messages. Calls belong to the assistant's message before them."""
    items = [ResponseItem(role="user", content=body.input)] if isinstance(body.input, str) else body.input
    messages: list[dict[str, Any]] = []
    names: dict[str | None, str | None] = {}
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if item.type == "message":
            messages.append({"role": _needed(item.role, f"{where}.role"), "content": _text(item.content, where)})
        elif item.type == "function_call":
            names[item.call_id] = item.name
            call = {"name": _needed(item.name, f"{where}.name"), "arguments": item.arguments or "{}"}
            if not (messages and messages[-1]["role"] == "assistant"):
                messages.append({"role": "assistant", "content": ""})
            one = {"type": "function", "id": item.call_id, "function": call}
            messages[-1].setdefault("tool_calls", []).append(one)
        else:
            call_id = _needed(item.call_id, f"{where}.call_id")
            result = {"role": "tool", "content": _text(item.output, where), "tool_call_id": call_id}
            messages.append({**result, "name": names.get(call_id)})
    if body.instructions is None:
        return messages
    if messages[0]["role"] in ("system", "developer"):
        text = f"{body.instructions}\n\n{messages[0]['content']}"
        return [{**messages[0], "content": text}, *messages[1:]]
    return [{"role": "system", "content": body.instructions}, *messages]


def _needed(value: str | None, param: str) -> str:
    if value is None:
        raise ApiError(f"{param} is missing.", code="missing_required_parameter", param=param)
    return value


def _text(content: str | list[ResponseText] | None, where: str) -> str:
    if content is None:
        raise ApiError(f"{where} has no content.", code="missing_required_parameter", param=where)
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text is not None else None
    if form is None or form.type != "json_schema":
        return None if form is None else {"type": form.type}
    if form.schema_ is None:
        raise refuse("text.format.schema", "it is missing.")
    return {"type": "json_schema", "json_schema": {"name": form.name, "schema": form.schema_}}


@dataclass
class _Output:
    """The items of a response as they grow, and the events that tell them."""

    id: str
    has_logprobs: bool
    items: list[dict[str, Any]] = field(default_factory=list)
    text: str | None = None
    """Text of the message that is being written; None if there is none."""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def add_text(self, text: str, logprobs: list[dict[str, Any]]) -> Iterator[Event]:
        """Yield the events of more text. A message begins with the first."""
        if self.text is None:
            self.text, self.logprobs = "", []
            message = {"type": "message", "id": self._item_id("msg"), "role": "assistant"}
            self.items.append({**message, "status": "in_progress", "content": []})
            yield self._item_event("response.output_item.added")
            yield {**self._place("response.content_part.added"), "part": _part("", [])}
        self.text += text
        self.logprobs += logprobs
        if text or logprobs:
            yield {**self._place("response.output_text.delta"), "delta": text, "logprobs": logprobs}

    def end_text(self, status: str = "completed") -> Iterator[Event]:
        """Yield the events that end a message, if there is one."""
        if self.text is None:
            return
        part = _part(self.text, self.logprobs)
        yield {**self._place("response.output_text.done"), "text": self.text, "logprobs": self.logprobs}
        yield {**self._place("response.content_part.done"), "part": part}
        self.items[-1] = {**self.items[-1], "status": status, "content": [part]}
        yield self._item_event("response.output_item.done")
        self.text = None

    def add_call(self, call: dict[str, Any]) -> Iterator[Event]:
        """Yield the events of a function call."""
        yield from self.end_text()
        function = call["function"]
        item = {
            "type": "function_call",
            "id": self._item_id("fc"),
            "call_id": call["id"],
            "name": function["name"],
        }
        self.items.append({**item, "arguments": "", "status": "in_progress"})
        yield self._item_event("response.output_item.added")
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        text = function["arguments"]
        yield {"type": "response.function_call_arguments.delta", **place, "delta": text}
        yield {"type": "response.function_call_arguments.done", **place, "name": item["name"], "arguments": text}
        self.items[-1] = {**item, "arguments": text, "status": "completed"}
        yield self._item_event("response.output_item.done")

    def _item_id(self, kind: str) -> str:
        name = f"{self.id}/{len(self.items)}"
        return f"{kind}_{hashlib.sha256(name.encode()).hexdigest()[:24]}"

    def _item_event(self, kind: str) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, "item": self.items[-1]}

    def _place(self, kind: str) -> Event:
        place = {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}
        return {"type": kind, **place}


def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


async def response_events(
    context: Context, chunks: AsyncIterator[GenerationChunk], form: ChatForm, body: ResponsesRequest
) -> AsyncGenerator[Event]:
    """Yield the events of a stream. The last holds the whole response."""
    words = form.prepared.model.vocabulary
    identity = form.id.replace("chatcmpl-", "resp_")
    choice = StreamedChoice(
        0,
        ToolDeltas(identity) if form.reads_calls else None,
        ShownTokens(words) if form.body.logprobs else None,
    )
    output = _Output(identity, bool(form.body.logprobs))
    begun = {**_response(identity, form, body), "status": "in_progress", "output": []}
    number, result = 0, None

    def numbered(events: Iterator[Event]) -> Iterator[Event]:
        nonlocal number
        for event in events:
            yield {**event, "sequence_number": number}
            number += 1

    async for chunk in chunks:
        if number == 0:
            kinds = ("response.created", "response.in_progress")
            for event in numbered(iter([{"type": kind, "response": begun} for kind in kinds])):
                yield event
        content, calls, tokens = choice.deltas(chunk, form.end_of(chunk.result))
        result = chunk.result or result
        logprobs = chat_logprobs(tokens, words)["content"] if tokens else []
        if content or logprobs:
            for event in numbered(output.add_text(content, logprobs)):
                yield event
        for call in calls:
            for event in numbered(output.add_call(call)):
                yield event
    assert result is not None
    for event in numbered(_end(context, output, form, result, begun)):
        yield event


def _end(
    context: Context, output: _Output, form: ChatForm, result: GenerationResult, begun: dict[str, Any]
) -> Iterator[Event]:
    """Yield the last events: what is still open ends, and the whole response."""
    is_cut = finish_reason(result.finish_reason) == "length"
    status = "incomplete" if is_cut else "completed"
    if not output.items:
        yield from output.add_text("", [])
    yield from output.end_text(status)
    counts = usage(form.prepared, [result])
    log_answers(context, counts, [status])
    response = {
        **begun,
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": output.items,
        "usage": {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        },
    }
    yield {"type": f"response.{status}", "response": response}


def _response(identity: str, form: ChatForm, body: ResponsesRequest) -> dict[str, Any]:
    """Return the members of a response that are known before its answer."""
    given = body.model_dump(mode="json", by_alias=True, exclude_none=True)
    options = form.prepared.requests[0].options
    return {
        "id": identity,
        "object": "response",
        "created_at": form.created,
        "model": form.prepared.model.name,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "store": False,
        "temperature": options.temperature if options.do_sample else 0.0,
        "text": given.get("text", {"format": {"type": "text"}}),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": given.get("tools", []),
        "top_logprobs": body.top_logprobs or 0,
        "top_p": options.top_p,
        "truncation": "disabled",
        "usage": None,
        "handspun": {"seed": form.prepared.seed, "system_fingerprint": form.prepared.model.fingerprint},
    }
