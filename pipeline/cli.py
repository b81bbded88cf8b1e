"""From errors to exit codes, in one place, and the console script `vmp`.

Every command of the project is a function `main(arguments) -> int` that calls `guarded`. The codes themselves are
documented in `pipeline/errors.py`.
"""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from pipeline.errors import EnvironmentProblem, Interrupted, PipelineError

# What any write can meet at any moment: the disk is full, over quota, read-only, broken, or its server is gone.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
KILLED_BY_CTRL_C = 130

# name -> (module, help). Each module has `main(arguments) -> int`; it is imported only when its command is called.
COMMANDS = {
    "stage": ("stages.__main__", "run one stage in this process: vmp stage arm CONFIG [key=value ...]"),
    "data": ("pipeline.data", "make, split, check and show datasets"),
    "models": ("pipeline.models.__main__", "convert released weights; write ONNX and Core ML files"),
    "predict": ("pipeline.predict", "name what an exported classifier sees in image files"),
    "evaluate": ("pipeline.evaluate.__main__", "judge an export on a dataset"),
}


def guarded(
    command: Callable[[list[str]], int],
    arguments: Sequence[str],
    *,
    explain: Callable[[Exception], PipelineError | None] = lambda error: None,
    quiet: bool = False,
) -> int:
    """Run `command` and turn whatever ends it into an exit code and one sentence on stderr.

    Args:
        command: Takes the arguments and returns an exit code, or raises.
        arguments: Words of the command line, without the program's name.
        explain: Turns an exception that is not ours into one of `pipeline.errors`, or returns None for a bug.
        quiet: Print no sentence for an interruption (all ranks of a run would say the same).

    Returns:
        The command's own code; the `exit_code` of a `PipelineError`; 5 for a disk that fails; 130 for Ctrl-C; 1, with a
        stack trace, for a bug.
    """
    try:
        return command(list(arguments))
    except KeyboardInterrupt:
        print("stopped; start the same command again to continue", file=sys.stderr, flush=True)
        return KILLED_BY_CTRL_C
    except Exception as error:
        known = error if isinstance(error, PipelineError) else explain(error) or _disk_problem(error)
        if known is None:
            traceback.print_exc()
            return 1
        if not (quiet and isinstance(known, Interrupted)):
            print(f"{'' if isinstance(known, Interrupted) else 'error: '}{known}", file=sys.stderr, flush=True)
        return known.exit_code


def _disk_problem(error: Exception) -> PipelineError | None:
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
        return None
    return EnvironmentProblem(
        f"{error.filename or 'a file'}: {os.strerror(error.errno)}; make room or repair the disk, then start the same"
        " command again: what was complete is kept"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script: `vmp COMMAND ...` calls the `main` of that command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print("usage: vmp COMMAND ...\n\ncommands (vmp COMMAND --help says more):")
        for name, (_, what) in COMMANDS.items():
            print(f"  {name:<12} {what}")
        return 0 if words else 2
    if words[0] not in COMMANDS:
        from pipeline.config import nearest

        print(
            f"error: vmp has no command {words[0]!r}; it has {', '.join(nearest(words[0], list(COMMANDS)))}",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
