"""Detect damaged text: mojibake in a row, and characters that a tokenizer drops or changes."""

import json
import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers


def bytes_to_unicode() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def unencodable_bytes_pattern(backend: Tokenizer) -> re.Pattern[bytes]:
    """Return a pattern of the bytes that a byte-level vocabulary lacks; for other tokenizers, of nothing."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return re.compile(b"(?!)")
    missing = [byte for byte, char in bytes_to_unicode().items() if backend.token_to_id(char) is None]
    return re.compile(b"|".join(re.escape(bytes([byte])) for byte in missing) or b"(?!)")


_EXAMINED = 100_000
"""Number of characters at the beginning of a text that are checked."""

# Two neighboring characters that non-ASCII UTF-8 turns into when it is read in a single-byte encoding. Most texts
# have none, and need no closer check.
_SUSPECT = re.compile("[\x80-\u25ff]{2}")


# How Excel writes control characters into its files, mostly carriage returns.
_EXCEL_ESCAPE = re.compile(r"_x00[01][0-9A-Fa-f]_")
CARRIAGE_RETURNS = "carriage returns (line ends of Windows or old Macs)"
EXCEL_ESCAPES = "Excel's escapes (_x000D_)"


def detect_mojibake(texts: Iterable[str]) -> list[str]:
    """Return notes on damage in the texts.

    Damage is mojibake ("cafÃ©", "donâ€™t") by ftfy's heuristics, U+FFFD, Windows line ends, byte order marks, and
    Excel's escapes.
    """
    found: dict[str, None] = {}
    for text in texts:
        start = text[:_EXAMINED]
        if "\ufffd" in start:
            found["lost characters (U+FFFD), trained on as they are"] = None
        if _is_mojibake(start):
            found["mojibake (UTF-8 that was read as another encoding), trained on as it is"] = None
        if "\r" in text:
            found[f"{CARRIAGE_RETURNS}, trained on as they are"] = None
        if "\ufeff" in text:
            found["byte order marks (U+FEFF), trained on as they are"] = None
        if "_x00" in text and _EXCEL_ESCAPE.search(text):
            found[f"{EXCEL_ESCAPES}, trained on as they are"] = None
    return list(found)


def _is_mojibake(text: str) -> bool:
    if text.isascii() or not _SUSPECT.search(text):
        return False
    from ftfy.badness import is_bad  # takes 0.2 s to import, so only for texts that need it

    return is_bad(text)


_MARK = "\u2581"
"""SentencePiece's sign for a space."""
_WHITE_SPACE = re.compile(r"\s{2,}|[^\S ]")


class TextLoss:
    """Text that a tokenizer changes or loses, so that decoding does not return it."""

    def __init__(self, backend: Tokenizer, unk_token_id: int | None = None) -> None:
        """Probe the tokenizer. unk_token_id: used if its model does not name an unknown token (Unigram)."""
        self._missing = unencodable_bytes_pattern(backend)
        self._normalizer, self._names = _changing_part(backend.normalizer)
        self._keeps_white_space = _keeps_white_space(backend)
        unknown = getattr(backend.model, "unk_token", None)
        self.unknown_id = backend.token_to_id(unknown) if unknown else None
        if isinstance(backend.model, models.Unigram):
            self.unknown_id = unk_token_id

    def notes(self, texts: Iterable[str]) -> list[str]:
        """Return notes on texts before they are tokenized."""
        found = dict[str, None]()
        for text in texts:
            if self._missing.search(text.encode()):
                found["the tokenizer has no tokens for some characters and drops them"] = None
            if self._normalizer is not None and self._normalizer.normalize_str(text) != text:
                found[f"the tokenizer changes the text before it tokenizes it ({self._names})"] = None
            if not self._keeps_white_space and _WHITE_SPACE.search(text):
                found["the tokenizer does not keep line breaks, tabs and runs of spaces"] = None
        return list(found)

    def notes_on_ids(self, ids: Sequence[int]) -> list[str]:
        """Return notes on the ids of a tokenized text."""
        if self.unknown_id is not None and self.unknown_id in ids:
            return ["the tokenizer has no tokens for some characters and reads them as unknown"]
        return []


def _changing_part(normalizer: normalizers.Normalizer | None) -> tuple[normalizers.Normalizer | None, str]:
    """Return the normalizer steps that change text, and their names; (None, "") if there are none."""
    if normalizer is None:
        return None, ""
    state = json.loads(normalizer.__getstate__())
    steps = state["normalizers"] if state["type"] == "Sequence" else [state]
    # Writing spaces as SentencePiece does is no change, because decoding reverses it.
    changing = [step for step in steps if not _is_taken_back(step)]
    if not changing:
        return None, ""
    made = normalizers.Sequence([])
    made.__setstate__(json.dumps({"type": "Sequence", "normalizers": changing}).encode())
    return made, ", ".join(dict.fromkeys(_name_of(step) for step in changing))


def _is_taken_back(step: dict[str, object]) -> bool:
    is_space = step.get("pattern") == {"String": " "} and step.get("content") == _MARK
    return step["type"] in ("Prepend", "ByteLevel") or (step["type"] == "Replace" and is_space)


def _name_of(step: dict[str, object]) -> str:
    return {"Precompiled": "SentencePiece's own rules", "BertNormalizer": "BERT's rules"}.get(
        str(step["type"]), str(step["type"])
    )


def _keeps_white_space(backend: Tokenizer) -> bool:
    ids = backend.encode("a\n\nb", add_special_tokens=False).ids
    return "\n" in backend.decode(ids, skip_special_tokens=False)
