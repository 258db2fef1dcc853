"""Turn the user's prompts into token ids."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from handspun.config.typed import short
from handspun.data.chat_template import ChatTemplate, content_token_ids
from handspun.data.conversations import check_writable
from handspun.data.messages import (
    UNKNOWN_ROLE,
    Cell,
    Message,
    known_roles,
    read_message,
    read_tools,
    read_turns,
    with_system_prompt,
)
from handspun.data.rows import DroppedRow
from handspun.data.text_loss import TextLoss
from handspun.errors import ConfigError, DataError
from handspun.models.embedding_rows import check_prompt
from handspun.models.load import ChatModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_NAMED = 12


def plain_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Return the tokenizer's ids of a plain prompt, with two exceptions.

    A beginning-of-sequence token that the text already contains is not doubled. An end-of-sequence token that the
    tokenizer appends is removed, since the model must continue the prompt.
    """
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    head, own, _ = _split_special_tokens(tokenizer, text, ids)
    return own if head and own[: len(head)] == head else head + own


def notices_about_plain(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> Iterator[str]:
    """Yield notices about prompts that already begin with bos, and about those that lost an appended token."""
    doubled, ended = list[int](), list[int]()
    tail = list[int]()
    head = list[int]()
    for number, text in enumerate(texts, start=1):
        before, own, after = _split_special_tokens(tokenizer, text, tokenizer(text, verbose=False)["input_ids"])
        if before and own[: len(before)] == before:
            doubled.append(number)
            head = before
        if after:
            ended.append(number)
            tail = after
    if doubled:
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(head)))
        yield (f"{_prompts(doubled)}: begins with {names} (bos), which this tokenizer also adds; only one is kept")
    if ended:
        names = " ".join(map(str, tokenizer.convert_ids_to_tokens(tail)))
        yield f"{_prompts(ended)}: the tokenizer appends {names}, which is removed so that the model can continue"


def notices_about_chat(template: ChatTemplate, conversations: Sequence[Sequence[Message]]) -> Iterator[str]:
    """Yield a notice about prompts that contain the template's turn markers, as if already rendered."""
    numbers, markers = list[int](), dict[str, None]()
    for number, messages in enumerate(conversations, start=1):
        user_text = "\n".join(str(m.get("content") or "") for m in messages if m["role"] != "assistant")
        if found := template.turn_markers_in(user_text):
            numbers.append(number)
            markers.update(dict.fromkeys(found))
    if numbers:
        kind = (
            "they stay text"
            if not set(markers) & set(template.plain_markers)
            else "the model may take them for a turn"
        )
        yield (
            f"{_prompts(numbers)}: contains {', '.join(map(repr, markers))}, which the chat template writes "
            f"around turns; {kind}. If a prompt is already rendered, use --no-chat (chat=False)"
        )


