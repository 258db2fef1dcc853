"""When an answer's text ends: stop strings, matched on decoded text across token boundaries.

Of several stop strings the one that is complete first fires, and of those the longest; how the text was
cut into tokens does not matter. It is cut from the text. While streaming, only what may still become a stop
string is held back, besides an unfinished character.
"""

from dataclasses import dataclass, replace

from handspun.decoding.detokenize import Detokenizer, Vocabulary


@dataclass
class AnswerText:
    """The text of one answer as it grows. Special tokens are not shown in it, but stop strings see them."""

    vocabulary: Vocabulary
    stop_strings: tuple[str, ...]
    detokenizer: Detokenizer
    text: str = ""
    """All that has been given out."""
    stop_string: str | None = None
    """The stop string that fired."""
    _held: str = ""
    """What may be the beginning of a stop string."""
    _shown: tuple[bool, ...] = ()
    """For each held character, whether it is part of the text (a special token's are not)."""

    @classmethod
    def start(cls, vocabulary: Vocabulary, stop_strings: tuple[str, ...]) -> "AnswerText":
        """The text of an answer that has no token yet."""
        return cls(vocabulary, stop_strings, vocabulary.detokenizer())

    def copy(self) -> "AnswerText":
        """The same text, to go on from in another way."""
        return replace(self, detokenizer=self.detokenizer.copy())

    def push(self, token_id: int) -> str:
        """Adds a token; returns the text that can be shown now. `stop_string` says whether one fired, and
        then nothing more is shown."""
        if self.stop_string is not None:
            return ""
        special = self.vocabulary.special.get(token_id)
        new = self.detokenizer.push(token_id) if special is None else special
        return self._add(new, shown=special is None)

    def finish(self) -> str:
        """Ends the answer; returns the rest of its text, which had been held back."""
        shown = "" if self.stop_string is not None else self._add(self.detokenizer.finish(), shown=True)
        return shown + self._give(len(self._held))

    def _add(self, new: str, *, shown: bool) -> str:
        for character in new:
            self._held += character
            self._shown += (shown,)
            fired = [stop for stop in self.stop_strings if self._held.endswith(stop)]
            if fired:
                self.stop_string = max(fired, key=len)
                given = self._give(len(self._held) - len(self.stop_string))
                self._held, self._shown = "", ()
                return given
        return self._give(len(self._held) - self._partial_match())

    def _partial_match(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max((len(stop) for stop in self.stop_strings), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self.stop_strings):
                return length
        return 0

    def _give(self, count: int) -> str:
        pairs = zip(self._held[:count], self._shown[:count], strict=True)
        given = "".join(character for character, shown in pairs if shown)
        self._held, self._shown = self._held[count:], self._shown[count:]
        self.text += given
        return given


__all__ = ["AnswerText"]
