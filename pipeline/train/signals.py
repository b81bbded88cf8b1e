"""Signals set a flag, which the loop reads at a step boundary, where all ranks can act together (torch-free)."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import Interrupted

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopFlag:
    """The name of the signal that asked to stop, or empty."""

    name = ""

    def __bool__(self) -> bool:
        return bool(self.name)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Let signals only set the flag while inside; a second SIGINT interrupts at once.

    If an exception leaves the block and `interrupt_on_signals` was in effect, the process is about to end with that
    exception's sentence. One more signal must not replace it, so it is only noted; a second SIGINT ends the process at once.
    """
    flag = StopFlag()

    def note(number: int, frame: FrameType | None) -> None:
        if flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.name = signal.Signals(number).name

    previous = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield flag
    except BaseException:
        flag.name = ""
        previous = {number: handler for number, handler in previous.items() if handler is not _interrupt}
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interrupt_on_signals() -> None:
    """Let a signal end the process at once, before and after the loop, where a restart loses nothing."""
    for number in STOPPING:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name} outside the training loop; start it again to continue")
