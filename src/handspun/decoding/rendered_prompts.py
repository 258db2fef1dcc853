"""Prompts that a template has rendered already: its tokens are not written twice, and it is said."""

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from handspun.data.chat_template import ChatTemplate
from handspun.data.conversations import Message

_MAX_NAMED = 12


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a plain prompt, as the tokenizer gives them, but for two things.

    A beginning-of-sequence token that the text spells out is not doubled, and an end-of-sequence token that the
    tokenizer appends is left out: the model is to go on from the prompt.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    head, own, _ = _parts(tokenizer, text, ids)
    return own if head and own[: len(head)] == head else head + own


def notices_about_plain(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[str]:
    """Say which prompts hold a token that the tokenizer writes too, and which lost one at their end."""
    doubled, ended = list[int](), list[int]()
    tail = list[int]()
    head = list[int]()
    for number, text in enumerate(texts, start=1):
        before, own, after = _parts(tokenizer, text, tokenizer(text, verbose=False)["input_ids"])
        if before and own[: len(before)] == before:
            doubled.append(number)
            head = before
        if after:
            ended.append(number)
            tail = after
    if doubled:
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(head)))
        yield (
            f"{_named(doubled)}: begins with {names} (bos), which this tokenizer writes before every text: it is "
            "there once"
        )
    if ended:
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(tail)))
        yield f"{_named(ended)}: the tokenizer appends {names}, which is left out so that the model can go on"


def notices_about_chat(template: ChatTemplate, conversations: Sequence[Sequence[Message]]) -> Iterator[str]:
    """Say which prompts hold what the template writes around turns, as if it had rendered them already."""
    numbers, markers = list[int](), dict[str, None]()
    for number, messages in enumerate(conversations, start=1):
        said = "\n".join(str(m.get("content") or "") for m in messages if m["role"] != "assistant")
        if found := template.turn_markers_in(said):
            numbers.append(number)
            markers.update(dict.fromkeys(found))
    if numbers:
        kind = (
            "it stays text"
            if not set(markers) & set(template.plain_markers)
            else "the model may take it for a turn"
        )
        yield (
            f"{_named(numbers)}: holds {', '.join(map(repr, markers))}, which the chat template writes around "
            f"turns; {kind}. Give a prompt that is rendered already with --no-chat (chat=False)"
        )


def _parts(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return what the tokenizer writes before the text's own tokens, these, and what it writes after them."""
    own: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not own:
        return ids, [], []
    for start in range(len(ids) - len(own) + 1):
        if ids[start : start + len(own)] == own:
            return ids[:start], own, ids[start + len(own) :]
    return [], ids, []


def _named(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _MAX_NAMED} more" if len(numbers) > _MAX_NAMED else ""
    return f"prompt{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_MAX_NAMED]))}{more}"


__all__ = ["notices_about_chat", "notices_about_plain", "plain_ids"]
