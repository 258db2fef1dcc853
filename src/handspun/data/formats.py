"""Which format a file has, judged by its columns."""

import difflib
from collections.abc import Collection
from itertools import islice

from handspun.config import DataFormat
from handspun.data.naming import listed, shown
from handspun.errors import DataError

NEEDED: dict[DataFormat, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
}
"""Columns without which a row is not of the format."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
"""Columns of pictures, films and sound; a row that has any is dropped."""

_SEARCHED = 1000
"""Columns that are compared with those of the formats, where none fits."""

# Columns that are read where they are there, in every format.
_OPTIONAL = {"system", "tools", "kto_tag", *MEDIA}
# What the columns of other formats mean here.
_HINTS = {
    "chosen": "`chosen` and `rejected` are a preference; to train on the preferred answer, name it `completion`.",
    "text": "`text` does not say what is to be learned; split it into `prompt` and `completion`.",
    "turns": "`turns` are questions without answers, so there is nothing to learn.",
    "question": "Name `question` `prompt`, and its answer `completion`.",
    "query": "Name `query` `prompt`, and its answer `completion`.",
    "response": "Name `response` `completion` or `output`.",
    "answer": "Name `answer` `completion` or `output`.",
}


def recognise_format(columns: Collection[str], file: str) -> DataFormat:
    """The one format that has its columns here. Raises DataError if none has, or several have."""
    found = [name for name, needed in NEEDED.items() if set(needed) <= set(columns)]
    if len(found) == 1:
        return found[0]
    names = listed(columns) or "none"
    if found:
        raise DataError(
            f"the columns ({names}) fit several formats: {', '.join(found)}. Choose one with --data-format.",
            file=file,
        )
    formats = "; ".join(f"{name} needs {' and '.join(needed)}" for name, needed in NEEDED.items())
    message = f"the columns fit no format. Found: {names}. Expected: {formats}."
    raise DataError(" ".join([message, *_near_misses(columns)]), file=file)


def used_columns(data_format: str) -> set[str]:
    """Columns that are read from a row of this format; what else a file holds is not looked at."""
    used = _OPTIONAL.union(*(needed for name, needed in NEEDED.items() if name == data_format))
    return used | ({"input", "history"} if data_format == "alpaca" else {"label"})


def _near_misses(columns: Collection[str]) -> list[str]:
    """Sentences on columns that are almost those of a format, and on what others mean here."""
    wanted = {column for needed in NEEDED.values() for column in needed}
    first = islice(columns, _SEARCHED)
    others = {column.strip().lower(): column for column in first if column not in wanted}
    hints = []
    for column in sorted(wanted.difference(columns)):
        for close in difflib.get_close_matches(column, others, n=1, cutoff=0.8):
            hints.append(f"Did you mean {column!r} for '{shown(others[close])}'?")
    return hints + [hint for column, hint in _HINTS.items() if column in columns]
