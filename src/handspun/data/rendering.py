"""A chat template rendered by transformers, in its sandbox, within a time, a length and a growth of memory.

The sandbox keeps a template from files and from Python's insides, not from loops within loops. A signal would
reach the main thread alone, and a process for each rendering is slow, so another thread watches and raises the
exception in this one.
"""

import ctypes
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, cast

from jinja2 import Environment, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from handspun.data.conversations import Message
from handspun.errors import TemplateError

MOST_SECONDS = 10.0
"""For one rendering, which takes less than a thousandth of it."""
MAX_CHARACTERS = 5_000_000
"""Of one rendering, besides what the data holds: its texts are hidden, so that a few thousand are usual."""
MAX_GROWTH = 2**28
"""Bytes that the process may grow by while one template is rendered. An operation that is under way is not
interrupted, so that a text that doubles may take some four times as much."""
_WATCHED_EVERY = 0.02


class _TimeIsUp(BaseException):
    """No template, and nothing between, takes it for an error of its own."""


class _TooMuchMemory(_TimeIsUp):
    """The same for a template whose texts grow without end."""


class EndlessTemplateError(TemplateError):
    """A template that was stopped. It would take as long for the next row."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return what the tokenizer's template makes of the conversation; variables: further ones that it may read.

    Raises TemplateError if it refuses or fails, or exceeds `MOST_SECONDS`, `MAX_CHARACTERS` or `MAX_GROWTH`.
    """
    try:
        with _time_limit(MOST_SECONDS):
            text = tokenizer.apply_chat_template(
                messages,
                tools=cast("Any", tools),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **(variables or {}),
            )
    except _TooMuchMemory:
        raise EndlessTemplateError(
            f"the chat template took more than {MAX_GROWTH // 2**20} MiB for one conversation, as if its text had "
            "no end. Use another."
        ) from None
    except _TimeIsUp:
        raise EndlessTemplateError(
            f"the chat template is not done after {MOST_SECONDS:.0f} seconds, as if it had no end. Use another."
        ) from None
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
    """Raises _TimeIsUp in this thread, between two operations of Python's, if the block is not done by then, and
    _TooMuchMemory if the process grows by more than MAX_GROWTH meanwhile."""
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
    is_done = threading.Event()
    one_at_a_time = threading.Lock()

    def watch() -> None:
        end, at_first = time.monotonic() + seconds, _resident_bytes()
        while not is_done.wait(min(_WATCHED_EVERY, seconds)):
            reason = _TimeIsUp if time.monotonic() >= end else None
            if _resident_bytes() - at_first > MAX_GROWTH:
                reason = _TooMuchMemory
            if reason is not None:
                with one_at_a_time:
                    if not is_done.is_set():
                        raise_in_thread(thread, ctypes.py_object(reason))
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with one_at_a_time:
            is_done.set()
        raise_in_thread(thread, None)  # one that is on its way has come too late


def _resident_bytes() -> int:
    """Return the memory that the process holds; 0 where /proc does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
