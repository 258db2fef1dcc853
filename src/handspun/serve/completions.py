"""POST /v1/completions: plain text or token ids are continued, or only scored."""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from handspun.decoding.prompts import plain_ids
from handspun.decoding.results import GenerationChunk, GenerationResult
from handspun.models.embedding_rows import check_prompt
from handspun.serve.answers import TicketStream, collect, details, finish_reason, log_answers, tree_nodes, usage
from handspun.serve.logprobs import ShownTokens, completion_logprobs, prompt_tokens, shown_tokens
from handspun.serve.schemas import CompletionRequest, at_most
from handspun.serve.served import Context, ServedModel
from handspun.serve.translate import Prepared, Wanted, as_api_errors, prepare, refuse

Prompts = list[str] | list[list[int]]


@dataclass(frozen=True)
class CompletionForm:
    """What the dicts of an answer are made of, besides its chunks."""

    id: str
    prepared: Prepared
    body: CompletionRequest
    prompts: Prompts
    created: int

    def header(self) -> dict[str, Any]:
        """Return the members that all dicts of an answer share."""
        model = self.prepared.model
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def echo(self, prompt_index: int) -> str:
        """Return the text that stands in front of a prompt's answers."""
        if not self.body.echo:
            return ""
        prompt = self.prompts[prompt_index]
        return prompt if isinstance(prompt, str) else text_of(self.prepared.model, prompt)


async def completions(context: Context, body: CompletionRequest) -> dict[str, Any] | AsyncIterator[dict[str, Any]]:
    """Return an answer, or the events of its stream."""
    form = await _prepare(context, body)
    ticket = form.prepared.submit(context)
    if body.stream:
        return TicketStream(ticket, completion_events(context, aiter(ticket), form))
    return completion(context, await collect(ticket), form)


