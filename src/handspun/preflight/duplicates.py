"""Find rows that are duplicates or near-duplicates of an earlier row.

Two texts are duplicates if their words are the same. They are near-duplicates if the Jaccard similarity of their
word 3-grams is at least 0.8, both with and without the 3-grams that many texts share. So a task that is always
worded the same does not make its rows near-duplicates.

All near-duplicates are found, where MinHash would only find most. If two sets are alike, the rarest fifth of one
shares an element with the rarest fifth of the other ("prefix filtering": Chaudhuri, Ganti and Kaushik, ICDE 2006;
Bayardo, Ma and Srikant, WWW 2007). So only texts that share a rare 3-gram are compared.
"""

# Not datasketch, whose MinHash runs in Python, text by text, nor rensa, which is fast but has a single maintainer.

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"  # Chinese and Japanese write no spaces
    r"|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
    r"|[^\w\s.,;:!?'\"。，；：！？、]"  # 3 + 4 is not 3 - 4
)
_GRAM = 3
Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Alike:
    """A text and the first earlier text that is like it, as indices. same: all words are the same."""

    text: int
    earlier: int
    same: bool


def words_of(text: str) -> list[str]:
    """Return lower-case words, single Chinese and Japanese characters, and signs other than punctuation."""
    return _WORD.findall(text.casefold())


def most_in_common(texts: int) -> int:
    """Return how many texts may share a 3-gram. A more common one is taken as standard wording."""
    return min(max(texts // 20, 5), 50)


def near_duplicate_rows(texts: Sequence[str], known: int) -> list[Alike]:
    """Return the texts that are like an earlier one of the first `known` texts, in order.

    For training texts followed by held-out texts, `known` is the number of training texts.
    """
    words = _numbered_words(texts)
    first: dict[bytes, int] = {}
    same, others = [], []
    for index, text in enumerate(words):
        earlier = first.setdefault(text.tobytes(), index) if index < known else first.get(text.tobytes(), index)
        if earlier != index:
            same.append(Alike(index, earlier, same=True))
        elif len(text):
            others.append(index)
    grams = _Grams([words[index] for index in others])
    near = grams.near_duplicates(sum(index < known for index in others))
    found = [Alike(others[text], others[earlier], same=False) for text, earlier in near]
    return sorted([*same, *found], key=lambda one: one.text)


def _numbered_words(texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
    numbers: defaultdict[str, int] = defaultdict(lambda: len(numbers) + 1)
    return [np.array([numbers[word] for word in words_of(text)], np.int32) for text in texts]


class _Grams:
    """The 3-grams of all texts as numbers, end to end. A 3-gram that is in fewer texts has a smaller number.

    starts: where each text's 3-grams begin, and the end of the last. distinct: how many of a text's 3-grams are
    not shared by many texts. These come first.
    """

    def __init__(self, words: Sequence[npt.NDArray[np.int32]]) -> None:
        self._texts = len(words)
        gram, text = _distinct_pairs(*_grams(words))
        in_texts = np.bincount(gram)
        by_rarity = np.argsort(in_texts, kind="stable")
        number = np.empty_like(by_rarity)
        number[by_rarity] = np.arange(len(by_rarity))
        self._grams, text = _distinct_pairs(number[gram], text)
        self._in_texts = in_texts[by_rarity]
        self._starts = np.searchsorted(text, np.arange(self._texts + 1)).tolist()
        is_distinct = self._in_texts[self._grams] <= most_in_common(self._texts)
        self._distinct = np.bincount(text[is_distinct], minlength=self._texts).tolist()
        self._sets: dict[int, tuple[frozenset[int], frozenset[int]]] = {}

    def near_duplicates(self, known: int) -> Iterator[tuple[int, int]]:
        """Yield (text, the first known text before it that is like it)."""
        texts_with: dict[int, list[int]] = {}
        for text in range(self._texts):
            rarest = self._rarest(text)
            candidates = sorted({other for gram in rarest for other in texts_with.get(gram, ())})
            like = next((other for other in candidates if self._are_alike(text, other)), None)
            if like is not None:
                yield text, like
            for gram in rarest if text < known else ():
                texts_with.setdefault(gram, []).append(text)

    def _rarest(self, text: int) -> list[int]:
        """Return the 3-grams of which a similar text has at least one, without those in no other text."""
        start, count = self._starts[text], self._distinct[text]
        rarest = self._grams[start : start + count - _four_fifths(count) + 1] if count else self._grams[:0]
        return [int(gram) for gram in rarest[self._in_texts[rarest] > 1]]

    def _are_alike(self, text: int, other: int) -> bool:
        return all(
            5 * len(some & others) >= 4 * len(some | others)
            for some, others in zip(self._sets_of(text), self._sets_of(other), strict=True)
        )

    def _sets_of(self, text: int) -> tuple[frozenset[int], frozenset[int]]:
        """Return (the 3-grams that are not shared by many texts, all 3-grams)."""
        if text not in self._sets:
            start, end = self._starts[text], self._starts[text + 1]
            grams = self._grams[start:end].tolist()
            self._sets[text] = frozenset(grams[: self._distinct[text]]), frozenset(grams)
        return self._sets[text]


def _grams(words: Sequence[npt.NDArray[np.int32]]) -> tuple[Array, Array]:
    """Return (numbers of 3-grams, the text of each). A text of one or two words is padded to one 3-gram."""
    filled = [text if len(text) >= _GRAM else np.pad(text, (0, _GRAM - len(text))) for text in words]
    text = np.repeat(np.arange(len(words)), [len(some) for some in filled])
    word = np.concatenate([np.zeros(0, np.int32), *filled]).astype(np.int64)
    gram = word
    for further in range(1, _GRAM):  # numbers pairs, then pairs with the next word, so that they fit in 64 bits
        gram = gram[:-1] * (word.max(initial=0) + 1) + word[further:]
        gram = np.unique(gram, return_inverse=True)[1]
    is_within = text[: len(gram)] == text[_GRAM - 1 :]
    return gram[is_within], text[: len(gram)][is_within]


def _distinct_pairs(gram: Array, text: Array) -> tuple[Array, Array]:
    """Return each 3-gram of a text once, sorted by text and then by number."""
    grams = int(gram.max(initial=0)) + 1
    pairs = np.sort(text * grams + gram)  # np.unique hashes, which takes five times as long
    pairs = pairs[np.diff(pairs, prepend=-1) > 0]
    return pairs % grams, pairs // grams


def _four_fifths(count: int) -> int:
    """Return four fifths, rounded up."""
    return (4 * count + 4) // 5
