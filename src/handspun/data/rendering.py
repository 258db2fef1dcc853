"""A chat template rendered by transformers, in its sandbox, with a limit on the length of what it writes.

The sandbox keeps a template from files and from Python's internals. It does not stop loops within loops.
"""

from collections.abc import Mapping
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from handspun.data.conversations import Message
from handspun.errors import TemplateError

MAX_CHARACTERS = 5_000_000
"""Of one rendering, besides what the data holds: its texts are hidden, so that a few thousand are usual."""


class EndlessTemplateError(TemplateError):
    """A template that writes without end. It would do the same for the next row."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return what the tokenizer's template makes of the conversation; variables: further ones that it may read.

    Raises TemplateError if it refuses or fails, or writes more than `MAX_CHARACTERS`.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=cast("Any", tools),
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **(variables or {}),
        )
    except Exception as error:  # a template can raise whatever Python can
        roles = " ".join(message["role"] for message in messages[:20]) or "no messages"
        reason = str(error) or type(error).__name__
        raise TemplateError(f"the chat template refuses this conversation ({roles}): {reason}") from error
    assert isinstance(text, str)
    if len(text) > MAX_CHARACTERS and len(text) > MAX_CHARACTERS + 10 * len(str((messages, tools))):
        raise EndlessTemplateError(
            f"the chat template writes {len(text):,} characters around one conversation (at most "
            f"{MAX_CHARACTERS:,} are expected). Use another."
        )
    return text
