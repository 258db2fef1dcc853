"""POST /v1/chat/completions."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from handspun.decoding.prompts import read_conversation, read_tool_definitions
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.decoding.tool_calls import CLOSING_TAG
from handspun.models.embedding_rows import check_prompt
from handspun.serve.answers import TicketStream, collect, details, finish_reason, log_answers, tree_nodes, usage
from handspun.serve.completions import check_token_ids
from handspun.serve.logprobs import ScoredToken, ShownTokens, chat_logprobs, shown_tokens
from handspun.serve.schemas import (
    ChatMessage,
    ChatRequest,
    ExplainRequest,
    NamedTool,
    RefusalPart,
    Tool,
    at_most,
)
from handspun.serve.served import Context, ServedModel
from handspun.serve.tool_deltas import ToolDeltas, delta_of
from handspun.serve.translate import Prepared, Wanted, as_api_errors, prepare, refuse


@dataclass(frozen=True)
class ChatForm:
    """What the dicts of an answer are made of, besides its chunks."""

    id: str
    prepared: Prepared
    body: ChatRequest
    created: int
    ends_behind_call: bool = False
    """Whether the closing tag of the first call ends an answer, as a stop string."""

    @property
    def reads_calls(self) -> bool:
        """Whether tool calls are read from the answers."""
        return bool(self.body.tools) and self.body.tool_choice != "none"

    def header(self, kind: str) -> dict[str, Any]:
        """Return the members that all dicts of an answer share. kind: their `object`."""
        model = self.prepared.model
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def end_of(self, result: GenerationResult | None) -> str:
        """Return the text that the stop string behind a call has cut off."""
        is_cut = self.ends_behind_call and result is not None and result.stop_string == CLOSING_TAG
        return CLOSING_TAG if is_cut else ""


async def chat_completions(context: Context, body: ChatRequest) -> dict[str, Any] | AsyncIterator[dict[str, Any]]:
    """Return an answer, or the events of its stream."""
    form = await prepare_chat(context, body)
    prepared, progress = form.prepared, None
    if body.stream and body.return_progress:
        progress = PromptProgress(asyncio.get_running_loop())
        requests = [replace(request, on_prompt=progress.report) for request in prepared.requests]
        prepared = replace(prepared, requests=requests)
    ticket = prepared.submit(context)
    if body.stream:
        chunks = aiter(ticket) if progress is None else with_progress(aiter(ticket), progress)
        return TicketStream(ticket, chat_events(context, chunks, form))
    return chat_completion(context, await collect(ticket), form)


async def prepare_chat(context: Context, body: ChatRequest, *, max_tokens: int | None = None) -> ChatForm:
    """Return a body's requests and the form of their answers. Raises ApiError.

    max_tokens: of an answer, if the endpoint has its own field for it.
    """
    check_conversation(body.messages, body.tools)
    if body.top_logprobs is not None:
        at_most(body.top_logprobs, context.limits.max_top_logprobs, "top_logprobs", "alternatives per token")
        if not body.logprobs:
            raise refuse("top_logprobs", "it needs logprobs: true.")
    if body.return_progress and not body.stream:
        raise refuse("return_progress", "it needs stream: true.")
    called = called_tools(body)
    has_one_call = body.parallel_tool_calls is False or isinstance(body.tool_choice, NamedTool)
    reads_calls = bool(body.tools) and body.tool_choice != "none"
    ends_behind_call = reads_calls and not called and body.parallel_tool_calls is False
    wanted = Wanted(
        is_chat=True,
        max_tokens=_max_tokens(body) if max_tokens is None else max_tokens,
        called_tools=called,
        several_calls=not has_one_call,
        more_stop_strings=(CLOSING_TAG,) if ends_behind_call else (),
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        answer_token_ids=body.answer_token_ids,
    )
    if reads_calls and not called and _is_constrained(body):
        raise refuse(
            "tools",
            "an answer that is constrained cannot call a tool. Use tool_choice none, or remove the constraint.",
        )
    if body.answer_token_ids and (body.use_beam_search or (body.num_beams or 1) > 1):
        raise refuse("answer_token_ids", "a beam search begins at the answer's beginning. Remove one of them.")

    def prompts(model: ServedModel) -> list[list[int]]:
        check_token_ids(model, body.answer_token_ids, "answer_token_ids")
        return [encode_messages(model, body)]

    prepared = await prepare(context, body, wanted, prompts)
    if len(body.answer_token_ids) >= (most := prepared.requests[0].max_new_tokens):
        raise refuse("answer_token_ids", f"the answer ends after {most:,} tokens, and they are as many.")
    identity = f"chatcmpl-{body.request_id or context.request_id}"
    return ChatForm(identity, prepared, body, int(time.time()), ends_behind_call)


def check_conversation(messages: Sequence[ChatMessage], tools: Sequence[Tool] | None) -> None:
    """Raise ApiError for a conversation or tools that no model could read."""
    names = [tool.function.name for tool in tools or ()]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise refuse("tools", f"two tools are named {twice!r}. Rename one.")
    for index, message in enumerate(messages):
        has_text = message.content is not None
        if not has_text and not (message.role == "assistant" and (message.tool_calls or message.refusal)):
            raise refuse(f"messages[{index}].content", "it is missing or null (expected text).")
        if message.tool_calls and message.role != "assistant":
            raise refuse(f"messages[{index}].tool_calls", "only an assistant's message has calls.")
        if message.role != "assistant" and message.reasoning_content:
            raise refuse(f"messages[{index}].reasoning_content", "only an assistant's message has it.")


def called_tools(body: ChatRequest | ExplainRequest) -> list[dict[str, Any]]:
    """Return the tools of which one must be called; none if the model may choose. Raises ApiError."""
    choice = body.tool_choice
    if choice not in (None, "none") and not body.tools:
        raise refuse("tool_choice", "it needs tools.")
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool["function"]["name"] == choice.function.name]
        if not named:
            raise refuse("tool_choice", f"there is no tool named {choice.function.name!r} in tools.")
        return named
    return tools if choice == "required" else []


def encode_messages(model: ServedModel, body: Any) -> list[int]:
    """Return the prompt's ids of a body with messages. Raises ApiError."""
    messages, tools, goes_on = conversation_of(body)
    with as_api_errors("messages"):
        ids = model.chat.template.encode_prompt(messages, tools, continue_final_message=goes_on)
        check_prompt(ids, model.chat.model, model.chat.tokenizer, "the messages")
    return ids


