"""Turn rows into tokenized examples, stored in arrays, and report what happened to every row."""

import gc
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from handspun.config import DataFormat
from handspun.data.chat_template import ChatTemplate, Layout, Span, TokenizedExample
from handspun.data.conversations import to_conversation
from handspun.data.documents import SPLIT, lay_out_document, pieces
from handspun.data.formats import TEXT, check_one_kind, recognize_format, used_columns
from handspun.data.marks import is_row_mark
from handspun.data.messages import UNKNOWN_ROLE, role_advice
from handspun.data.rendering import EndlessTemplateError
from handspun.data.rows import DroppedRow, Row
from handspun.data.text_loss import detect_mojibake
from handspun.errors import DataError, TemplateError


@dataclass(frozen=True, eq=False)
class Example:
    """Token ids, a loss mask (one bool per id, True for target tokens), and the row they came from."""

    input_ids: list[int]
    loss_mask: list[bool]
    file: str
    row: int

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned_tokens(self) -> int:
        """Number of target tokens: tokens that the loss is computed on."""
        return sum(self.loss_mask)


@dataclass(frozen=True, eq=False)
class TokenDataset(Sequence[Example]):
    """Many examples, end to end in arrays. Indexing builds the lists of one example.

    input_ids (int32), loss_mask (bool): (tokens,). starts (int64): (examples + 1,), the start of each example and
    the end of the last. rows (int64), files (int32, indices into file_names): (examples,).
    """

    # Arrays take 5 bytes per token, where lists take 16 or more. They are the same in memory and mapped from the
    # cache.

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
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
        i = range(len(self))[index]  # negative indices count from the end, and IndexError ends an iteration
        tokens = slice(self.starts[i], self.starts[i + 1])
        return Example(
            self.input_ids[tokens].tolist(),
            self.loss_mask[tokens].tolist(),
            self.file_names[self.files[i]],
            int(self.rows[i]),
        )


def concatenate(parts: Iterable[Sequence[Example]]) -> TokenDataset:
    """Return the examples of all parts, in order."""
    file_indices: dict[str, int] = {}
    arrays = [_arrays(part, file_indices) for part in parts] or [_arrays([], file_indices)]
    input_ids, loss_mask, lengths, rows, files = (np.concatenate(column) for column in zip(*arrays, strict=True))
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return TokenDataset(input_ids, loss_mask, starts, rows, files, list(file_indices))


def lengths_of(examples: Sequence[Example]) -> npt.NDArray[np.int64]:
    """Return the number of tokens in each example: (examples,)."""
    if isinstance(examples, TokenDataset):
        return np.diff(examples.starts)
    return np.array([len(example) for example in examples], np.int64)


def learned_tokens_of(examples: Sequence[Example]) -> int:
    """Return the number of target tokens in all examples."""
    if isinstance(examples, TokenDataset):
        return int(np.count_nonzero(examples.loss_mask))
    return sum(example.learned_tokens for example in examples)


def _arrays(part: Sequence[Example], file_indices: dict[str, int]) -> list[npt.NDArray[Any]]:
    """Return input_ids, loss_mask, lengths, rows and files. Add new files to `file_indices`."""
    return [
        np.array([id for example in part for id in example.input_ids], np.int32),
        np.array([is_target for example in part for is_target in example.loss_mask], np.bool_),
        np.array([len(example) for example in part], np.int64),
        np.array([example.row for example in part], np.int64),
        np.array([file_indices.setdefault(example.file, len(file_indices)) for example in part], np.int32),
    ]


_ROWS_AT_ONCE = 1000
"""Rows that are tokenized together."""

_CHARACTERS_OF_A_TOKEN = 1000
"""Upper bound on the characters of one token."""

_MOST_REASONS = 20
"""Limit on the reasons that an error names."""

_MOST_UNUSED = 100
"""Limit on the unused columns and message keys that the report names."""

_AHEAD = 3
"""Blocks of rows that are tokenized while the next block is laid out."""


@dataclass(frozen=True)
class RowIssue:
    """Something that happened to a row."""

    file: str
    row: int
    text: str


