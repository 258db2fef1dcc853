"""/tokenize, /detokenize, /apply-template: what the model sees. /v1/explain, /v1/score: how it chooses tokens."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from handspun.data.chat_template import trace_prompt
from handspun.decoding.prompts import plain_ids
from handspun.serve.answers import collect, log_answers, usage
from handspun.serve.chat import called_tools, check_conversation, conversation_of, encode_messages
from handspun.serve.completions import check_token_ids, encode_text, text_of
from handspun.serve.logprobs import ScoredToken, chat_logprobs
from handspun.serve.schemas import (
    DetokenizeRequest,
    ExplainRequest,
    NamedTool,
    SamplingBody,
    ScoreRequest,
    TemplateRequest,
    TokenizeRequest,
    at_most,
)
from handspun.serve.served import Context, ServedModel, find_model
from handspun.serve.translate import Wanted, as_api_errors, prepare, refuse

Result = TypeVar("Result")


async def tokenize(context: Context, body: TokenizeRequest) -> dict[str, Any]:
    """Return the token ids of a text or a conversation; with_pieces: each with its text or its bytes."""
    if (body.content is None) == (body.messages is None):
        raise refuse("content", "give a text as content, or messages.")
    model = find_model(context, body.model)
    if body.messages is not None:
        check_conversation(body.messages, body.tools)
    ids = await _in_thread(model, lambda: _ids(model, body))
    if not body.with_pieces:
        return {"tokens": ids, "count": len(ids)}
    return {"tokens": [{"id": token_id, "piece": _piece(model, token_id)} for token_id in ids], "count": len(ids)}


async def detokenize(context: Context, body: DetokenizeRequest) -> dict[str, Any]:
    """Return the text of token ids, special tokens included."""
    model = find_model(context, body.model)
    check_token_ids(model, body.tokens, "tokens")
    return {"content": await _in_thread(model, lambda: text_of(model, body.tokens))}


async def apply_template(context: Context, body: TemplateRequest) -> dict[str, Any]:
    """Return a conversation as the model sees it: each token with its text or its bytes, and who wrote it."""
    model = find_model(context, body.model)
    check_conversation(body.messages, body.tools)

    def trace() -> dict[str, Any]:
        messages, tools, goes_on = conversation_of(body)
        with as_api_errors("messages"):
            traced = trace_prompt(model.chat.template, messages, tools, continue_final_message=goes_on)
        return {
            "prompt": traced.text,
            "tokens": traced.token_ids,
            "pieces": [_piece(model, token_id) for token_id in traced.token_ids],
            "said": traced.is_content,
            "writers": traced.writers,
        }

    return await _in_thread(model, trace)


async def explain(context: Context, body: ExplainRequest) -> dict[str, Any]:
    """Return how the token behind answer_token_ids is chosen, with the same seed and options as in the answer.

    Nothing of the answer is kept on the server: prompt and answer are read again, and one token is chosen.
    """
    if (body.prompt is None) == (body.messages is None):
        raise refuse("prompt", "give messages, or a prompt.")
    for name in ("n", "stream", "show_tree", "max_tokens", "return_token_ids"):
        if getattr(body, name) not in (None, False):
            raise refuse(name, "one token is explained. Remove it.")
    if body.messages is not None:
        check_conversation(body.messages, body.tools)
    if body.seed is None and body.temperature != 0:
        raise refuse("seed", "give the seed that the answer names, so that the same token is drawn.")
    is_chat = body.messages is not None or (isinstance(body.prompt, list) and body.is_chat is not False)
    called = called_tools(body)
    wanted = Wanted(
        is_chat=is_chat,
        max_tokens=len(body.answer_token_ids) + 1,
        called_tools=called,
        several_calls=not (body.parallel_tool_calls is False or isinstance(body.tool_choice, NamedTool)),
        logprobs=True,
        top_logprobs=context.limits.max_top_logprobs,
        answer_token_ids=body.answer_token_ids,
    )
    at_most(wanted.max_tokens or 0, context.limits.max_tokens, "answer_token_ids", "tokens")
    asked = body.model_copy(update={"explain": True, "n": body.index + 1})
    prepared = await prepare(context, asked, wanted, lambda model: [_prompt_ids(model, body)])
    results = await collect(prepared.submit(context))
    result = results[body.index if prepared.computed > 1 else 0]
    counts = usage(prepared, results)
    log_answers(context, counts, ["length"])
    assert result.explanation is not None
    assert result.logprobs is not None
    words = prepared.model.vocabulary
    token_id = result.token_ids[-1]
    best = [] if result.top_logprobs is None else result.top_logprobs[-1]
    scored = chat_logprobs([ScoredToken(token_id, result.logprobs[-1], best, 0)], words)["content"][0]
    return {
        "object": "explanation",
        "model": prepared.model.name,
        "system_fingerprint": prepared.model.fingerprint,
        "position": len(body.answer_token_ids),
        "token_id": token_id,
        **scored,
        "top_token_ids": [one for one, _ in best],
        "explanation": dataclasses.asdict(result.explanation[-1]),
        "usage": counts,
    }


async def score(context: Context, body: ScoreRequest) -> dict[str, Any]:
    """Return how probable a model finds an answer that is given: each token's rank and log-probability.

    The answer may be another model's. Log-probabilities are of the model's own distribution.
    """
    if (body.prompt is None) == (body.messages is None):
        raise refuse("prompt", "give messages, or a prompt.")
    if body.messages is not None:
        check_conversation(body.messages, body.tools)
    ids, top = body.answer_token_ids, body.top_logprobs or 0
    at_most(len(ids), context.limits.max_tokens, "answer_token_ids", "tokens")
    at_most(top, context.limits.max_top_logprobs, "top_logprobs", "alternatives per token")
    wanted = Wanted(
        is_chat=body.messages is not None,
        max_tokens=0,
        allows_none=True,
        prompt_logprobs=True,
        top_logprobs=top,
    )
    asked = SamplingBody.model_validate({"model": body.model, "temperature": 0.0, "cache_salt": body.cache_salt})
    prepared = await prepare(context, asked, wanted, lambda model: [_prompt_ids(model, body) + ids])
    [request] = prepared.requests
    start = len(request.prompt_token_ids) - len(ids)
    prepared = dataclasses.replace(prepared, requests=[dataclasses.replace(request, scored_from=start)])
    results = await collect(prepared.submit(context))
    counts = usage(prepared, results)
    log_answers(context, counts, ["length"])
    [result] = results
    assert result.prompt_logprobs is not None
    assert result.prompt_ranks is not None
    tops = [[]] * len(ids) if result.prompt_top_logprobs is None else result.prompt_top_logprobs[start:]
    scores = zip(ids, result.prompt_logprobs[start:], tops, strict=True)
    tokens = [ScoredToken(token_id, logprob, best, 0) for token_id, logprob, best in scores]
    entries = chat_logprobs(tokens, prepared.model.vocabulary)["content"]
    return {
        "object": "score",
        "model": prepared.model.name,
        "system_fingerprint": prepared.model.fingerprint,
        "tokens": [
            {"id": token_id, "rank": rank, **entry}
            for token_id, rank, entry in zip(ids, result.prompt_ranks[start:], entries, strict=True)
        ],
        "usage": counts,
    }


async def _in_thread(model: ServedModel, work: Callable[[], Result]) -> Result:
    """Run work that uses the model's tokenizer."""

    def locked() -> Result:
        with model.lock:
            return work()

    return await asyncio.to_thread(locked)


def _ids(model: ServedModel, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return encode_messages(model, body)
    assert body.content is not None
    if body.add_special:
        return plain_ids(model.chat.tokenizer, body.content)
    ids: list[int] = model.chat.tokenizer(body.content, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _piece(model: ServedModel, token_id: int) -> str | list[int]:
    """Return a token's text, or its bytes if they are a part of a character."""
    data = model.vocabulary.bytes_of(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _prompt_ids(model: ServedModel, body: ExplainRequest | ScoreRequest) -> list[int]:
    check_token_ids(model, body.answer_token_ids, "answer_token_ids")
    return encode_messages(model, body) if body.prompt is None else encode_text(model, body.prompt)
