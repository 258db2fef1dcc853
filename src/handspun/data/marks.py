"""Read marks in the data that say what to train on: `weight`, `train`, `loss`, `loss_mask` and similar names.

A mark with a certain meaning is followed. An unclear mark drops its row, and the reason names the key: to train on
what the data excludes is worse than to lose the row.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

from handspun.data.rows import DroppedRow
from handspun.display import describe_type, printable

# Names in lower case with `_` between words, as `_words` splits them.
_TRAIN_IF_TRUE = {
    *("weight", "loss_weight", "train_weight", "training_weight", "sample_weight"),
    *("train", "training", "trainable", "is_trainable", "train_on", "train_on_turn", "train_on_this", "to_train"),
    *("should_train", "is_train", "train_turn", "use_for_training", "include_in_training"),
    *("loss", "loss_mask", "lossmask", "compute_loss", "calculate_loss", "calc_loss", "has_loss", "with_loss"),
    *("use_loss", "include_loss", "include_in_loss", "apply_loss", "require_loss"),
    *("learn", "learnable", "to_learn", "should_learn", "supervise", "supervised", "is_supervised"),
}
_NOT_IF_TRUE = {
    *("masked", "is_masked", "loss_masked", "mask_loss", "no_loss", "ignore_loss", "loss_ignore", "skip_loss"),
    *(
        "ignore_in_loss",
        "exclude_loss",
        "exclude_from_loss",
        "no_train",
        "not_train",
        "do_not_train",
        "dont_train",
    ),
    *("no_training", "skip_train", "skip_training", "ignore_training", "exclude_from_training", "untrainable"),
    *("no_grad", "do_not_learn", "no_learn"),
}
# `mask: 1` means "train on it" in some tools and "masked out" in others.
_EITHER = {"mask", "masks", "train_mask", "training_mask", "token_mask"}
_LEAVE_OUT = {"ignore", "ignored", "skip", "skipped", "exclude", "excluded"}
_OF_PARTS = {"train_detail", "train_details", "training_detail", "loss_spans", "mask_spans", "train_spans"}
_OF_PROMPTS = {
    *("train_on_prompt", "train_on_prompts", "train_on_input", "train_on_inputs", "train_on_source"),
    *("train_on_user", "train_on_system"),
}
_LIKE_A_MARK = {
    *("train", "training", "trainable", "trained", "loss", "losses", "mask", "masks", "masked", "masking"),
    *("weight", "weights", "learn", "learned", "learnable", "supervise", "supervised"),
}

_MASK_TEXT = re.compile(r"\s*\[(?:\s|[01.,]|true|false)*\]\s*", re.IGNORECASE)

Kind = Literal["train", "not", "either", "leave out", "parts", "prompts", "like a mark"]


@lru_cache(maxsize=4096)
def mark_kind(key: str) -> Kind | None:
    """Return the kind of mark that a key's name is; None if it is no mark."""
    words = _words(key)
    name = "_".join(words)
    kinds: list[tuple[Kind, set[str]]] = [
        ("train", _TRAIN_IF_TRUE),
        ("not", _NOT_IF_TRUE),
        ("either", _EITHER),
        ("leave out", _LEAVE_OUT),
        ("parts", _OF_PARTS),
        ("prompts", _OF_PROMPTS),
    ]
    for kind, names in kinds:
        if name in names:
            return kind
    return "like a mark" if _LIKE_A_MARK.intersection(words) else None


def turn_mark(turn: Mapping[str, Any], role: str) -> tuple[bool | None, list[str]]:
    """Return (whether to train on a turn, or None without a mark; notes for the data report).

    Raises DroppedRow for an assistant's turn whose marks contradict each other or are unclear.
    """
    if role != "assistant":
        return None, list(_notes_of_others(turn, role))
    _check_nested(turn)
    marks = {key: mark for key, value in turn.items() if (mark := _mark_of_turn(key, value)) is not None}
    if len(set(marks.values())) > 1:
        raise DroppedRow(f"contradictory marks on one message ({', '.join(map(printable, marks))})")
    train = next(iter(marks.values()), None)
    if train is not False:
        return train, []
    return False, [f"turns marked {_as_written(key, turn[key])} are context, not trained on" for key in marks]


def check_parts(parts: Any) -> None:
    """Raise DroppedRow if a part of a message, or a tool call, is marked as not to be trained on."""
    for part in parts if isinstance(parts, list) else [parts]:
        for key, value in part.items() if isinstance(part, dict) else ():
            if _mark_of_turn(key, value) is False:
                raise DroppedRow(
                    f"a part of a message is marked {_as_written(key, value)}: mark the whole message instead"
                )


