"""A chat template rendered by transformers, in its sandbox and within a time.

The sandbox keeps a template from files and from Python's insides, not from loops within loops. A signal would
reach the main thread alone, and a process for each rendering is slow, so another thread waits and raises the
exception in this one.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

from jinja2 import Environment, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from handspun.data.conversations import Message
from handspun.errors import TemplateError

MOST_SECONDS = 10.0
"""For one rendering, which takes less than a thousandth of it."""


class _TimeIsUp(BaseException):
    """No template, and nothing between, takes it for an error of its own."""


class EndlessTemplateError(TemplateError):
    """A template that was stopped. It would take as long for the next row."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    generation_prompt: bool = False,
) -> str:
    """What the tokenizer's template makes of the conversation. Raises TemplateError if it refuses, fails, or takes
    more than `MOST_SECONDS`."""
    try:
        with _time_limit(MOST_SECONDS):
            text = tokenizer.apply_chat_template(
                messages, tools=cast("Any", tools), add_generation_prompt=generation_prompt, tokenize=False
            )
    except _TimeIsUp:
        raise EndlessTemplateError(
            f"the chat template is not done after {MOST_SECONDS:.0f} seconds, as if it had no end. Use another."
        ) from None
    except Exception as error:  # a template can raise whatever Python can
        roles = " ".join(message["role"] for message in messages[:20]) or "no messages"
        reason = str(error) or type(error).__name__
        raise TemplateError(f"the chat template refuses this conversation ({roles}): {reason}") from error
    assert isinstance(text, str)
    return text


def refuse_powers(source: str) -> None:
    """Raises TemplateError for a template with `**` between numbers: `9**9**9` is one operation that no time limit
    can end, and no chat needs it. `f(**arguments)` is something else."""
    try:
        tokens = [value for _, kind, value in Environment().lex(source) if kind not in ("whitespace", "comment")]
    except TemplateSyntaxError:  # rendering will say so
        return
    if any(token == "**" and before not in ("(", ",") for before, token in pairwise(tokens)):
        raise TemplateError("the chat template computes powers (`**`), which may never end. Use another.")


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises _TimeIsUp in this thread, between two operations of Python's, if the block is not done by then."""
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
    is_done = threading.Event()
    one_at_a_time = threading.Lock()

    def wait() -> None:
        if not is_done.wait(seconds):
            with one_at_a_time:
                if not is_done.is_set():
                    raise_in_thread(thread, ctypes.py_object(_TimeIsUp))

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        with one_at_a_time:
            is_done.set()
        raise_in_thread(thread, None)  # one that is on its way has come too late