def conversation_of(body: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]:
    """Return messages and tools in the template's form, and whether the last message goes on. Raises ApiError."""
    goes_on = bool(getattr(body, "continue_final_message", None))
    adds_prompt = getattr(body, "add_generation_prompt", None)
    if adds_prompt is not None and adds_prompt == goes_on:
        raise refuse("add_generation_prompt", "it is the opposite of continue_final_message. Remove one of them.")
    is_assistant = body.messages[-1].role == "assistant"
    if is_assistant and not goes_on:
        raise refuse(
            "messages",
            "the last one is the assistant's. End with another, or set continue_final_message to go on.",
        )
    if goes_on and not is_assistant:
        raise refuse("continue_final_message", "the last message is not the assistant's.")
    has_tools = getattr(body, "tool_choice", None) != "none"
    with as_api_errors("tools"):
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if has_tools else []
        read_tools = read_tool_definitions(tools or None)
    with as_api_errors("messages"):
        messages = read_conversation([as_message(message) for message in body.messages], 1, None)
    if goes_on and (messages[-1].get("tool_calls") or not messages[-1]["content"].strip()):
        raise refuse("continue_final_message", "the last message has no text to go on from.")
    return messages, read_tools, goes_on


def as_message(message: ChatMessage) -> dict[str, Any]:
    """Return a message in the form of training data, with the content as one text."""
    parts = [message.content] if isinstance(message.content, str) else message.content or []
    texts = [part if isinstance(part, str) else part.refusal if isinstance(part, RefusalPart) else part.text
             for part in parts]  # fmt: skip
    made: dict[str, Any] = {"role": message.role, "content": "".join(texts) or message.refusal or ""}
    if message.tool_calls:
        made["tool_calls"] = [call.model_dump(exclude={"index"}, exclude_none=True) for call in message.tool_calls]
    for name in ("tool_call_id", "reasoning_content"):
        if (value := getattr(message, name)) is not None:
            made[name] = value
    if message.role == "tool" and message.name is not None:
        made["name"] = message.name
    return made


