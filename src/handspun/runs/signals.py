"""Ctrl-C, SIGTERM, and the end of the terminal (SIGHUP) stop a run after the current step."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class StopRequest:
    """The signal that asked the run to stop; 0 if none has."""

    signal: int = 0


@contextmanager
def stop_requests(*, say: bool = True) -> Iterator[StopRequest]:
    """Catch the first SIGINT, SIGTERM, or SIGHUP and announce it; a second one acts as usual.

    SIGHUP is left alone if it is ignored (nohup), and ignored after the first signal: shell and system both send
    one when a terminal goes away. Outside of the main thread, where Python takes no signals, nothing changes.

    say: announce on standard error, unless the caller shows the request.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    before = {number: handler for number, handler in handlers.items() if not _is_left_alone(number, handler)}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = number
        for one, handler in before.items():
            signal.signal(one, signal.SIG_IGN if _is_hangup(one) else handler)
        if say and os.environ.get("RANK", "0") == "0":
            name = signal.Signals(number).name
            with suppress(OSError):  # standard error may be closed, or its terminal gone
                os.write(2, f"\n{name}: the run stops after this step; a second one leaves at once\n".encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            is_hangup = _is_hangup(number) and not _is_hangup(request.signal)  # of those, another one is to come
            if is_hangup or signal.getsignal(number) is note:
                signal.signal(number, handler)


def _is_hangup(number: int) -> bool:
    return number == getattr(signal, "SIGHUP", None)


def _is_left_alone(number: int, handler: object) -> bool:
    return _is_hangup(number) and handler == signal.SIG_IGN