def _split_special_tokens(
    tokenizer: "PreTrainedTokenizerBase", text: str, ids: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return the tokens that the tokenizer adds before the text, the text's own, and those it adds after it."""
    own: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not own:
        return ids, [], []
    for start in range(len(ids) - len(own) + 1):
        if ids[start : start + len(own)] == own:
            return ids[:start], own, ids[start + len(own) :]
    return [], ids, []


def _prompts(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - _MAX_NAMED} more" if len(numbers) > _MAX_NAMED else ""
    return f"prompt{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_MAX_NAMED]))}{more}"


Prompt = str | Sequence[Message]
"""A user message (plain text without a template), or a conversation."""
_MOST_NAMED = 12


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return a list of prompts, also for a single one. Raises ConfigError if one is no text or conversation."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping | bytes | bytearray) or not isinstance(prompts, Iterable):
        raise ConfigError(
            f"the prompts are {short(prompts)} (expected a text, a conversation, or a list of them)."
        )
    prompt_list = list(prompts)
    if prompt_list and all(isinstance(item, dict) for item in prompt_list):
        return [prompt_list]  # type: ignore[list-item]  # dicts are messages, so this is one conversation
    problems = [
        f"prompt {number} is {short(prompt)} (expected a text or a list of messages)."
        for number, prompt in enumerate(prompt_list, start=1)
        if isinstance(prompt, Mapping | bytes | bytearray) or not isinstance(prompt, Sequence)
    ]
    if problems:
        raise ConfigError(problems[:_MOST_NAMED])
    return prompt_list  # type: ignore[return-value]


def encode_prompts(
    model: ChatModel,
    prompts: list[Prompt],
    *,
    chat: bool,
    system_prompt: str | None,
    tools: list[dict[str, Any]] | None,
    continue_final_message: bool = False,
) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        model: The model, with its tokenizer and chat template.
        prompts: Texts or conversations.
        chat: Put the prompts into the chat template.
        system_prompt: System message of every prompt.
        tools: Tool definitions for the chat template.
        continue_final_message: Continue each conversation's last message, which must be an assistant's.

    Raises ConfigError for an argument that plain text cannot have. Raises DataError for a prompt that is empty,
    malformed, or longer than the model's context.
    """
    if not chat:
        _check_plain(prompts, system_prompt, tools, continue_final_message)
    tools = read_tool_definitions(tools)
    encoded = []
    for number, prompt in enumerate(prompts, start=1):
        if chat:
            messages = read_conversation(prompt, number, system_prompt)
            _check_last(messages, number, continue_final_message)
            ids = model.template.encode_prompt(messages, tools, continue_final_message=continue_final_message)
        else:
            with _dropped_as_data_error(f"prompt {number}"):
                check_writable(prompt)
            ids = plain_ids(model.tokenizer, str(prompt))
        _check_length(model, ids, number)
        check_prompt(ids, model.model, model.tokenizer, f"prompt {number}")
        encoded.append(ids)
    return encoded


def unencodable_notice(
    model: ChatModel, prompts: list[Prompt], encoded: Sequence[list[int]], *, system_prompt: str | None
) -> Iterator[str]:
    """Yield notices about prompts whose text the tokenizer cannot represent.

    Args:
        model: The model, with its tokenizer.
        prompts: Texts or conversations.
        encoded: Their token ids.
        system_prompt: System message of every prompt.
    """
    loss = TextLoss(model.tokenizer.backend_tokenizer, model.tokenizer.unk_token_id)
    found: dict[str, list[int]] = {}
    for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True), start=1):
        for note in loss.notes([_text_of(prompt, number, system_prompt)]) + loss.notes_on_ids(ids):
            found.setdefault(note, []).append(number)
    for note, numbers in found.items():
        named = f"prompt{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:_MOST_NAMED]))}"
        more = f" and {len(numbers) - _MOST_NAMED} more" if len(numbers) > _MOST_NAMED else ""
        yield f"{named}{more}: {note}"


def _text_of(prompt: Prompt, number: int, system_prompt: str | None) -> str:
    if isinstance(prompt, str):
        return f"{system_prompt or ''}{prompt}"
    return "".join(message["content"] for message in read_conversation(prompt, number, system_prompt))


def rendered_already(model: ChatModel, prompts: list[Prompt], *, chat: bool) -> Iterator[str]:
    """Yield notices about prompts that look as if a template had already rendered them."""
    if not chat:
        yield from notices_about_plain(model.tokenizer, [str(prompt) for prompt in prompts])
        return
    numbered = enumerate(prompts, start=1)
    yield from notices_about_chat(model.template, [read_conversation(prompt, n, None) for n, prompt in numbered])


def said_in(
    model: ChatModel,
    prompts: list[Prompt],
    *,
    system_prompt: str | None,
    tools: list[dict[str, Any]] | None,
    continue_final_message: bool = False,
) -> list[list[int]]:
    """Return, per chat prompt, the tokens that come from the user's content rather than the template.

    Args:
        model: The model, with its chat template.
        prompts: Texts or conversations.
        system_prompt: System message of every prompt.
        tools: Tool definitions for the chat template.
        continue_final_message: As in `encode_prompts`.
    """
    numbered, tools = enumerate(prompts, start=1), read_tool_definitions(tools)
    return [
        content_token_ids(
            model.template,
            read_conversation(prompt, n, system_prompt),
            tools,
            continue_final_message=continue_final_message,
        )
        for n, prompt in numbered
    ]


def context_length(model: ChatModel) -> int | None:
    """Return the model's context length, prompt and answer together; None if its config has none."""
    length = getattr(model.model.config.get_text_config(), "max_position_embeddings", None)
    return int(length) if length is not None and length > 0 else None


def read_conversation(prompt: Prompt, number: int, system_prompt: str | None) -> list[Message]:
    """Return a prompt's messages in the template's form. number: of the prompt, for messages. Raises DataError."""
    messages: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if not messages:
        raise DataError(f"prompt {number} is a conversation without messages (expected at least one).")
    read: list[Message] = []
    for i, message in enumerate(messages, start=1):
        name = f"prompt {number}, message {i}" if len(messages) > 1 else f"prompt {number}"
        with _dropped_as_data_error(name):  # an unknown role must not reach the template
            read += [read_message(turn, {}) for turn in read_turns([message], Cell(name), {})]
    read = with_system_prompt(read, system_prompt)
    with _dropped_as_data_error(f"prompt {number}"):
        check_writable(read)
    return read


def read_tool_definitions(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    """Return tools in the template's form. Raises DataError."""
    with _dropped_as_data_error("the tools"):
        read = read_tools(tools, Cell("the tools"))
        check_writable(read)
    return read


@contextmanager
def _dropped_as_data_error(what: str) -> Iterator[None]:
    try:
        yield
    except DroppedRow as reason:
        known = f" Known roles, in any case: {known_roles()}." if str(reason).startswith(UNKNOWN_ROLE) else ""
        raise DataError(f"{what} cannot be used: {reason}.{known}") from None


def _check_last(messages: Sequence[Message], number: int, continue_final_message: bool) -> None:
    """Raise DataError if the last message's role does not fit continue_final_message."""
    last = messages[-1]
    if last["role"] != "assistant":
        if continue_final_message:
            raise DataError(
                f"prompt {number} ends with a {last['role']} message, but only an assistant message can be "
                "continued. End it with the start of the answer, or remove continue_final_message (--prefill)."
            )
    elif not continue_final_message:
        raise DataError(
            f"prompt {number} ends with an assistant message, so a new answer would be a second one. End with a "
            "user message, or continue the last one with continue_final_message=True (--prefill on the command "
            "line)."
        )
    elif last.get("tool_calls") or not str(last.get("content") or "").strip():
        raise DataError(
            f"prompt {number} ends with an assistant message that cannot be continued (expected a text without "
            "tool calls)."
        )


def _check_plain(
    prompts: list[Prompt],
    system_prompt: str | None,
    tools: list[dict[str, Any]] | None,
    continue_final_message: bool,
) -> None:
    problems = []
    if continue_final_message:
        problems.append(
            "continue_final_message (--prefill) needs a chat template: plain text is always continued. Write the "
            "start of the answer into the prompt, or remove --no-chat (chat=False)."
        )
    if system_prompt is not None:
        problems.append("--system-prompt needs a chat template. Remove it, or remove --no-chat (chat=False).")
    if tools:
        problems.append("tools need a chat template. Remove them, or remove --no-chat (chat=False).")
    if any(not isinstance(prompt, str) for prompt in prompts):
        problems.append("a conversation needs a chat template. Give a string, or remove --no-chat (chat=False).")
    if problems:
        raise ConfigError(problems)


def _check_length(model: ChatModel, ids: list[int], number: int) -> None:
    limit = context_length(model)
    if not ids:
        raise DataError(
            f"prompt {number} is empty, and this model's tokenizer adds no token at the start of a text, so there "
            "is nothing to continue. Give it at least one character."
        )
    if limit is not None and len(ids) >= limit:
        raise DataError(
            f"prompt {number} has {len(ids)} tokens, but {model.name} has a context of {limit} tokens for prompt "
            f"and answer together. Shorten it to at most {limit - 1} tokens."
        )
