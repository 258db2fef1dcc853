"""Render chat templates with transformers, in its sandbox, and limit the length of the output.

The sandbox keeps a template from files and from Python's internals. It does not stop nested loops.
"""

# No timer stops a template: a thread that raises an exception in the rendering thread (PyThreadState_SetAsyncExc)
# leaves a flag set in Python 3.11's evaluation loop. Every later call is slower, and the first traced one hangs.
# So only the length of the output is limited.

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError as JinjaError
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from handspun.config import option_name
from handspun.data.messages import Message
from handspun.errors import ConfigError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_TEMPLATE_BYTES = 1_000_000
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tag, which Jinja does not know."""


def choose_template(tokenizer: "PreTrainedTokenizerBase", choice: str | None) -> None:
    """Set the tokenizer's template to the user's choice: the name of one of its own, or a Jinja file.

    Raises ConfigError.
    """
    if choice is None:
        return
    own = tokenizer.chat_template
    named = own if isinstance(own, dict) else {"default": own} if own else {}
    if choice in named:
        tokenizer.chat_template = named[choice]
        return
    path = Path(choice).expanduser()
    if not path.is_file():
        names = f"this tokenizer has {', '.join(named)}" if named else "this tokenizer has none"
        raise ConfigError(
            f"--chat-template {choice}: no template and no file has this name. Expected the name of a template "
            f"({names}), or a file such as chat_template.jinja."
        )
    try:
        source = path.read_bytes()[: _MAX_TEMPLATE_BYTES + 1].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {choice} cannot be read: {error}. Expected Jinja in UTF-8.") from error
    if len(source) > _MAX_TEMPLATE_BYTES or not source.strip():
        raise ConfigError(
            f"--chat-template {choice} is not a template (expected Jinja text of 1 to 1,000,000 bytes)."
        )
    tokenizer.chat_template = source


def check_template_args(source: str | dict[str, str], args: Mapping[str, Any]) -> None:
    """Raise ConfigError for a variable that the template does not read, because it would have no effect."""
    sources = list(source.values()) if isinstance(source, dict) else [source]
    read = set[str]().union(*(variables_of(one) for one in sources))
    if unread := [name for name in args if name not in read]:
        known = ", ".join(sorted(read - _ALWAYS_GIVEN)) or "none"
        raise ConfigError(
            f"{option_name('template_args')} {', '.join(unread)}: the chat template reads no such variable, so it "
            f"would have no effect. Remove it, or use one that the template reads ({known})."
        )


_ALWAYS_GIVEN = {
    *(
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "bos_token",
        "eos_token",
        "pad_token",
        "unk_token",
    ),
    *("raise_exception", "strftime_now", "namespace", "range", "dict"),
}


def variables_of(source: str) -> set[str]:
    """Return the names of the variables that a template reads; all names in it if it is not valid Jinja."""
    text = _GENERATION_TAG.sub("", source)
    try:
        parsed = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (JinjaError, RecursionError):  # rendering raises the proper error
        return set(re.findall(r"[A-Za-z_]\w*", text))
    return meta.find_undeclared_variables(parsed)


def with_defaults(source: str | dict[str, str], args: Mapping[str, Any]) -> str | dict[str, str]:
    """Return the template with the values as its defaults, so that it renders the same in every program."""
    if not args:
        return source
    if isinstance(source, dict):
        return {name: str(with_defaults(one, args)) for name, one in source.items()}
    head = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in args.items()
    )
    # Templates are rendered with trim_blocks, which removes the line break after a block: this one.
    return source if source.startswith(f"{head}\n") else f"{head}\n{source}"


def _literal(value: Any) -> str:
    """Return the value as a Jinja literal. Of JSON's words, Jinja lacks only null."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


MAX_CHARACTERS = 5_000_000
"""Limit per rendering, in addition to the data's size. The data is hidden, so a few thousand are typical."""


class EndlessTemplateError(TemplateError):
    """A template that writes too much. It would do the same for every row, so the run ends."""


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    generation_prompt: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the conversation as rendered by the tokenizer's template.

    Raises TemplateError if the template rejects it or fails, or writes more than `MAX_CHARACTERS`.

    Args:
        tokenizer: whose template is rendered.
        messages: the conversation.
        tools: tools as JSON schemas.
        generation_prompt: whether to add the generation prompt.
        variables: more variables that the template may read.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tools=cast("Any", tools),
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **(variables or {}),
        )
    except Exception as error:  # a template can raise anything
        roles = " ".join(message["role"] for message in messages[:20]) or "no messages"
        reason = str(error) or type(error).__name__
        raise TemplateError(f"the chat template rejects this conversation ({roles}): {reason}") from error
    assert isinstance(text, str)
    if len(text) > MAX_CHARACTERS and len(text) > MAX_CHARACTERS + 10 * len(str((messages, tools))):
        raise EndlessTemplateError(
            f"the chat template writes {len(text):,} characters around one conversation (expected at most "
            f"{MAX_CHARACTERS:,}). Use another template."
        )
    return text
