"""A chat template rendered by transformers, in its sandbox, with a limit on the length of what it writes.

The sandbox keeps a template from files and from Python's internals. It does not stop loops within loops.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError as JinjaError
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import PreTrainedTokenizerBase

from handspun.config import option_name
from handspun.data.messages import Message
from handspun.errors import ConfigError, TemplateError

_MAX_TEMPLATE_BYTES = 1_000_000
_GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""transformers' own tag, which Jinja does not know."""


def choose_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> None:
    """Give the tokenizer the template that the user chose: the name of one of its own, or a Jinja file.

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
        names = f"one of {', '.join(named)} (this tokenizer's)" if named else "this tokenizer has none"
        raise ConfigError(
            f"--chat-template {choice}: there is no such template and no such file. Expected the name of a "
            f"template ({names}), or a file such as chat_template.jinja."
        )
    try:
        source = path.read_bytes()[: _MAX_TEMPLATE_BYTES + 1].decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {choice} cannot be read: {error}. Expected Jinja in UTF-8.") from error
    if len(source) > _MAX_TEMPLATE_BYTES or not source.strip():
        raise ConfigError(f"--chat-template {choice} is no template: expected Jinja text of 1 to 1,000,000 bytes.")
    tokenizer.chat_template = source


def check_template_args(source: str | dict[str, str], args: Mapping[str, Any]) -> None:
    """Raise ConfigError for a variable that the template does not read: it would do nothing, in silence."""
    sources = list(source.values()) if isinstance(source, dict) else [source]
    read = set[str]().union(*(variables_of(one) for one in sources))
    if unread := [name for name in args if name not in read]:
        known = ", ".join(sorted(read - _ALWAYS_GIVEN)) or "none"
        raise ConfigError(
            f"{option_name('template_args')} {', '.join(unread)}: the chat template reads no such variable, so it "
            f"would do nothing. Leave it out, or give one that the template reads ({known})."
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
    """Return the names that a template reads from outside; all of its names if it is not Jinja."""
    text = _GENERATION_TAG.sub("", source)
    try:
        parsed = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (JinjaError, RecursionError):  # rendering will say so
        return set(re.findall(r"[A-Za-z_]\w*", text))
    return meta.find_undeclared_variables(parsed)


def with_defaults(source: str | dict[str, str], args: Mapping[str, Any]) -> str | dict[str, str]:
    """Return the template with the values as its defaults: it then renders like this in every program."""
    if not args:
        return source
    if isinstance(source, dict):
        return {name: str(with_defaults(one, args)) for name, one in source.items()}
    head = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in args.items()
    )
    # Templates are rendered with trim_blocks, which takes the line break after the last block: this one.
    return source if source.startswith(f"{head}\n") else f"{head}\n{source}"


def _literal(value: Any) -> str:
    """Return the value as Jinja writes it. JSON's null is its only word that Jinja does not know."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


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
