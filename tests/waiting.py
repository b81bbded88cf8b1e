"""Waiting in tests: deadlines follow the speed of the machine, and a wait that fails says what it waited for."""

import functools
import subprocess
import sys
import time
from collections.abc import Callable

# Seconds that a process with torch took to start where the deadlines were written (an otherwise idle machine).
REFERENCE_START = 2.0
# A machine may become slower after the measurement, when other work begins beside the tests.
RESERVE = 3.0


@functools.cache
def slowness() -> float:
    """How many times longer than the reference this machine takes to start a process with torch; at least 1.

    Measured once in each test process, before it starts another one (`tests.warm`).
    """
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return max(1.0, (time.monotonic() - began) / REFERENCE_START)


def patience(seconds: float) -> float:
    """The deadline on this machine for what takes `seconds` on the reference machine."""
    return RESERVE * slowness() * seconds


def wait_until(
    condition: Callable[[], bool],
    what: str,
    seconds: float,
    *,
    every: float = 0.02,
    context: Callable[[], str] = lambda: "",
) -> None:
    """Return as soon as `condition()` holds.

    Args:
        condition: Asked again and again, `every` so many seconds.
        what: What is waited for, as the failure names it.
        seconds: How long it may take on the reference machine.
        every: Seconds between two questions.
        context: What to print beside the failure, asked only then.

    Raises:
        AssertionError: The deadline has passed.
    """
    limit = patience(seconds)
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(
                f"waited {limit:.0f} s for {what} ({seconds:g} s on the reference machine, which is {slowness():.1f} times"
                f" as fast as this one)\n{context()}"
            )
        time.sleep(every)
