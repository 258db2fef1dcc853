"""Incremental detokenization, and stop strings."""

import codecs
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol, Self

from tokenizers import Tokenizer, decoders

from handspun.data.text_loss import bytes_to_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\ufffd"
_BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")
"""SentencePiece's name for a byte of a character that has no token of its own."""
_LONGEST_CHARACTER = 4
"""Maximum bytes of a character in UTF-8, and so the number of tokens it can be split into."""


class Detokenizer(Protocol):
    """The detokenization state of one answer."""

    def push(self, token_id: int) -> str:
        """Add a token and return the characters that it completes."""

    def finish(self) -> str:
        """Return an unfinished character as U+FFFD, or an empty string."""

    def copy(self) -> Self:
        """Return an independent copy of the state."""


@dataclass
class ByteDetokenizer:
    """Detokenizer for byte-level vocabularies: exactly equal to decoding all ids at once."""

    bytes_of: Callable[[int], bytes]
    _pending: bytes = b""

    def push(self, token_id: int) -> str:
        """Return the new text that a token completes."""
        data = self._pending + self.bytes_of(token_id)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return text

    def finish(self) -> str:
        """Return what is left, with a replacement character for an incomplete one."""
        text, self._pending = self._pending.decode("utf-8", "replace"), b""
        return text

    def copy(self) -> "ByteDetokenizer":
        """Return an independent copy."""
        return replace(self)


@dataclass
class WindowDetokenizer:
    """Detokenizer for any other vocabulary: decodes the last tokens in the context of the ones before them."""

    decode: Callable[[list[int]], str]
    _ids: list[int] = field(default_factory=list)
    _context: int = 0
    """Index of the first context token. The text of the context has been emitted."""
    _given: int = 0
    """Number of tokens whose text has been emitted."""

    def push(self, token_id: int) -> str:
        """Return the new text that a token completes."""
        self._ids.append(token_id)
        text = self._new_text()
        if text.endswith(_REPLACEMENT) and len(self._ids) - self._given < _LONGEST_CHARACTER:
            return ""
        self._context, self._given = self._given, len(self._ids)
        return text

    def finish(self) -> str:
        """Return what is left."""
        text, self._given = self._new_text(), len(self._ids)
        return text

    def copy(self) -> "WindowDetokenizer":
        """Return an independent copy."""
        return replace(self, _ids=list(self._ids))

    def _new_text(self) -> str:
        given = self.decode(self._ids[self._context : self._given])
        return self.decode(self._ids[self._context :])[len(given) :]


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's detokenizer factory and the texts of its special tokens."""

    detokenizer: Callable[[], Detokenizer]
    special: dict[int, str]
    ordinary_bytes: Callable[[int], bytes]
    """The bytes of a token that is not special."""

    def text_of(self, token_id: int) -> str:
        """Return the text of a single token; a special token's is its name."""
        detokenizer = self.detokenizer()
        return self.special.get(token_id) or detokenizer.push(token_id) + detokenizer.finish()

    def bytes_of(self, token_id: int) -> bytes:
        """Return the bytes of a single token, which may be a part of a character."""
        name = self.special.get(token_id)
        return self.ordinary_bytes(token_id) if name is None else name.encode()


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """Return a tokenizer's vocabulary for decoding token by token."""
    added = tokenizer.added_tokens_decoder
    special = {token_id: token.content for token_id, token in added.items() if token.special}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer) and isinstance(backend.decoder, decoders.ByteLevel):
        bytes_of = cache(_byte_lookup(backend))
        return Vocabulary(lambda: ByteDetokenizer(bytes_of), special, bytes_of)

    def decode(ids: list[int]) -> str:
        text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def bytes_of_piece(token_id: int) -> bytes:
        token = tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):  # an LM head can be padded to more rows than there are tokens
            return b""
        if byte := _BYTE_PIECE.fullmatch(token):
            return bytes([int(byte[1], 16)])
        return token.replace("\u2581", " ").encode()  # SentencePiece's sign for a space

    return Vocabulary(lambda: WindowDetokenizer(decode), special, bytes_of_piece)


