"""docs/api.md: what `handspun.__all__` holds, in the words of its docstrings.

PYTHONPATH=src python tests/helpers/api_page.py > docs/api.md
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Collection, Iterator
from typing import Any

import handspun
from handspun.config.docs import field_texts, python_text
from handspun.decoding.arguments import CallOptions

FUNCTIONS = ("load", "train", "generate", "stream", "evaluate", "compare", "export", "preview")
OPTIONS = ("TrainConfig", "DataConfig", "GenerationOptions", "ExportConfig")
RESULTS = (
    "ChatModel", "TrainedRun", "GenerationResult", "GenerationChunk", "Scores", "Comparison", "Preview",
)  # fmt: skip
HEAD = """\
# Python API

[Documentation](README.md) · This page is made from the docstrings by `tests/helpers/api_page.py`.

```python
import handspun

run = handspun.train("train.csv", model="Qwen/Qwen2.5-0.5B", lora=True)
for answer in handspun.generate(run.model, ["Tell me a joke."] * 3, temperature=0.7):
    print(answer.text)
```

`help(handspun.train)` shows the same texts, and editors complete the options of every function. `import handspun`
loads neither torch nor transformers; the first call does. Messages go to `logging.getLogger("handspun")`.

**Rows** are a file, a folder, a hub dataset, or in memory: a list of dicts, a pandas or polars DataFrame, an Arrow
table, a `datasets.Dataset`. Rows in memory are identified by a hash of their values, which run.json records: a run
resumes only with the same rows.

**Errors** are subclasses of `handspun.HandspunError` and say what to do. They speak of arguments (`num_beams=2`),
as those of the command line speak of options (`--num-beams 2`).
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD, "## Functions\n"]
    parts += [function_section(name) for name in FUNCTIONS]
    parts.append("### Arguments of a call\n\n`generate` and `stream` also take these by name:\n")
    parts.append("\n".join(field_table(CallOptions, leave_out=())) + "\n")
    parts += ["## Options\n", "Frozen dataclasses. `dataclasses.replace(config, seed=1)` makes another one.\n"]
    parts += [options_section(name) for name in OPTIONS]
    parts += ["## Results\n", *(result_section(name) for name in RESULTS), "## Errors\n", errors_section()]
    return "\n".join(parts).rstrip() + "\n"


def function_section(name: str) -> str:
    """Return a heading, the signature without the options, and the docstring."""
    function = getattr(handspun, name)
    parameters = own_parameters(function)
    shown = [str(one.replace(annotation=one.empty)) for one in parameters]
    by_name = [one.kind is one.KEYWORD_ONLY for one in parameters]
    if any(by_name):
        shown.insert(by_name.index(True), "*")
    if takes := re.search(r"(\*\*\w+): ", function.__doc__ or ""):
        shown.append(takes[1])
    signature = wrapped_signature(f"{name}({', '.join(shown)})")
    return f"### {name}\n\n```python\n{signature}\n```\n\n{markdown(function.__doc__ or '')}\n"


def own_parameters(function: Any) -> list[inspect.Parameter]:
    """Return the parameters that the source names, before those of the options."""
    inner = inspect.unwrap(function)
    names = [one.name for one in inspect.signature(inner, follow_wrapped=False).parameters.values()]
    code = inner.__code__
    own = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    parameters = inspect.signature(function).parameters
    return [parameters[one] for one in names if one in own and one in parameters]


def wrapped_signature(text: str) -> str:
    """Return a call on several lines if it is long."""
    if len(text) <= 100:
        return text
    name, _, inner = text.partition("(")
    return (
        f"{name}(\n"
        + textwrap.fill(inner.removesuffix(")"), 96, initial_indent="    ", subsequent_indent="    ")
        + "\n)"
    )


def markdown(doc: str) -> str:
    """Return a docstring as Markdown: code blocks stay, arguments become a list, the options are left out."""
    text = inspect.cleandoc(doc).split("\nOptions:\n")[0].rstrip()
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        if re.fullmatch(r"(Args|Raises|Returns):", line):
            section = line
            lines += [f"**{ {'Args:': 'Arguments', 'Raises:': 'Raises', 'Returns:': 'Returns'}[line] }**", ""]
        elif section in ("Args:", "Raises:") and (match := re.match(r"    (\*{0,2}\w+): (.*)", line)):
            lines.append(f"* `{match[1]}`: {match[2]}")
        elif section:
            lines.append(f"  {line.strip()}".rstrip() if section != "Returns:" else line.strip())
        else:
            lines.append(line)
    return "\n".join(lines)


def options_section(name: str) -> str:
    """Return a heading and a table of a dataclass's fields."""
    config = getattr(handspun, name)
    inherited = (
        {field.name for field in dataclasses.fields(handspun.DataConfig)} if name == "TrainConfig" else set()
    )
    first = (inspect.cleandoc(config.__doc__).split("\n\nFields:")[0]).strip()
    lines = [f"### {name}", "", first, ""]
    if inherited:
        lines += ["Also all fields of [DataConfig](#dataconfig).", ""]
    return "\n".join([*lines, *field_table(config, leave_out=inherited)]) + "\n"


def field_table(config: type, *, leave_out: Collection[str]) -> list[str]:
    """Return the lines of a table of a dataclass's fields."""
    texts = field_texts(config)
    lines = ["| field | type | |", "| --- | --- | --- |"]
    for field in dataclasses.fields(config):
        if field.name not in leave_out:
            text = python_text(field.name, config, texts[field.name])
            lines.append(f"| `{field.name}` | `{cell(type_text(field.type))}` | {cell(text)} |")
    return lines


def result_section(name: str) -> str:
    """Return a heading, the docstring, and the fields and properties of a class."""
    result = getattr(handspun, name)
    lines = [f"### {name}", "", inspect.cleandoc(result.__doc__), "", "| | type | |", "| --- | --- | --- |"]
    texts = field_texts(result)
    for field in dataclasses.fields(result):
        lines.append(f"| `{field.name}` | `{cell(type_text(field.type))}` | {cell(texts[field.name])} |")
    for attribute, value in properties(result):
        of = inspect.signature(value.fget or value.func).return_annotation
        text = " ".join((inspect.getdoc(value) or "").split())
        lines.append(f"| `{attribute}` | `{cell(type_text(of))}` | {cell(text)} |")
    return "\n".join(lines) + "\n"


def properties(of: type) -> Iterator[tuple[str, Any]]:
    """Yield the public properties of a class, in the order of its source."""
    for name, value in vars(of).items():
        if isinstance(value, property) and not name.startswith("_"):
            yield name, value


def errors_section() -> str:
    """Return a list of the errors, each with its docstring."""
    lines = []
    for name in handspun.__all__:
        value = getattr(handspun, name)
        if inspect.isclass(value) and issubclass(value, Exception):
            lines.append(f"* `{name}`: {' '.join((inspect.getdoc(value) or '').split())}")
    return "\n".join(lines)


def type_text(of: Any) -> str:
    """Return a type as one writes it."""
    text = of if isinstance(of, str) else inspect.formatannotation(of)
    text = re.sub(r"Union\[(.*), NoneType\]$", lambda match: f"{match[1].replace(', ', ' | ', 1)} | None", text)
    text = re.sub(r"Optional\[(.*)\]$", r"\1 | None", text)
    modules = r"handspun\.[\w.]+\.|typing\.|pathlib\.|collections\.abc\.|transformers\.[\w.]+\.|torch\."
    return re.sub(rf"\b(?:{modules})", "", text)


def cell(text: str) -> str:
    """Return text for a table's cell."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
