"""What all endpoints do with the chunks of answers: collect them, count tokens, cancel when the client leaves."""

import dataclasses
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Any

from handspun.decoding.explain import TreeNode
from handspun.decoding.results import FinishReason, GenerationResult
from handspun.decoding.text import Vocabulary
from handspun.serve.errors import ApiError
from handspun.serve.served import Context
from handspun.serve.translate import Prepared

if TYPE_CHECKING:
    from handspun.serve.worker import Ticket

_FINISH: dict[FinishReason, str] = {"eos": "stop", "stop": "stop", "length": "length"}


class TicketStream:
    """The events of a request. Closing it cancels the request, even before the first event was taken."""

    def __init__(self, ticket: "Ticket", events: AsyncGenerator[dict[str, Any]]) -> None:
        self._ticket, self._events = ticket, events

    def __aiter__(self) -> "TicketStream":
        return self

    async def __anext__(self) -> dict[str, Any]:
        try:
            return await anext(self._events)
        except BaseException:  # the end, an error, or the task was cancelled
            self._ticket.cancel()
            raise

    async def aclose(self) -> None:
        """Cancel what is not finished."""
        self._ticket.cancel()
        await self._events.aclose()


async def collect(ticket: "Ticket") -> list[GenerationResult]:
    """Return the whole answers, by prompt and then by index. Cancels the request if the client leaves."""
    try:
        results = [chunk.result async for chunk in ticket if chunk.result is not None]
    finally:
        ticket.cancel()
    return sorted(results, key=lambda result: (result.prompt_index, result.return_index))


def finish_reason(reason: FinishReason, *, has_calls: bool = False) -> str:
    """Return OpenAI's word. Raises ApiError for an answer that was cancelled: it is no whole answer."""
    if reason not in _FINISH:
        raise ApiError("the answer was cancelled.", "server_error", code="internal_error")
    return "tool_calls" if has_calls and reason != "length" else _FINISH[reason]


def usage(prepared: Prepared, results: Sequence[GenerationResult]) -> dict[str, Any]:
    """Return the token counts of all answers. A prompt counts once, and each answer that the client got."""
    prompt = sum(len(request.prompt_token_ids) for request in prepared.requests)
    generated = prepared.copies * sum(len(result.token_ids) for result in results)
    known: dict[int, int] = {}
    for result in results:
        known[result.prompt_index] = max(result.cached_tokens, known.get(result.prompt_index, 0))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": sum(known.values())},
    }


def log_answers(context: Context, counts: dict[str, Any], reasons: Sequence[str]) -> None:
    """Note what the request's line in the log says."""
    context.log["prompt_tokens"] = counts["prompt_tokens"]
    context.log["completion_tokens"] = counts["completion_tokens"]
    context.log["cached_tokens"] = counts["prompt_tokens_details"]["cached_tokens"]
    context.log["finish_reason"] = ",".join(dict.fromkeys(reasons))


def details(result: GenerationResult, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return what a choice has on request besides: how its tokens were chosen, and the beams' tree."""
    found: dict[str, Any] = {}
    if result.explanation is not None:
        shown = _uncut(result, vocabulary)
        found["explanation"] = [dataclasses.asdict(one) for one in result.explanation[:shown]]
    if result.tree is not None:
        found["tree"] = tree_nodes(result.tree, vocabulary)
    return found


def tree_nodes(nodes: Sequence[TreeNode], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """Return nodes of a beam search's tree. A token may be a part of a character, so its bytes are told too."""
    return [{**dataclasses.asdict(node), "bytes": list(vocabulary.bytes_of(node.token_id))} for node in nodes]


def _uncut(result: GenerationResult, vocabulary: Vocabulary) -> int:
    """Return the number of an answer's tokens before the stop string that fired."""
    if result.stop_string is None:
        return len(result.token_ids)
    detokenizer, characters = vocabulary.detokenizer(), 0
    for number, token_id in enumerate(result.token_ids):
        if characters >= len(result.text):
            return number
        if token_id not in vocabulary.special:
            characters += len(detokenizer.push(token_id))
    return len(result.token_ids)
