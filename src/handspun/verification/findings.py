"""What a check has found, and where two answers part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["pass", "tie", "info", "fail"]
"""A tie: the outputs differ where the numbers behind them are so close that the order of a sum decides. Info:
there is nothing that it could be compared with, or nothing that was promised."""


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """The first place at which two answers to a prompt part."""

    prompt: int
    """Its number, from 1."""
    token: int
    """Its number in the answer, from 1."""
    ours: str
    theirs: str
    """The two tokens as they read; empty where an answer has ended."""
    margin: float
    """By which the reference prefers its own token, in logits; of beams, in log-probability."""
    rounding: float
    """The largest margin that rounding explains."""

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it."""
        return self.margin <= self.rounding


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the result."""

    check: str
    case: str
    """What was compared."""
    status: Status
    found: str
    """What came of it, in words and numbers."""
    divergences: tuple[Divergence, ...] = ()


def within(check: str, case: str, value: float, limit: float, *, what: str = "difference") -> Finding:
    """A number and what it may be at most. NaN is too much."""
    status: Status = "pass" if value <= limit else "fail"
    return Finding(check=check, case=case, status=status, found=f"{what} {value:.1e}, at most {limit:.1e}")


def compared(check: str, case: str, same: str, divergences: Sequence[Divergence]) -> Finding:
    """Answers: `same` says what is the same if nothing diverges; ties alone are a tie."""
    if not divergences:
        return Finding(check=check, case=case, status="pass", found=same)
    status: Status = "tie" if all(divergence.is_tie for divergence in divergences) else "fail"
    count = len(divergences)
    found = f"{count} answer{'s' if count > 1 else ''} part{'' if count > 1 else 's'} from the reference"
    return Finding(check=check, case=case, status=status, found=found, divergences=tuple(divergences))


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The index of the first token that differs, or at which one of them has ended; None if they are the same."""
    if list(ours) == list(theirs):
        return None
    shorter = min(len(ours), len(theirs))
    return next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)


__all__ = ["Divergence", "Finding", "Status", "compared", "first_difference", "within"]
