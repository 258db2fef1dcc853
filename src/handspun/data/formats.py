"""Which format a file has, judged by its columns."""

from collections.abc import Collection

from handspun.config import DataFormat
from handspun.data.column_hints import hints
from handspun.data.naming import listed
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

# Columns that are read where they are there, in every format.
_OPTIONAL = {"system", "tools", "kto_tag", *MEDIA}
_KNOWN = _OPTIONAL.union({"input", "history"}, *NEEDED.values())
_BYTE_ORDER_MARK = "\ufeff"


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
    raise DataError(" ".join([message, *hints(columns, dict(NEEDED.items()))]), file=file)


def used_columns(data_format: str) -> set[str]:
    """Columns that are read from a row of this format; what else a file holds is not looked at."""
    used = _OPTIONAL.union(*(needed for name, needed in NEEDED.items() if name == data_format))
    return used | ({"input", "history"} if data_format == "alpaca" else {"label"})


def fits_a_format(columns: Collection[str]) -> bool:
    """Return whether the columns, whatever their case, are those of a format."""
    spelled = {name.strip().lower() for name in columns}
    return any(spelled.issuperset(needed) for needed in NEEDED.values())


def known_spellings(columns: Collection[str]) -> dict[str, str]:
    """Return the columns that are known but for their case or white space around -> their known names.

    One is left alone where the known name is there too, or where several are spellings of it.
    """
    found: dict[str, list[str]] = {}
    for column in columns:
        name = column.strip().strip(_BYTE_ORDER_MARK).strip().lower()
        if name in _KNOWN and column not in _KNOWN:
            found.setdefault(name, []).append(column)
    return {others[0]: name for name, others in found.items() if len(others) == 1 and name not in columns}