def _max_tokens(body: ChatRequest) -> int | None:
    older, newer = body.max_tokens, body.max_completion_tokens
    if older is not None and newer is not None and older != newer:
        raise refuse("max_tokens", f"it is {older}, and max_completion_tokens is {newer}. Give one of them.")
    return older if newer is None else newer


def _is_constrained(body: ChatRequest) -> bool:
    form = body.response_format
    has_form = form is not None and form.type != "text"
    others = (body.structured_outputs, body.guided_json, body.guided_regex, body.guided_choice)
    return has_form or any(value is not None for value in others)


def chat_completion(context: Context, results: Sequence[GenerationResult], form: ChatForm) -> dict[str, Any]:
    """Return the whole answer."""
    given = [*results] * form.prepared.copies  # a search may find fewer than were asked for
    choices = [_choice(form, result, index) for index, result in enumerate(given)]
    counts = usage(form.prepared, results)
    log_answers(context, counts, [choice["finish_reason"] for choice in choices])
    answer: dict[str, Any] = {**form.header("chat.completion"), "choices": choices, "usage": counts}
    if form.body.return_token_ids:
        answer["prompt_token_ids"] = form.prepared.requests[0].prompt_token_ids
    return {**answer, "handspun": {"seed": form.prepared.seed}}


def _choice(form: ChatForm, result: GenerationResult, index: int) -> dict[str, Any]:
    text = result.text + form.end_of(result)
    calls: list[dict[str, Any]] = []
    if form.reads_calls:
        deltas = ToolDeltas(f"{form.id}/{index}")
        text = deltas.push(text)[0] + deltas.finish()[0]
        calls = deltas.calls
    message = {"role": "assistant", "content": None if calls and not text else text, "refusal": None}
    shown = shown_tokens(result, form.prepared.model.vocabulary) if form.body.logprobs else None
    choice: dict[str, Any] = {
        "index": index,
        "message": {**message, "tool_calls": calls} if calls else message,
        "logprobs": None if shown is None else chat_logprobs(shown, form.prepared.model.vocabulary),
        "finish_reason": finish_reason(result.finish_reason, has_calls=bool(calls)),
    }
    if form.body.return_token_ids:
        choice["token_ids"] = result.token_ids
    return {**choice, **details(result, form.prepared.model.vocabulary)}


@dataclass
class StreamedChoice:
    """One choice of a stream: what its chunks add."""

    index: int
    calls: ToolDeltas | None
    shown: ShownTokens | None
    has_begun: bool = False

    def deltas(self, chunk: GenerationChunk, end: str) -> tuple[str, list[dict[str, Any]], list[ScoredToken]]:
        """Return the new content, the new calls with their numbers, and the tokens that are shown now."""
        tokens = [] if self.shown is None else self.shown.push(chunk)
        if self.calls is None:
            return chunk.text, [], tokens
        before = len(self.calls.calls)
        content, _ = self.calls.push(chunk.text + end)
        if chunk.finish_reason is not None:
            content += self.calls.finish()[0]
        new = self.calls.calls[before:]
        return content, [delta_of(call, before + number) for number, call in enumerate(new)], tokens