def row_marks(values: Mapping[str, Any], used: set[str]) -> list[str]:
    """Return notes on the marks in a row's columns. used: columns that have another meaning.

    Raises DroppedRow for a row that is marked as not to be trained on, or whose mark is unclear.
    """
    notes = []
    _check_nested(values)
    for column, value in values.items():
        kind = None if column in used else mark_kind(column)
        if kind is None:
            continue
        verdict = _verdict(value)
        if verdict is (kind == "not") and kind in ("train", "not"):
            raise DroppedRow(f"{_as_written(column, value)}: a row not to be trained on")
        if kind == "leave out" and verdict is True:
            raise DroppedRow(f"{_as_written(column, value)}: a row to leave out")
        if kind == "prompts" and verdict is True:
            notes.append(f"the column '{printable(column)}' asks to train on prompts, which is not supported")
        elif _could_leave_out(column, kind, value, verdict):
            raise DroppedRow(
                f"the column '{printable(column)}' is a mark of what to train on, but is neither 0 nor 1 (rename "
                "it if it is not a mark)"
            )
        elif kind in ("train", "not", "either") and verdict is _UNCLEAR:
            notes.append(f"the column '{printable(column)}' is ignored as a mark: it is neither 0 nor 1")
        elif kind in ("either", "like a mark", "parts") and verdict is not None and verdict is not _UNCLEAR:
            notes.append(f"the column '{printable(column)}' looks like a mark of what to train on, but is ignored")
    return notes


def is_row_mark(column: str) -> bool:
    """Return whether a column is read as a mark of its row."""
    return mark_kind(column) in ("train", "not", "leave out")


_UNCLEAR = "unclear"


def _verdict(value: Any) -> bool | str | None:
    """Return True or False for 1 and 0, as numbers, strings or booleans; None for no value; else _UNCLEAR."""
    if value is None or (isinstance(value, str | list | dict) and not value):
        return None
    if isinstance(value, str):
        text = value.strip().lower()
        if text in ("", "true", "yes", "false", "no"):
            return text in ("true", "yes") if text else None
        try:
            value = float(text)
        except ValueError:
            return _UNCLEAR
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    return _UNCLEAR


def _mark_of_turn(key: str, value: Any) -> bool | None:
    """Return whether a key of an assistant's turn says to train on it; None if it is no mark.

    Raises DroppedRow for an unclear mark that may mean "do not train on this".
    """
    kind, verdict = mark_kind(key), _verdict(value)
    if kind is None or verdict is None or kind == "prompts":
        return None
    if kind == "parts":
        raise DroppedRow(
            f"'{printable(key)}' marks parts of a message, which is not supported: mark the whole message instead"
        )
    if kind in ("train", "not"):
        if isinstance(verdict, str):
            what = "another number" if _is_number(value) else describe_type(value)
            raise DroppedRow(
                f"the mark '{printable(key)}' on a message is {what} (expected 0 or 1, true or false)"
            )
        return verdict is (kind == "train")
    if kind == "either" or (kind == "leave out" and verdict is not False):
        raise DroppedRow(
            f"the mark '{printable(key)}' on a message could mean to train on it, or not to: use `train`, true or "
            "false, instead"
        )
    if kind == "like a mark" and (isinstance(verdict, bool) or _is_mask(value)):
        raise DroppedRow(
            f"'{printable(key)}' on a message looks like a mark of what to train on, but its meaning is unknown: "
            "use `train`, true or false, instead"
        )
    return None


def _check_nested(values: Mapping[str, Any]) -> None:
    """Raise DroppedRow for a mark that says "do not train on this" inside an object such as `metadata`."""
    for outer, nested in values.items():
        if not isinstance(nested, dict):
            continue
        for key, value in nested.items():
            kind = mark_kind(key)
            if kind in ("train", "not") and _verdict(value) is (kind == "not"):
                raise DroppedRow(
                    f"{_as_written(key, value)} inside '{printable(outer)}', where marks are not read"
                )


def _notes_of_others(turn: Mapping[str, Any], role: str) -> Iterator[str]:
    """Yield notes on marks that ask to train on turns of other roles."""
    for key, value in turn.items():
        kind = mark_kind(key)
        if kind not in ("train", "not"):
            continue
        verdict = _verdict(value)
        if verdict is (kind == "train") or verdict is _UNCLEAR:
            yield f"a {role} message marked '{printable(key)}' is not trained on: only assistant messages are"


def _could_leave_out(column: str, kind: Kind, value: Any, verdict: bool | str | None) -> bool:
    """Return whether a column that is neither 0 nor 1 may exclude a part of its row: another weight, or a mask."""
    if kind not in ("train", "not", "either") or verdict is not _UNCLEAR:
        return False
    return _is_mask(value) or ("weight" in _words(column) and _is_number(value))


def _is_mask(value: Any) -> bool:
    if isinstance(value, str):  # in a csv cell
        return _MASK_TEXT.fullmatch(value) is not None
    return isinstance(value, list) and all(isinstance(_verdict(item), bool) for item in value)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, int | float | str) and not math.isnan(float(value))
    except ValueError:
        return False


def _words(key: str) -> list[str]:
    """Split a name into lower-case words: `lossMask`, `loss-mask` and `Loss Mask` are loss, mask."""
    return re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key).lower())


def _as_written(key: str, value: Any) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value).strip()
    return f"'{printable(key)}' {printable(text, most=10)}"
