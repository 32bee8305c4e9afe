"""Signals that ask a run to stop: the run first finishes its step and keeps its state."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(KeyboardInterrupt):
    """A signal stopped the run; the message says which state is kept.

    >>> Stopped("", signal.SIGTERM).status
    143
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status that tells a shell the signal: 128 and the signal's number."""
        return 128 + self.signum


class Asked:
    """The signal that asked the run to stop: `signum` is its number, or None without one."""

    signum: int | None = None


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Inside this context the first SIGINT or SIGTERM is only noted; the second stops at once.

    In a thread other than the main one, it does nothing.

    Raises:
        KeyboardInterrupt: at the second signal.

    >>> with asked_to_stop() as asked:
    ...     signal.raise_signal(signal.SIGTERM)
    >>> asked.signum == signal.SIGTERM
    True
    """
    asked = Asked()

    def note(signum: int, frame: Any) -> None:
        again, asked.signum = asked.signum is not None, signum
        if again:
            raise KeyboardInterrupt
        # not print: the signal may have interrupted a print, which must not be entered twice
        os.write(2, b"\nstopping after this step; the same again stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    # ignored signals stay ignored, as a shell makes its background jobs ignore Ctrl-C; a handler
    # of None was not set by Python, so Python could not restore it
    heard = [s for s, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for signum in heard:
        signal.signal(signum, note)
    try:
        yield asked
    finally:
        for signum in heard:
            signal.signal(signum, before[signum])
