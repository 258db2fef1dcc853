"""Texts that were damaged, or marked by some program, before they came here. They are learned as they stand, and
told of."""

import re
from collections.abc import Iterable

_EXAMINED = 100_000
"""Characters of a text, from its beginning."""

# Two characters beside each other that single-byte encodings have, as what is not ASCII in UTF-8 gives them. Most
# texts have none, and are not looked at more closely.
_SUSPECT = re.compile("[\x80-\u25ff]{2}")


# How Excel writes control characters into its files; a carriage return above all.
_EXCEL_ESCAPE = re.compile(r"_x00[01][0-9A-Fa-f]_")
CARRIAGE_RETURNS = "carriage returns (line ends of Windows or of an old Mac)"
EXCEL_ESCAPES = "Excel's escapes (_x000D_)"


def damage_in(texts: Iterable[str]) -> list[str]:
    """What to tell of the texts: mojibake ("cafÃ©", "donâ€™t") by ftfy's heuristics, U+FFFD, line ends of Windows,
    byte order marks, and Excel's escapes."""
    found: dict[str, None] = {}
    for text in texts:
        start = text[:_EXAMINED]
        if "\ufffd" in start:
            found["lost characters (U+FFFD), learned as they stand"] = None
        if _is_mojibake(start):
            found["mojibake (UTF-8 that was read as another encoding), learned as it stands"] = None
        if "\r" in text:
            found[f"{CARRIAGE_RETURNS}, learned as they stand"] = None
        if "\ufeff" in text:
            found["byte order marks (U+FEFF), learned as they stand"] = None
        if "_x00" in text and _EXCEL_ESCAPE.search(text):
            found[f"{EXCEL_ESCAPES}, learned as they stand"] = None
    return list(found)


def _is_mojibake(text: str) -> bool:
    if text.isascii() or not _SUSPECT.search(text):
        return False
    from ftfy.badness import is_bad  # a fifth of a second, for texts that need it

    return is_bad(text)
