"""Recognize the format of a row from its columns, and give hints for columns that fit no format."""

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice

from handspun.config import DataFormat
from handspun.display import join_names, printable
from handspun.errors import DataError

MOST_SEARCHED = 1000
"""Limit on the columns that are compared with the formats' columns."""

# Other names of the columns that the formats need, the most common first.
_OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "instruction": (),
    "output": ("response", "answer", "completion", "target", "assistant", "reply", "solution", "answers"),
    "prompt": ("question", "query", "user", "human", "input", "instruction", "problem", "request", "source"),
    "completion": (
        *("answer", "response", "output", "chosen", "assistant", "reply", "gpt", "bot", "target", "solution"),
        *("generation", "answers"),
    ),
    "messages": ("chat", "dialog", "dialogue", "message"),
    "conversations": ("chat_messages", "items"),
}

# Columns of other programs' exports, which renaming alone does not fix. An entry applies if all its columns exist.
_EXPORTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("mapping",),
        "`mapping` is ChatGPT's export, a tree of messages: follow the `parent`s from `current_node` up, and "
        "write "
        'these messages, oldest first, as {"messages": [{"role": ..., "content": ...}, ...]}.',
    ),
    (
        ("annotations", "data"),
        "`data` and `annotations` are Label Studio's full export: export as CSV or JSON-MIN instead, and name the "
        "columns `prompt` and `completion`.",
    ),
    (
        ("fields", "responses"),
        "`fields` and `responses` are Argilla's records: write the texts inside them as "
        '{"prompt": ..., "completion": ...}.',
    ),
    (
        ("custom_id",),
        "`custom_id` is a batch of OpenAI's API, with requests and responses in two files: write each request's "
        '`body.messages` plus the `message` of its response as one {"messages": [...]}.',
    ),
    (
        ("chat_messages",),
        "`chat_messages` is Claude's export: rename it to `conversations`, and inside it `sender` to `from` and "
        "`text` to `value`.",
    ),
    (
        ("role", "content"),
        "`role` and `content` describe one turn, but a row is a whole conversation: "
        '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}.',
    ),
    (
        ("from", "value"),
        "`from` and `value` describe one turn, but a row is a whole conversation: "
        '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}.',
    ),
    (
        ("row", "row_idx"),
        "`row` and `row_idx` come from the hub's API: save the whole response as .json, or write only what is in "
        "`row`.",
    ),
)
# Single columns that cannot be trained on as they are.
_MEANINGS = {
    "chosen": "`chosen` and `rejected` are a preference; to train on the preferred answer, name it `completion`.",
    "turns": "`turns` are questions without answers, so there is nothing to train on.",
}


