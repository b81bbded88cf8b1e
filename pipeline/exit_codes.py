"""The exit codes of every command, and the order in which the codes of several ranks are blamed.

The codes are a contract with schedulers: SLURM's `afterok` must never fire for an interrupted stage. They are stated
here, in docs/exit-codes.md, and nowhere else.

When a run of several ranks ends, the ranks often leave different codes. One of them is the code of the run: the one that
says most about the cause. `blame` finds it, for processes on one machine (`launchers/local.py`) and for a job of SLURM
(`launchers/job.py`) alike:

1. A stated reason (config, data, hand-over, environment, divergence), or any code that we do not know: it names its cause.
2. A bug: it left a stack trace. A bug must not be hidden by what follows from it, or it would be requeued for ever.
3. A second Ctrl-C, and then an interruption: the ranks saved together before a peer was missed, so a restart helps.
4. A rank killed by a signal, for example for want of memory: it says nothing, and its peers fail because of it.
5. The loss of another rank, which is always a consequence.
"""

from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a process ends with."""

    COMPLETE = 0
    BUG = 1
    CONFIG = 2
    DATA = 3
    HANDOVER = 4
    ENVIRONMENT = 5
    DIVERGED = 6
    DISTRIBUTED = 7
    INTERRUPTED = 75
    STOPPED = 130


_AFTER_THE_REASONS = (ExitCode.BUG, ExitCode.STOPPED, ExitCode.INTERRUPTED, "killed", ExitCode.DISTRIBUTED)


def blame(codes: Iterable[int]) -> int:
    """Choose the code of a run from the codes of its ranks.

    Args:
        codes: One code for each rank, in the order of the ranks; -N for a process that signal N killed. Zeros are ignored.

    Returns:
        The code that says most about the cause, by the order above; of several reasons the first rank's; 0 if all are 0.
    """
    return min((code for code in codes if code), key=_order, default=ExitCode.COMPLETE)


def _order(code: int) -> int:
    kind = "killed" if code < 0 else code
    return 1 + _AFTER_THE_REASONS.index(kind) if kind in _AFTER_THE_REASONS else 0
