"""Text that is damaged or will be: mojibake in a row, characters that a tokenizer drops or changes."""

import json
import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers.convert_slow_tokenizer import bytes_to_unicode


def unencodable_bytes_pattern(backend: Tokenizer) -> re.Pattern[bytes]:
    """Matches the bytes that a byte-level vocabulary lacks; with none lacking, or another tokenizer, nothing."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return re.compile(b"(?!)")
    missing = [byte for byte, char in bytes_to_unicode().items() if backend.token_to_id(char) is None]
    return re.compile(b"|".join(re.escape(bytes([byte])) for byte in missing) or b"(?!)")


_EXAMINED = 100_000
"""Characters of a text, from its beginning."""

# Two characters beside each other that single-byte encodings have, as what is not ASCII in UTF-8 gives them. Most
# texts have none, and are not looked at more closely.
_SUSPECT = re.compile("[\x80-\u25ff]{2}")


# How Excel writes control characters into its files; a carriage return above all.
_EXCEL_ESCAPE = re.compile(r"_x00[01][0-9A-Fa-f]_")
CARRIAGE_RETURNS = "carriage returns (line ends of Windows or of an old Mac)"
EXCEL_ESCAPES = "Excel's escapes (_x000D_)"


def detect_mojibake(texts: Iterable[str]) -> list[str]:
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


_MARK = "\u2581"
"""SentencePiece's sign for a space."""
_WHITE_SPACE = re.compile(r"\s{2,}|[^\S ]")


class TextLoss:
    """What becomes of text in a tokenizer, where it does not come back as it was."""

    def __init__(self, backend: Tokenizer, unk_token_id: int | None = None) -> None:
        """unk_token_id: of a tokenizer whose model does not name its unknown token (Unigram)."""
        self._missing = unencodable_bytes_pattern(backend)
        self._normalizer, self._names = _changing_part(backend.normalizer)
        self._keeps_white_space = _keeps_white_space(backend)
        unknown = getattr(backend.model, "unk_token", None)
        self.unknown_id = backend.token_to_id(unknown) if unknown else None
        if isinstance(backend.model, models.Unigram):
            self.unknown_id = unk_token_id

    def notes(self, texts: Iterable[str]) -> list[str]:
        """Return what to say of texts before they are tokenized."""
        found = dict[str, None]()
        for text in texts:
            if self._missing.search(text.encode()):
                found["the tokenizer has no tokens for some characters, and leaves them out"] = None
            if self._normalizer is not None and self._normalizer.normalize_str(text) != text:
                found[f"the tokenizer changes the text before it reads it ({self._names})"] = None
            if not self._keeps_white_space and _WHITE_SPACE.search(text):
                found["the tokenizer does not keep line breaks, tabs and runs of spaces"] = None
        return list(found)

    def notes_on_ids(self, ids: Sequence[int]) -> list[str]:
        """Return what to say of the ids that were made."""
        if self.unknown_id is not None and self.unknown_id in ids:
            return ["the tokenizer has no tokens for some characters, and reads them as unknown"]
        return []


def _changing_part(normalizer: normalizers.Normalizer | None) -> tuple[normalizers.Normalizer | None, str]:
    """Return the steps that change text, and their names; None if all they do is to write spaces as SentencePiece
    does, which decoding takes back."""
    if normalizer is None:
        return None, ""
    state = json.loads(normalizer.__getstate__())
    steps = state["normalizers"] if state["type"] == "Sequence" else [state]
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