@dataclass
class DataReport:
    """What happened to every row: rows = kept + dropped. Truncated and noted rows are among the kept."""

    rows: int = 0
    kept: int = 0
    dropped: list[RowIssue] = field(default_factory=list)
    truncated: list[RowIssue] = field(default_factory=list)
    notes: list[RowIssue] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)
    """file -> its format, recognized or given."""
    unused_columns: dict[str, list[str]] = field(default_factory=dict)
    """file -> columns that are ignored."""
    file_notes: dict[str, list[str]] = field(default_factory=dict)
    """file or folder -> what was skipped there, or changed when it was read."""

    def dropped_by_reason(self) -> dict[str, list[RowIssue]]:
        """Return the dropped rows grouped by reason, the most frequent reason first."""
        reasons = notes_by_text(self.dropped)
        return dict(sorted(reasons.items(), key=lambda reason: -len(reason[1])))

    def advice(self) -> str | None:
        """Return how to fix the dropped rows, if there is general advice."""
        return role_advice() if any(note.text.startswith(UNKNOWN_ROLE) for note in self.dropped) else None


def notes_by_text(notes: Iterable[RowIssue]) -> dict[str, list[RowIssue]]:
    """Return the notes grouped by text, in order of first occurrence."""
    found: dict[str, list[RowIssue]] = {}
    for note in notes:
        found.setdefault(note.text, []).append(note)
    return found


HELD_OUT_SHARE, MOST_HELD_OUT, FEWEST_TO_HOLD_OUT = 0.05, 200, 100
"""By default this share of the rows is held out, at most so many rows, if there are at least so many."""


def hold_out(rows: Sequence[Row], ratio: float | None, seed: int) -> tuple[list[Row], list[Row]]:
    """Return (training rows, held-out rows), each in the original order. The seed decides which rows are held out.

    With a ratio, at least one row is held out and at least one is left. None is the default: 5 % of the rows, at
    most 200, and none of fewer than 100 rows.
    """
    if ratio == 0 or (ratio is None and len(rows) < FEWEST_TO_HOLD_OUT):
        return list(rows), []
    if len(rows) < 2:
        raise DataError(
            f"rows: {len(rows)}, too few to hold some out (expected at least 2). Add rows, or use --eval-ratio 0.",
            file=rows[0].file if rows else None,
        )
    if ratio is None:
        count = min(round(len(rows) * HELD_OUT_SHARE), MOST_HELD_OUT)
    else:
        count = min(max(round(len(rows) * ratio), 1), len(rows) - 1)
    held = set(random.Random(seed).sample(range(len(rows)), count))
    kept = [row for i, row in enumerate(rows) if i not in held]
    return kept, [row for i, row in enumerate(rows) if i in held]


def build_examples(
    rows: Sequence[Row],
    template: ChatTemplate,
    *,
    max_length: int,
    data_format: DataFormat = "auto",
    system_prompt: str | None = None,
    role_map: Mapping[str, str] | None = None,
    strict: bool = False,
    progress: Callable[[int], None] | None = None,
) -> tuple[TokenDataset, DataReport]:
    """Return examples of at most `max_length` tokens, and a report on every row.

    A row with nothing to train on is dropped, and the report gives the reason. Raises DataError if no row is left,
    and under `strict` if a row was dropped or truncated.

    Args:
        rows: as `read_rows` returns them.
        template: the model's chat template.
        max_length: most tokens per example. Longer examples are truncated.
        data_format: the format of all rows, or "auto" to recognize it per file.
        system_prompt: for conversations without a system message.
        role_map: more names of roles, each with the role that it stands for.
        strict: whether a dropped or truncated row is an error.
        progress: called now and then with the number of rows done.
    """
    columns = list(dict.fromkeys((row.file, tuple(row.values)) for row in rows))
    account = DataReport(rows=len(rows), formats=_formats(columns, data_format))
    account.unused_columns = _unused_columns(columns, account.formats)

    def laid_out() -> Iterator[_LaidOut]:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield [
                (row, layouts)
                for row in rows[start : start + _ROWS_AT_ONCE]
                if (layouts := _lay_out(row, template, account, system_prompt, role_map, max_length))
            ]
            if progress is not None:
                progress(min(start + _ROWS_AT_ONCE, len(rows)))

    with _gc_frozen():
        examples = concatenate(
            [example for row, encoded in part for example in _counted(row, encoded, account, max_length, template)]
            for part in _tokenize_in_threads(laid_out(), template)
        )
    account.dropped.sort(key=lambda note: (list(account.formats).index(note.file), note.row))
    check_rows_left(account, strict=strict)
    return examples, account


