"""Steps whose loss is far above those before it."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

WINDOW = 50
"""So many losses are looked back on."""

_WARM_UP = 20
"""With fewer there is no telling what is usual."""

_FACTOR = 15
_LEAST = 0.5


@dataclass(frozen=True)
class Spike:
    """A step whose loss is above `limit`; `usual` is the median of the losses before it. batch: file and number of
    each of its rows."""

    step: int
    epoch: int
    loss: float
    usual: float
    limit: float
    batch: list[tuple[str, int]]


def spike_in(
    losses: Sequence[float], loss: float, *, step: int, epoch: int, batch: list[tuple[str, int]]
) -> Spike | None:
    """The step as a Spike, if its loss is one by the last `WINDOW` losses before it; None while they are too few.

    It is one above median + 15 times the median absolute deviation (Hampel's rule, with a wide margin: losses of
    small batches have a long upper tail), and at least 0.5 above the median: where nearly all is learned, losses
    are multiples of each other. A spike among the losses before moves neither by much.
    """
    recent = losses[-WINDOW:]
    if len(recent) < _WARM_UP:
        return None
    usual = median(recent)
    deviation = median(abs(earlier - usual) for earlier in recent)
    limit = usual + max(_FACTOR * deviation, _LEAST)
    return Spike(step, epoch, loss, usual, limit, batch) if loss > limit else None
