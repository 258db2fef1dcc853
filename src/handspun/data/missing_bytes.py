"""Characters that a tokenizer has no tokens for. Byte-level BPE leaves them out without a word: SmolLM2's
vocabulary lacks 21 of the 256 bytes, among them control characters, and what U+40000 to U+BFFFF begin with."""

import re

from tokenizers import Tokenizer, decoders
from transformers.convert_slow_tokenizer import bytes_to_unicode


def missing_bytes(backend: Tokenizer) -> re.Pattern[bytes]:
    """Matches the bytes that a byte-level vocabulary lacks; with none lacking, or another tokenizer, nothing."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return re.compile(b"(?!)")
    missing = [byte for byte, char in bytes_to_unicode().items() if backend.token_to_id(char) is None]
    return re.compile(b"|".join(re.escape(bytes([byte])) for byte in missing) or b"(?!)")