@contextmanager
def _gc_frozen() -> Iterator[None]:
    """Exclude existing objects, mostly rows, from garbage collection: scanning them again and again takes time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_LaidOut = list[tuple[Row, list[Layout]]]
_Tokenized = list[tuple[Row, list[TokenizedExample]]]


def _tokenize_in_threads(parts: Iterable[_LaidOut], template: ChatTemplate) -> Iterator[_Tokenized]:
    """Tokenize the parts in threads, and yield them in order."""
    # `tokenizers` releases the GIL, so Python lays out the next parts meanwhile.
    with ThreadPoolExecutor(_AHEAD) as threads:
        waiting: deque[Future[_Tokenized]] = deque()
        for part in parts:
            waiting.append(threads.submit(_tokenized, part, template))
            if len(waiting) == _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _tokenized(part: _LaidOut, template: ChatTemplate) -> _Tokenized:
    encoded = iter(template.tokenize([layout for _, layouts in part for layout in layouts]))
    return [(row, list(islice(encoded, len(layouts)))) for row, layouts in part]


def _counted(
    row: Row, encoded: list[TokenizedExample], account: DataReport, max_length: int, template: ChatTemplate
) -> list[Example]:
    made = list(_examples_of(row, encoded, account, max_length))
    account.kept += bool(made)
    notes = (note for example in encoded for note in template.text_loss.notes_on_ids(example.input_ids))
    account.notes += [RowIssue(row.file, row.number, note) for note in dict.fromkeys(notes)]
    return made


def _lay_out(
    row: Row,
    template: ChatTemplate,
    account: DataReport,
    system_prompt: str | None,
    role_map: Mapping[str, str] | None,
    max_length: int,
) -> list[Layout]:
    """Return the row's examples before they are tokenized; none if the row is dropped."""
    try:
        data_format = account.formats[row.file]
        conversation = to_conversation(row, data_format, system_prompt=system_prompt, role_map=role_map)
        if data_format == TEXT:
            whole = [lay_out_document(conversation.messages[0]["content"], template)]
        else:
            whole = template.lay_out(conversation.messages, conversation.tools)
    except EndlessTemplateError:
        raise
    except (DroppedRow, TemplateError) as error:
        account.dropped.append(RowIssue(row.file, row.number, str(error)))
        return []
    layouts = whole if data_format == TEXT else [_tokenizable(layout, max_length) for layout in whole]
    damage = detect_mojibake(message["content"] for message in conversation.messages)
    _add_unread_keys(account, row.file, conversation.unread_keys)
    notes = [*conversation.notes, *(layout.note for layout in layouts), *damage, *_changed(layouts, template)]
    account.notes += [RowIssue(row.file, row.number, note) for note in dict.fromkeys(notes) if note]
    return layouts


def _add_unread_keys(account: DataReport, file: str, keys: Iterable[str]) -> None:
    """Add message keys to the unused columns, up to a limit, because data can have any number of keys."""
    if not keys:
        return
    unused = account.unused_columns.setdefault(file, [])
    for key in keys:
        name = f"{key} (of messages)"
        if name not in unused and len(unused) < _MOST_UNUSED:
            unused.append(name)


def _changed(layouts: Sequence[Layout], template: ChatTemplate) -> list[str]:
    return template.text_loss.notes(
        span.text for layout in layouts for span in layout.spans if span.token_ids is None
    )


def _tokenizable(layout: Layout, max_length: int) -> Layout:
    """Cut off text that is certainly beyond `max_length`: a cell of 100 MB would take minutes and gigabytes."""
    left = (max_length + 1) * _CHARACTERS_OF_A_TOKEN
    spans: list[Span] = []
    for span in layout.spans:
        if len(span.text) > left and span.token_ids is None:
            spans.append(span._replace(text=span.text[:left]))
            return replace(layout, spans=spans, is_cut=True)
        spans.append(span)
        left -= len(span.text)
    return layout


