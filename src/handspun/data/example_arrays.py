"""Examples end to end in arrays: far less memory than lists take, and mapped from a file as they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Example:
    """What the model reads (`input_ids`), what it is taught (`learned`, one bool per id), and from where."""

    input_ids: list[int]
    learned: list[bool]
    file: str
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned_tokens(self) -> int:
        """Tokens that the loss is taken over."""
        return sum(self.learned)


@dataclass(frozen=True, eq=False)
class ExampleArrays(Sequence[Example]):
    """Many examples; the lists of one are made when it is asked for.

    input_ids (int32), learned (bool): (tokens,). starts (int64): (examples + 1,), where each begins, and the end
    of the last. rows (int64), files (int32, places in file_names): (examples,).
    """

    input_ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]
    files: npt.NDArray[np.int32]
    file_names: list[str]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # negative ones count from the end, and IndexError ends an iteration
        place = slice(self.starts[i], self.starts[i + 1])
        return Example(
            self.input_ids[place].tolist(),
            self.learned[place].tolist(),
            self.file_names[self.files[i]],
            int(self.rows[i]),
        )


def end_to_end(parts: Iterable[Sequence[Example]]) -> ExampleArrays:
    """The examples of all parts, in their order."""
    places: dict[str, int] = {}
    arrays = [_arrays(part, places) for part in parts] or [_arrays([], places)]
    input_ids, learned, lengths, rows, files = (np.concatenate(column) for column in zip(*arrays, strict=True))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return ExampleArrays(input_ids, learned, starts, rows, files, list(places))


def lengths_of(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """(examples,): tokens in each."""
    if isinstance(examples, ExampleArrays):
        return np.diff(examples.starts)
    return np.array([len(example) for example in examples], np.int64)


def learned_tokens_of(examples: Sequence[Example]) -> int:
    """Tokens of all examples that the loss is taken over."""
    if isinstance(examples, ExampleArrays):
        return int(np.count_nonzero(examples.learned))
    return sum(example.learned_tokens for example in examples)


def _arrays(part: Sequence[Example], places: dict[str, int]) -> list[npt.NDArray[Any]]:
    """input_ids, learned, lengths, rows, files; new files get a place."""
    return [
        np.array([id for example in part for id in example.input_ids], np.int32),
        np.array([is_learned for example in part for is_learned in example.learned], np.bool_),
        np.array([len(example) for example in part], np.int64),
        np.array([example.row for example in part], np.int64),
        np.array([places.setdefault(example.file, len(places)) for example in part], np.int32),
    ]
