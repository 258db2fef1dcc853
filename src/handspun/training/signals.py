"""Ctrl-C and SIGTERM, kept until the step is finished."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """The signal that asked the run to stop; 0 while none has."""

    signal: int = 0


@contextmanager
def stop_requests(*, say: bool = True) -> Iterator[StopRequest]:
    """Inside of the block the first SIGINT or SIGTERM is noted and said; a second one does what it always does.

    say: on standard error, unless the caller shows it by the request.

    Outside of the main thread, where Python takes no signals, nothing is changed.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        for one, handler in before.items():
            signal.signal(one, handler)
        if say and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            with suppress(OSError):  # standard error may be closed, or its terminal gone
                os.write(2, f"\n{name}: the run stops after this step; a second one leaves at once\n".encode())

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is note:
                signal.signal(number, handler)
