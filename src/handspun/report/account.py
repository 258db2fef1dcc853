"""The account of every row, and the lengths of examples, in lines for people."""

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np

from handspun.data.example_arrays import learned_tokens_of, lengths_of
from handspun.data.examples import Example, RowAccount, RowNote, notes_by_text
from handspun.data.naming import listed

_SHOWN = 12
_MOST_REASONS = 30


def account_lines(account: RowAccount, *, max_length: int) -> list[str]:
    """Kept, truncated, dropped and why, with row numbers."""
    lines = [f"{file}: {name} format" for file, name in account.formats.items()]
    lines += [f"{file}: {note}" for file, notes in account.file_notes.items() for note in notes]
    for file, columns in account.unused_columns.items():
        lines.append(f"{file}: columns not read: {listed(columns)}")
    lines.append(f"rows: {account.rows} read, {account.kept} kept, {len(account.dropped)} dropped")
    by_reason = account.dropped_by_reason()
    for reason, notes in islice(by_reason.items(), _MOST_REASONS):
        lines.append(f"  dropped, {reason}: {len(notes)} ({row_numbers(notes)})")
    if len(by_reason) > _MOST_REASONS:
        others = [note for notes in islice(by_reason.values(), _MOST_REASONS, None) for note in notes]
        reasons = len(by_reason) - _MOST_REASONS
        lines.append(f"  dropped for {reasons} more reasons: {len(others)} ({row_numbers(others)})")
    if advice := account.advice():
        lines.append(f"  {advice}")
    if account.truncated:
        where = row_numbers(account.truncated)
        lines.append(f"  truncated to {max_length} tokens: {len(account.truncated)} ({where})")
    for text, noted in notes_by_text(account.notes).items():
        lines.append(f"  {text}: {len(noted)} ({row_numbers(noted)})")
    return lines


def row_numbers(notes: Sequence[RowNote]) -> str:
    """`rows 3, 17 and 4 more`, with the file where there are several."""
    files = dict.fromkeys(note.file for note in notes)
    if len(files) > 1:
        return "; ".join(f"{file} {row_numbers([n for n in notes if n.file == file])}" for file in files)
    shown = ", ".join(str(note.row) for note in notes[:_SHOWN])
    more = f" and {len(notes) - _SHOWN} more" if len(notes) > _SHOWN else ""
    return f"row{'s' if len(notes) > 1 else ''} {shown}{more}"


def length_lines(examples: Sequence[Example]) -> list[str]:
    """Quantiles of the lengths, a small histogram, and the learned share of tokens."""
    lengths: list[int] = np.sort(lengths_of(examples)).tolist()
    learned = learned_tokens_of(examples)
    quantiles = "  ".join(f"{name} {_quantile(lengths, q)}" for name, q in _QUANTILES)
    return [
        f"tokens in an example: {quantiles}",
        *_histogram(lengths),
        f"learned: {learned} of {sum(lengths)} tokens ({learned / sum(lengths):.0%})",
    ]


_QUANTILES = [("least", 0.0), ("median", 0.5), ("90 %", 0.9), ("99 %", 0.99), ("most", 1.0)]


def _quantile(ordered: Sequence[int], q: float) -> int:
    """The smallest length that at least a share q of the examples does not exceed."""
    return ordered[max(-int(-q * len(ordered) // 1) - 1, 0)]


def _histogram(ordered: Sequence[int], width: int = 40) -> list[str]:
    """One line for each doubling of the length."""
    bounds = [0, 16]
    while bounds[-1] < ordered[-1]:
        bounds.append(bounds[-1] * 2)
    bounds = [bound for bound, next_bound in pairwise(bounds) if next_bound >= ordered[0]] + bounds[-1:]
    counts = [sum(low < length <= high for length in ordered) for low, high in pairwise(bounds)]
    tallest = max(counts)
    return [
        f"  {low + 1:>6}-{high:<6} {'█' * -(-count * width // tallest):<{width}} {count}"
        for (low, high), count in zip(pairwise(bounds), counts, strict=True)
    ]