async def _prepare(context: Context, body: CompletionRequest) -> CompletionForm:
    prompts = _prompts(body.prompt)
    at_most(len(prompts), context.limits.max_prompts, "prompt", "prompts")
    if body.logprobs is not None:
        at_most(body.logprobs, context.limits.max_top_logprobs, "logprobs", "alternatives per token")
    best_of = body.best_of or 1
    if body.best_of is not None and best_of < (body.n or 1):
        raise refuse("best_of", f"it is {best_of}, and n is {body.n}: at most best_of answers can be returned.")
    if best_of > (body.n or 1) and body.stream:
        raise refuse("best_of", "the best answer is known only at the end. Remove stream, or best_of.")
    if body.echo and body.logprobs is not None and body.stream:
        raise refuse(
            "echo", "the prompt's log-probabilities are known only at the end. Remove stream, or logprobs."
        )
    wanted = Wanted(
        is_chat=False,
        max_tokens=body.max_tokens,
        allows_none=bool(body.echo),
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=bool(body.echo) and (body.logprobs is not None or body.max_tokens == 0),
        best_of=best_of,
    )
    prepared = await prepare(context, body, wanted, lambda model: [encode_text(model, one) for one in prompts])
    identity = f"cmpl-{body.request_id or context.request_id}"
    return CompletionForm(identity, prepared, body, prompts, int(time.time()))


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> Prompts:
    """Return a list of prompts, also for a single one. Raises ApiError."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise refuse("prompt", "it is empty (expected text, token ids, or a list of them).")
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt


def encode_text(model: ServedModel, prompt: str | list[int]) -> list[int]:
    """Return the ids of a prompt that is continued as it is. Raises ApiError."""
    ids = plain_ids(model.chat.tokenizer, prompt) if isinstance(prompt, str) else prompt
    if not ids:
        raise refuse("prompt", "it is empty, so there is nothing to continue. Give it at least one character.")
    if not isinstance(prompt, str):
        check_token_ids(model, ids, "prompt")
    with as_api_errors("prompt"):
        check_prompt(ids, model.chat.model, model.chat.tokenizer, "the prompt")
    return ids


def check_token_ids(model: ServedModel, ids: Sequence[int], param: str) -> None:
    """Raise ApiError for ids that the model does not have."""
    beyond = [token_id for token_id in ids if token_id >= model.token_ids]
    if beyond:
        raise refuse(param, f"{beyond[0]} is beyond the model's token ids, which end at {model.token_ids - 1}.")


def text_of(model: ServedModel, ids: Sequence[int]) -> str:
    """Return the text of token ids, special tokens included."""
    detokenizer, text = model.vocabulary.detokenizer(), ""
    for token_id in ids:
        name = model.vocabulary.special.get(token_id)
        text += detokenizer.push(token_id) if name is None else detokenizer.finish() + name
    return text + detokenizer.finish()


def completion(context: Context, results: Sequence[GenerationResult], form: CompletionForm) -> dict[str, Any]:
    """Return the whole answer."""
    prepared = form.prepared
    chosen: list[GenerationResult] = []
    for index in range(len(prepared.requests)):
        own = [result for result in results if result.prompt_index == index]
        if prepared.computed > prepared.choices:
            own = sorted(own, key=_mean_logprob, reverse=True)[: prepared.choices]
        chosen += own * prepared.copies
    choices = [_choice(form, result, index) for index, result in enumerate(chosen)]
    counts = usage(prepared, results)
    log_answers(context, counts, [choice["finish_reason"] for choice in choices])
    return {**form.header(), "choices": choices, "usage": counts, "handspun": {"seed": prepared.seed}}


def _mean_logprob(result: GenerationResult) -> float:
    values = result.logprobs or [0.0]
    return sum(values) / len(values)


def _choice(form: CompletionForm, result: GenerationResult, index: int) -> dict[str, Any]:
    words, echo = form.prepared.model.vocabulary, form.echo(result.prompt_index)
    logprobs = None
    if form.body.logprobs is not None:
        answer = shown_tokens(result, words, with_special=True) if result.token_ids else []
        moved = [token._replace(start=len(echo) + token.start) for token in answer]
        before = prompt_tokens(result, echo, words) if form.body.echo else []
        logprobs = completion_logprobs([*before, *moved], words, with_top=form.body.logprobs > 0)
    choice = {
        "index": index,
        "text": echo + result.text,
        "logprobs": logprobs,
        "finish_reason": finish_reason(result.finish_reason),
    }
    if form.body.return_token_ids:
        choice |= {"prompt_token_ids": result.prompt_token_ids, "token_ids": result.token_ids}
    return {**choice, **details(result, words)}


async def completion_events(
    context: Context, chunks: AsyncIterator[GenerationChunk], form: CompletionForm
) -> AsyncGenerator[dict[str, Any]]:
    """Yield the events of a stream."""
    prepared, body = form.prepared, form.body
    has_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    header: dict[str, Any] = form.header()
    unused: dict[str, Any] = {"usage": None} if has_usage else {}
    shown: dict[tuple[int, int], ShownTokens] = {}
    results, reasons = [], []
    async for chunk in chunks:
        if chunk.result is not None:
            results.append(chunk.result)
        key = (chunk.prompt_index, chunk.return_index)
        is_first = key not in shown
        tokens = shown.setdefault(key, ShownTokens(prepared.model.vocabulary, with_special=True))
        events = _chunk_events(form, chunk, tokens, is_first=is_first)
        copies = range(prepared.copies) if prepared.copies > 1 else [chunk.return_index]
        for copy in copies:
            for number, event in enumerate(events):
                index = chunk.prompt_index * prepared.choices + copy
                extra = {"handspun": {"seed": prepared.seed}} if is_first and number == 0 else {}
                yield {**header, "choices": [{"index": index, **event}], **unused, **extra}
                if event["finish_reason"] is not None:
                    reasons.append(event["finish_reason"])
    counts = usage(prepared, results)
    log_answers(context, counts, reasons)
    if has_usage:
        yield {**header, "choices": [], "usage": counts}


def _chunk_events(
    form: CompletionForm, chunk: GenerationChunk, tokens: ShownTokens, *, is_first: bool
) -> list[dict[str, Any]]:
    """Return what a chunk adds to a choice: text, and at last the finish reason."""
    words, body = form.prepared.model.vocabulary, form.body
    events: list[dict[str, Any]] = []
    text = (form.echo(chunk.prompt_index) if is_first else "") + chunk.text
    more: dict[str, Any] = {}
    if body.logprobs is not None and (new := tokens.push(chunk)):
        more["logprobs"] = completion_logprobs(new, words, with_top=body.logprobs > 0)
    if body.return_token_ids:
        if is_first:
            more["prompt_token_ids"] = form.prepared.requests[chunk.prompt_index].prompt_token_ids
        if chunk.token_ids:
            more["token_ids"] = chunk.token_ids
    if chunk.tree_nodes:
        more["tree_nodes"] = tree_nodes(chunk.tree_nodes, words)
    if text or more or is_first:
        events.append({"text": text, "logprobs": None, "finish_reason": None, **more})
    if chunk.finish_reason is not None:
        found = {} if chunk.result is None else details(chunk.result, words)
        events.append({"text": "", "logprobs": None, "finish_reason": finish_reason(chunk.finish_reason), **found})
    return events