def hints(columns: Collection[str], needed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return hints on what the columns are, and on how to rename them.

    Args:
        columns: a file's columns, which fit no format.
        needed: format -> the columns that it needs.
    """
    names = set(columns)
    exports = [hint for keys, hint in _EXPORTS if names.issuperset(keys)]
    if exports:
        return exports[:1]
    found = list(islice(columns, MOST_SEARCHED))
    renamings = [renaming for wanted in needed.values() if (renaming := _renaming(found, wanted)) is not None]
    meanings = [hint for column, hint in _MEANINGS.items() if column in names]
    if renamings:
        best = min(renamings, key=len)  # the first of equals, in the formats' order
        if not ("chosen" in best and meanings):
            meanings.append(f"{_sentence(best)}.")
        return meanings
    return [*_near_misses(found, needed), *meanings]


def _renaming(columns: Sequence[str], needed: Sequence[str]) -> dict[str, str] | None:
    """Return a renaming (old name -> new name) that gives all needed columns, or None."""
    renaming: dict[str, str] = {}
    for name in needed:
        if name in columns:
            continue
        free = [column for column in columns if column not in needed and column not in renaming]
        other = next(_candidates(name, free), None)
        if other is None:
            return None
        renaming[other] = name
    return renaming


def _candidates(name: str, columns: Sequence[str]) -> Iterator[str]:
    spelled = {column.strip().lower(): column for column in columns}
    yield from (spelled[other] for other in (name, *_OTHER_NAMES[name]) if other in spelled)
    for other in (name, *_OTHER_NAMES[name]):
        cutoff = 0.8 if other == name else 0.9
        yield from (spelled[close] for close in difflib.get_close_matches(other, spelled, n=1, cutoff=cutoff))


def _near_misses(columns: Sequence[str], needed: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield hints on columns that look misspelled, for files where no renaming gives a whole format."""
    wanted = {column for names in needed.values() for column in names}
    spelled = {column.strip().lower(): column for column in columns if column not in wanted}
    for name in sorted(wanted.difference(columns)):
        for close in difflib.get_close_matches(name, spelled, n=1, cutoff=0.8):
            yield f"Did you mean '{name}' for '{printable(spelled[close])}'?"


def _sentence(renaming: Mapping[str, str]) -> str:
    return "Rename " + " and ".join(f"'{printable(old)}' to '{new}'" for old, new in renaming.items())


NEEDED: dict[DataFormat, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}
"""Columns that each format of conversations needs."""

TEXT: DataFormat = "text"
"""The format of plain text, and its column."""
_LABELS = {"label", "labels", "category", "class", "intent", "sentiment", "summary", "translation", "title"}
_LABELS.update(*(_OTHER_NAMES[name] for name in ("output", "completion")))
"""Columns next to which `text` may be a prompt rather than all there is to train on."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of images, video and sound. A row that has any is dropped."""

# Optional columns of every format.
_OPTIONAL = {"system", "tools", "kto_tag", *MEDIA}
_KNOWN = _OPTIONAL.union({"input", "history", TEXT}, *NEEDED.values())
_BYTE_ORDER_MARK = "\ufeff"


def recognize_format(columns: Collection[str], file: str) -> DataFormat:
    """Return the one format that the columns fit. Raises DataError if none or several fit."""
    found = [name for name, needed in NEEDED.items() if set(needed) <= set(columns)]
    if len(found) == 1:
        return found[0]
    names = join_names(columns) or "none"
    if not found and TEXT in columns:
        _check_no_label(columns, file)
        return TEXT
    if found:
        raise DataError(
            f"the columns ({names}) fit several formats: {', '.join(found)}. Choose one with --data-format.",
            file=file,
        )
    formats = "; ".join(f"{name} needs {' and '.join(needed)}" for name, needed in NEEDED.items())
    formats = f"plain text needs text; {formats}"
    message = f"the columns fit no format. Found: {names}. Expected: {formats}."
    yours = list(columns) if len(columns) == 2 else ["Question", "Reply"]
    remedy = f"Or name yours, as in --columns prompt={printable(yours[0])},completion={printable(yours[1])}."
    raise DataError(" ".join([message, *hints(columns, dict(NEEDED.items())), remedy]), file=file)


def _check_no_label(columns: Collection[str], file: str) -> None:
    """Raise DataError if another column looks like the answer to `text`."""
    labels = [name for name in columns if name.strip().lower() in _LABELS]
    if labels:
        label = printable(labels[0])
        raise DataError(
            f"the columns text and {label} can be read in two ways. To train on {label} as the answer to text, "
            f"use --columns prompt=text,completion={label}; to train on the text itself, use --data-format text.",
            file=file,
        )


def check_one_kind(columns: Collection[str], data_format: str, file: str) -> None:
    """Raise DataError if a row with these columns is plain text in a file of conversations."""
    needed = next((names for name, names in NEEDED.items() if name == data_format), ())
    if needed and TEXT in columns and not set(needed) & set(columns):
        raise DataError(
            f"some rows are plain text (a text column), and others are conversations ({data_format}). Put them "
            "into two files, and give --data twice.",
            file=file,
        )


def used_columns(data_format: str) -> set[str]:
    """Return the columns that are read from a row of this format. Other columns are ignored."""
    if data_format == TEXT:
        return {TEXT, *MEDIA}
    used = _OPTIONAL.union(*(needed for name, needed in NEEDED.items() if name == data_format))
    return used | ({"input", "history"} if data_format == "alpaca" else {"label"})


_PAIRS = {
    ("instruction", "output"): "instruction response, instruction answer, instruction completion",
    ("prompt", "completion"): "question answer, question response, query answer, query response, prompt response, "
    "prompt answer, prompt output, user assistant, human assistant, human gpt, problem solution, input output",
}
"""Pairs of names that mean what a format needs."""
_MORE_THAN_A_PAIR = {"context", "passage", "document", "rejected", "chosen", "annotations", "turns", "text"}
"""Columns next to which a pair may not be the whole row: the user decides."""


def common_pair(columns: Collection[str]) -> dict[str, str]:
    """Return common names -> a format's, for the only such pair among the columns. Empty if it is unclear."""
    spelled = {column.strip().lower(): column for column in columns}
    if fits_a_format(columns) or _MORE_THAN_A_PAIR & spelled.keys():
        return {}
    found = [
        dict(zip((spelled[name] for name in pair.split()), needed, strict=True))
        for needed, pairs in _PAIRS.items()
        for pair in pairs.split(", ")
        if spelled.keys() >= set(pair.split())
    ]
    return found[0] if len(found) == 1 else {}


def fits_a_format(columns: Collection[str]) -> bool:
    """Return whether the columns, in any case, fit a format."""
    spelled = {name.strip().lower() for name in columns}
    return TEXT in spelled or any(spelled.issuperset(needed) for needed in NEEDED.values())


def known_spellings(columns: Collection[str]) -> dict[str, str]:
    """Return a mapping from columns that differ from a known name only in case or outer white space to that name.

    A column is left alone if the known name exists too, or if several columns are spellings of it.
    """
    found: dict[str, list[str]] = {}
    for column in columns:
        name = column.strip().strip(_BYTE_ORDER_MARK).strip().lower()
        if name in _KNOWN and column not in _KNOWN:
            found.setdefault(name, []).append(column)
    return {others[0]: name for name, others in found.items() if len(others) == 1 and name not in columns}
