"""A run that is asked to stop: the step is finished first, then the state is kept."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal; the message says what is kept.

    >>> Stopped("", signal.SIGTERM).status
    143
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status by which a shell knows the signal."""
        return 128 + self.signum


class Asked:
    """Whether a signal asked to stop: `signum` is None, or which one."""

    signum: int | None = None


@contextlib.contextmanager
def asked_to_stop() -> Iterator[Asked]:
    """Inside, the first SIGINT or SIGTERM is only noted; the second stops at once.

    In a thread that is not the main one, signals are left as they are.

    Raises:
        KeyboardInterrupt: by the second signal.

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
        # print may be in the middle of another line, and must not be entered twice
        os.write(2, b"\nstopping after this step; the same again stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    # a shell makes its background jobs ignore Ctrl-C, and None is a handler that is not Python's
    heard = [s for s, handler in before.items() if handler not in (signal.SIG_IGN, None)]
    for signum in heard:
        signal.signal(signum, note)
    try:
        yield asked
    finally:
        for signum in heard:
            signal.signal(signum, before[signum])