async def chat_events(
    context: Context, chunks: AsyncIterator["GenerationChunk | dict[str, Any]"], form: ChatForm
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the events of a stream. chunks: of one prompt's answers; dicts among them are told as they are."""
    prepared, body = form.prepared, form.body
    has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    header = form.header("chat.completion.chunk")
    unused: dict[str, Any] = {"usage": None} if has_usage else {}
    choices = [
        StreamedChoice(
            index,
            ToolDeltas(f"{form.id}/{index}") if form.reads_calls else None,
            ShownTokens(prepared.model.vocabulary) if body.logprobs else None,
        )
        for index in range(prepared.choices)
    ]
    results: dict[int, GenerationResult] = {}
    reasons = []
    async for chunk in chunks:
        if isinstance(chunk, dict):
            yield {**header, "choices": [], **chunk, **unused}
            continue
        if chunk.result is not None:
            results[chunk.return_index] = chunk.result
        same = choices if prepared.copies > 1 else [choices[chunk.return_index]]
        for choice in same:
            for event in _choice_events(choice, chunk, form):
                if event["finish_reason"] is not None:
                    reasons.append(event["finish_reason"])
                is_first = "role" in event["delta"]
                extra: dict[str, Any] = {"handspun": {"seed": prepared.seed}} if is_first else {}
                if is_first and body.return_token_ids:
                    extra["prompt_token_ids"] = prepared.requests[0].prompt_token_ids
                yield {**header, "choices": [event], **unused, **extra}
    counts = usage(prepared, list(results.values()))
    log_answers(context, counts, reasons)
    if has_usage:
        yield {**header, "choices": [], "usage": counts}


def _choice_events(choice: StreamedChoice, chunk: GenerationChunk, form: ChatForm) -> list[dict[str, Any]]:
    """Return what a chunk adds to a choice: its role first, then text or calls, and at last the finish reason."""
    events: list[dict[str, Any]] = []

    def add(delta: dict[str, Any], reason: str | None = None, **more: Any) -> None:
        events.append({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": reason, **more})

    if not choice.has_begun:
        choice.has_begun = True
        add({"role": "assistant", "content": ""})
    content, calls, tokens = choice.deltas(chunk, form.end_of(chunk.result))
    delta: dict[str, Any] = {"tool_calls": calls} if calls else {}
    if content or not calls:
        delta["content"] = content
    more: dict[str, Any] = {}
    if form.body.logprobs and tokens:
        more["logprobs"] = chat_logprobs(tokens, form.prepared.model.vocabulary)
    if form.body.return_token_ids and chunk.token_ids:
        more["token_ids"] = chunk.token_ids
    if chunk.tree_nodes:
        more["tree_nodes"] = tree_nodes(chunk.tree_nodes, form.prepared.model.vocabulary)
    if content or calls or more:
        add(delta, **more)
    if chunk.finish_reason is not None:
        has_calls = choice.calls is not None and bool(choice.calls.calls)
        found = {} if chunk.result is None else details(chunk.result, form.prepared.model.vocabulary)
        add({}, finish_reason(chunk.finish_reason, has_calls=has_calls), **found)
    return events


class PromptProgress:
    """How far a prompt has been read, from the engine's thread to the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.reports: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
        self._loop = loop

    def report(self, done: int, total: int) -> None:
        """Note a number of prompt tokens that are read. Called by the engine thread."""
        try:
            self._loop.call_soon_threadsafe(self.reports.put_nowait, (done, total))
        except RuntimeError:  # the loop has been closed: nobody waits
            return


async def with_progress(
    chunks: AsyncIterator[GenerationChunk], progress: PromptProgress
) -> AsyncGenerator[GenerationChunk | dict[str, Any]]:
    """Yield the chunks, and before them reports of how far the prompt is read, as llama.cpp's server has them."""
    began, next_chunk = time.monotonic(), asyncio.ensure_future(anext(chunks))
    try:
        while not next_chunk.done():
            report = asyncio.ensure_future(progress.reports.get())
            await asyncio.wait({next_chunk, report}, return_when=asyncio.FIRST_COMPLETED)
            if report.done():
                done, total = report.result()
                milliseconds = round(1000 * (time.monotonic() - began))
                yield {"prompt_progress": {"total": total, "processed": done, "time_ms": milliseconds}}
            else:
                report.cancel()
        yield await next_chunk
    finally:
        next_chunk.cancel()
    async for chunk in chunks:
        yield chunk
