"""Read values for a chat template's variables: `enable_thinking=false`, a JSON object, or a dict."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

TemplateArgs = Mapping[str, Any] | Iterable[str]

_OF_CONVERSATIONS = {"messages", "message", "conversation", "tools", "documents", "add_generation_prompt"}
_OF_TRANSFORMERS = {
    *("continue_final_message", "chat_template", "tokenize", "padding", "truncation", "max_length", "return_dict"),
    *("return_tensors", "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
    *("additional_special_tokens", "extra_special_tokens", "raise_exception", "strftime_now"),
}
_OF_JINJA = {"range", "dict", "namespace", "lipsum", "cycler", "joiner", "loop", "self", "true", "false", "none"}
RESERVED = frozenset(_OF_CONVERSATIONS | _OF_TRANSFORMERS | _OF_JINJA | {"True", "False", "None"})
"""Names that the program or Jinja passes to a template."""

_WORDS = {"true": True, "false": False, "null": None, "none": None}
_DOUBTFUL = ("yes", "no", "on", "off", "nan", "infinity", "-infinity")


def read_template_args(given: TemplateArgs | None) -> tuple[dict[str, Any], list[str]]:
    """Return the values by name, and the problems with them.

    Values are JSON (`false`, `3`, `"text"`, `[1, 2]`). Anything that is not JSON is text.
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    pairs = given.items() if isinstance(given, Mapping) else _pairs(given or (), problems)
    for name, value in pairs:
        if problem := _problem(name, value):
            problems.append(problem)
        elif name in found and found[name] != value:
            problems.append(f"--template-args sets {name} twice: {found[name]!r} and {value!r}. Set it once.")
        else:
            found[name] = value
    return found, problems


def _pairs(texts: Iterable[str], problems: list[str]) -> Iterable[tuple[Any, Any]]:
    for text in [texts] if isinstance(texts, str) else texts:
        name, equals, value = str(text).partition("=")
        if str(text).lstrip().startswith("{"):
            try:
                read = json.loads(text, parse_constant=_reject_constant)
            except (ValueError, RecursionError) as error:
                problems.append(f"--template-args {text} is not JSON ({error}). Expected an object.")
                continue
            yield from read.items()
        elif not equals:
            problems.append(
                f"--template-args {text}: expected a name and a value, as in --template-args "
                "enable_thinking=false."
            )
        elif value.strip().lower() in _DOUBTFUL:
            problems.append(
                f"--template-args {text}: {value.strip()} is ambiguous. Write true, false or a number, or text in "
                f"quotes: {name}='\"{value.strip()}\"'."
            )
        else:
            yield name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return json.loads(text, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        return text


def _reject_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _problem(name: Any, value: Any) -> str | None:
    if not isinstance(name, str) or not name.isidentifier():
        return f"--template-args: {name!r} is not a variable name. Write it as in enable_thinking=false."
    if name in RESERVED:
        return f"--template-args {name}: the program sets this variable itself. Remove it."
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode("utf-8")
    except (ValueError, TypeError, RecursionError) as error:
        return f"--template-args {name}: {error}. Expected true, false, a finite number, text, or a list of these."
    if "\ue000" in text or "\ue001" in text:
        return (
            f"--template-args {name} contains the characters U+E000 or U+E001, which mark data here. Remove them."
        )
    return None
