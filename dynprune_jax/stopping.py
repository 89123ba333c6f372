"""A polite end: on SIGTERM or Ctrl-C the loop ends its step and saves first."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):  # as KeyboardInterrupt: nobody may take it for an error
    """A signal has ended the run; the message says where it stands.

    Args:
      number: of the signal.
      message: one line.
    """

    def __init__(self, number: int, message: str = "stopped; start it again with the same command"):
        super().__init__(message)
        self.exit_code = 128 + number  # as shells and Slurm count: 143 for SIGTERM, 130 for SIGINT


def stop(number: int, frame: FrameType | None) -> None:
    """A signal's handler: ends what is under way. Schedulers may send it twice; once is enough."""
    signal.signal(number, signal.SIG_IGN)
    raise Stopped(number)


def send_again(lost: Any) -> None:
    """For `sys.unraisablehook`: sends a signal again whose exception came to nothing.

    A handler that raises can find the main thread in a callback of the garbage collector, and JAX
    has one. What is raised there, Python drops.
    """
    if isinstance(lost.exc_value, Stopped):
        number = lost.exc_value.exit_code - 128
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, stop)
    elif isinstance(lost.exc_value, KeyboardInterrupt):
        number = signal.SIGINT
    else:
        return
    # When the callback has ended, and to the main thread: another would note it and wake nobody.
    main = threading.main_thread().ident
    threading.Timer(0.05, signal.pthread_kill, (main, number)).start()


class StopSignals:
    """While it is entered, SIGTERM and SIGINT are noted, not obeyed; a second Ctrl-C is obeyed.

    Signals that are ignored, as SIGINT is in a shell's background jobs, stay so. Outside of the
    main thread, where Python cannot handle signals, nothing is changed.

    Attributes:
      received: the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._now = False
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note)
                for number in SIGNALS
                if signal.getsignal(number) not in (signal.SIG_IGN, None)  # None: not Python's
            }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def obeyed(self) -> Iterator[None]:
        """Inside, a signal raises Stopped at once: for what takes long and can be done again."""
        self._now = True
        try:
            if self.received is not None:
                raise Stopped(self.received)
            yield
        finally:
            self._now = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Schedulers may send SIGTERM twice; who presses Ctrl-C twice will not wait for a save.
        again = self.received is not None and number == signal.SIGINT
        self.received = number
        if again or self._now:
            raise Stopped(number)