def _examples_of(
    row: Row, encoded: list[TokenizedExample], account: DataReport, max_length: int
) -> Iterator[Example]:
    if account.formats[row.file] == TEXT:
        encoded = [piece for example in encoded for piece in pieces(example, max_length)]
        if len(encoded) > 1:
            account.notes.append(RowIssue(row.file, row.number, SPLIT))
    whole = [_drop_trailing_prompt(example) for example in encoded]
    longest = max(len(example.input_ids) for example in whole)
    is_cut = any(example.is_cut for example in encoded)
    if longest > max_length or is_cut:
        account.truncated.append(RowIssue(row.file, row.number, f"{'more than ' * is_cut}{longest} tokens"))
        whole = [
            _drop_trailing_prompt(TokenizedExample(e.input_ids[:max_length], e.loss_mask[:max_length]))
            for e in whole
        ]
    if not any(example.input_ids for example in whole):
        reason = f"nothing to train on is left within max_length {max_length}"
        account.dropped.append(RowIssue(row.file, row.number, reason))
    for example in whole:
        if example.input_ids:
            yield Example(example.input_ids, example.loss_mask, row.file, row.number)


def _drop_trailing_prompt(encoded: TokenizedExample) -> TokenizedExample:
    """Cut off what follows the last target token. Without any target token, nothing is left."""
    # The first id is never a target, because nothing predicts it.
    loss_mask = [False, *encoded.loss_mask[1:]]
    length = len(loss_mask) - loss_mask[::-1].index(True) if True in loss_mask else 0
    return TokenizedExample(encoded.input_ids[:length], loss_mask[:length])


_Columns = Sequence[tuple[str, tuple[str, ...]]]
"""Files, each with the columns of some of its rows."""


def check_formats(rows: Sequence[Row], data_format: DataFormat) -> None:
    """Raise DataError if the columns of a file's rows fit no format, or several."""
    _formats(list(dict.fromkeys((row.file, tuple(row.values)) for row in rows)), data_format)


def _formats(columns: _Columns, data_format: DataFormat) -> dict[str, str]:
    """Return the format of each file, recognized from the columns of all its rows."""
    of_file: dict[str, dict[str, None]] = {}
    for file, names in columns:
        of_file.setdefault(file, {}).update(dict.fromkeys(names))
    if data_format != "auto":
        return dict.fromkeys(of_file, data_format)
    formats: dict[str, str] = {file: recognize_format(list(names), file) for file, names in of_file.items()}
    for file, of_row in columns:
        check_one_kind(of_row, formats[file], file)
    return formats


def _unused_columns(columns: _Columns, formats: dict[str, str]) -> dict[str, list[str]]:
    unused: dict[str, dict[str, None]] = {}
    for file, names in columns:
        used = used_columns(formats[file])
        others = (name for name in names if name not in used and not is_row_mark(name))
        unused.setdefault(file, {}).update(dict.fromkeys(others))
    return {file: list(names) for file, names in unused.items() if names}


def check_rows_left(account: DataReport, *, strict: bool) -> None:
    """Raise DataError if no row is left, or under `strict` if a row was dropped or truncated."""
    first = account.dropped[0] if account.dropped else None
    if account.kept == 0:
        by_reason = account.dropped_by_reason()
        reasons = "; ".join(f"{reason}: {len(n)}" for reason, n in islice(by_reason.items(), _MOST_REASONS))
        more = f"; and {len(by_reason) - _MOST_REASONS} more reasons" if len(by_reason) > _MOST_REASONS else ""
        advice = account.advice()
        raise DataError(
            f"none of its {account.rows} rows can be trained on ({reasons}{more}). "
            + (f"{advice[0].upper()}{advice[1:]}." if advice else "Run `handspun preview` to see what is read."),
            file=first.file if first else None,
        )
    lost = [*account.dropped, *account.truncated]
    if strict and lost:
        shown = "\n".join(f"  {note.file}, row {note.row}: {note.text}" for note in lost[:20])
        more = f"\n  and {len(lost) - 20} more" if len(lost) > 20 else ""
        raise DataError(
            f"{len(account.dropped)} rows dropped and {len(account.truncated)} truncated, which --strict "
            f"does not allow:\n{shown}{more}\nFix the rows, raise --max-length, or remove --strict."
        )
