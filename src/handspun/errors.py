"""Every error that a user can cause, as one tree.

HandspunError                what went wrong, what was expected, what to do (exit code 2)
├── ConfigError              options that are misspelt, out of range or exclude each other; lists all of them
├── DataError                a file, a row or a cell; names file, row and column
├── TemplateError            a chat template that is missing, or cannot be used for training or prompting
├── ModelError               a model that is unknown, incomplete or does not fit the request
├── TrainingError            a run that cannot go on: a loss or gradient that is not finite (names the rows), too
│                            little memory (names what takes less), another process that died (names it)
├── StoppedError             a run that a signal ended after a step (exit code 128 + its number)
├── OutputError              a folder that cannot be written: exists, no permission, no room on the disk
└── VerificationError        numbers that are not those of the reference (exit code 1)

`raise` is for a user's mistake; `assert` is for our own invariants.
"""

import signal
from collections.abc import Sequence


class HandspunError(Exception):
    """Base of all errors that are for people: printed without a traceback, exit code 2."""

    exit_code = 2


class ConfigError(HandspunError):
    """Options that cannot be used, all of them at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(HandspunError):
    """Data that cannot be used. `where` reads like `train.csv, row 17, column 'output'`."""

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        row: int | None = None,
        column: str | None = None,
    ) -> None:
        self.file, self.line, self.row, self.column = file, line, row, column
        parts = [
            file,
            f"line {line}" if line is not None else None,
            f"row {row}" if row is not None else None,
            f"column {column!r}" if column is not None else None,
        ]
        where = ", ".join(part for part in parts if part)
        super().__init__(f"{where}: {message}" if where else message)


class TemplateError(HandspunError):
    """A chat template that is missing, or that cannot serve for training or prompting."""


class ModelError(HandspunError):
    """A model that is unknown, incomplete, or does not fit the request."""


class TrainingError(HandspunError):
    """A run that cannot go on, such as one whose loss is not a number any more."""


class StoppedError(HandspunError):
    """A run that a signal ended, in order, after a step."""

    def __init__(self, number: int, *, step: int, total_steps: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step} of {total_steps}")


class OutputError(HandspunError):
    """A place that cannot be written to."""


class VerificationError(HandspunError):
    """A model with which Handspun does not compute what it should."""

    exit_code = 1
