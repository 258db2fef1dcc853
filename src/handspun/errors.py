"""Every error that a user can cause, as one tree.

HandspunError                what went wrong, what was expected, what to do (exit code 2)
├── ConfigError              options that are misspelled, out of range or exclude each other; lists all of them
├── DataError                a file, a row or a cell; names file, row and column
├── TemplateError            a chat template that is missing, or cannot be used for training or prompting
├── ModelError               a model that is unknown, incomplete or does not fit the request
├── TrainingError            a run that cannot continue: a loss that is not finite, too little memory
├── StoppedError             a run that a signal stopped after a step (exit code 128 + signal number)
├── OutputError              a folder that cannot be written: it exists, no permission, no space on the disk
└── VerificationError        numbers that differ from the reference (exit code 1)

`raise` is for a user's mistake; `assert` is for our own invariants.
"""

import signal
from collections.abc import Sequence
from importlib.util import find_spec


class HandspunError(Exception):
    """Base of all errors for users: printed without a traceback, exit code 2."""

    exit_code = 2


class ConfigError(HandspunError):
    """Options that cannot be used. Lists all problems at once."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(HandspunError):
    """Data that cannot be used. The message begins like `train.csv, row 17, column 'output'`."""

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
    """A chat template that is missing, or cannot be used for training or prompting."""


class ModelError(HandspunError):
    """A model that is unknown, incomplete, or does not fit the request."""


class TrainingError(HandspunError):
    """A run that cannot continue, for example because its loss is no longer finite."""


class StoppedError(HandspunError):
    """A run that a signal stopped cleanly after a step."""

    def __init__(self, number: int, *, step: int, total_steps: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step} of {total_steps}")


class OutputError(HandspunError):
    """A file or folder that cannot be written."""


class VerificationError(HandspunError):
    """A model for which Handspun's numbers differ from the reference."""

    exit_code = 1


def check_installed(package: str, extra: str, what: str) -> None:
    """Raise ConfigError if a package of an extra is not installed. what: needs it, as a user would say it."""
    if find_spec(package) is None:
        raise ConfigError(
            f"{what} needs the package {package}, which is not installed. Install it: "
            f"pip install 'handspun[{extra}]' (or 'handspun[all]')."
        )