def _byte_lookup(backend: Tokenizer) -> Callable[[int], bytes]:
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

    def bytes_of(token_id: int) -> bytes:
        token = backend.id_to_token(token_id)
        if token is None:  # an LM head can be padded to more rows than there are tokens
            return b""
        if all(character in byte_of for character in token):
            return bytes(byte_of[character] for character in token)
        return token.encode()  # an added token is stored as plain text

    return bytes_of


@dataclass
class StreamingText:
    """The text of one answer as it grows. Special tokens are hidden.

    Stop strings see what is shown. One that holds a special token's name sees all names, each as a whole.
    """

    vocabulary: Vocabulary
    stop_strings: tuple[str, ...]
    detokenizer: Detokenizer
    text: str = ""
    """The text emitted so far."""
    stop_string: str | None = None
    """The stop string that fired."""
    _named: tuple[str, ...] = ()
    """The stop strings that hold the name of a special token."""
    _buffer: str = ""
    """Text held back because it may be the beginning of a stop string."""
    _kinds: str = ""
    """For each buffered character: "t" if it is shown, "s" if a special token begins here, "-" inside of one."""

    @classmethod
    def start(cls, vocabulary: Vocabulary, stop_strings: tuple[str, ...]) -> "StreamingText":
        """Return the text of an answer without tokens."""
        names = vocabulary.special.values()
        named = tuple(stop for stop in stop_strings if any(name in stop for name in names))
        return cls(vocabulary, stop_strings, vocabulary.detokenizer(), _named=named)

    def copy(self) -> "StreamingText":
        """Return an independent copy."""
        return replace(self, detokenizer=self.detokenizer.copy())

    def push(self, token_id: int) -> str:
        """Add a token and return the text that can be emitted now.

        If a stop string fires, `stop_string` holds it and nothing more is emitted.
        """
        if self.stop_string is not None:
            return ""
        special = self.vocabulary.special.get(token_id)
        if special is None:
            return self._add(self.detokenizer.push(token_id), "t")
        return self._add([special], "s" + "-" * (len(special) - 1))

    def finish(self) -> str:
        """End the answer and return the rest of its buffered text."""
        shown = "" if self.stop_string is not None else self._add(self.detokenizer.finish(), "t")
        return shown + self._emit(len(self._buffer))

    def _add(self, pieces: Iterable[str], kinds: str) -> str:
        """Add pieces inside of which no stop string ends. kinds: of each piece's characters."""
        for piece in pieces:
            self._buffer += piece
            self._kinds += kinds
            fired = [stop for stop in self.stop_strings if self._begins(stop, len(stop)) is not None]
            if fired:
                self.stop_string = max(fired, key=len)
                begin = self._begins(self.stop_string, len(self.stop_string))
                given = self._emit(begin or 0)
                self._buffer = self._kinds = ""
                return given
        return self._emit(len(self._buffer) - self._partial_match())

    def _partial_match(self) -> int:
        """Return the number of characters to hold back: of the longest end that a stop string begins with."""
        size = len(self._buffer)
        begins = (
            begin
            for stop in self.stop_strings
            for length in range(min(len(stop) - 1, size), 0, -1)
            if (begin := self._begins(stop, length)) is not None
        )
        return size - min(begins, default=size)

    def _begins(self, stop: str, length: int) -> int | None:
        """Return where the stop string's first `length` characters begin, if the buffer ends with them."""
        if stop in self._named:
            begin = len(self._buffer) - length
            is_end = self._buffer.endswith(stop[:length]) and self._kinds[begin] != "-"
            return begin if is_end else None
        if self._kinds.endswith("t" * length):  # the usual case: all of it is shown
            return len(self._buffer) - length if self._buffer.endswith(stop[:length]) else None
        shown = [index for index, kind in enumerate(self._kinds) if kind == "t"][-length:]
        is_end = "".join(self._buffer[index] for index in shown) == stop[:length]
        return shown[0] if is_end else None

    def _emit(self, count: int) -> str:
        pairs = zip(self._buffer[:count], self._kinds[:count], strict=True)
        given = "".join(character for character, kind in pairs if kind == "t")
        self._buffer, self._kinds = self._buffer[count:], self._kinds[count:]
        self.text += given
        return given
