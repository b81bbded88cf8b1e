"""The one wrapper from errors to exit codes, and the console script `vmp`.

Every command of the project is a function `main(arguments) -> int` that calls `guarded`. The codes are listed in
`pipeline/exit_codes.py`.
"""

import errno
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from pipeline.errors import EnvironmentProblem, Interrupted, PipelineError
from pipeline.exit_codes import ExitCode

# What any write can meet at any moment: the disk is full, over quota, read-only or broken, its server is gone, or files may
# not be so large.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG)
# A file or folder of somebody else, and a path that leads nowhere.
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)


class Command(NamedTuple):
    """A command of `vmp`: it calls `main([*words, *arguments])` of a module, which is imported only then."""

    module: str
    words: tuple[str, ...]
    help: str


COMMANDS = {
    "configs": Command("pipeline.configs", (), "list the config files that came with the package, or copy them"),
    "data": Command("pipeline.data", (), "make, split, check and show datasets"),
    "models": Command("pipeline.models.__main__", (), "convert released weights; write ONNX and Core ML files"),
    "plan": Command("launchers.__main__", ("plan",), "predict time, memory and disk of a stage or a chain"),
    "doctor": Command("launchers.__main__", ("doctor",), "check whether this machine or cluster can run it"),
    "stage": Command("stages.__main__", (), "run one stage in this process: vmp stage arm CONFIG [key=value ...]"),
    "local": Command("launchers.__main__", ("local",), "run one stage in several processes on this machine"),
    "recipe": Command("launchers.__main__", ("recipe",), "look at images and write the configs of a chain for them"),
    "chain": Command("launchers.__main__", ("local", "chain"), "run all stages on this machine: vmp chain NAME"),
    "submit": Command("launchers.__main__", ("slurm",), "submit a stage or a chain to SLURM"),
    "status": Command("launchers.__main__", ("status",), "show how far every run is"),
    "demo": Command("launchers.__main__", ("demo",), "run the chain on bundled digits and write a report"),
    "report": Command("launchers.__main__", ("report",), "write one page about finished runs"),
    "predict": Command("pipeline.predict", (), "name what an exported classifier sees in image files"),
    "evaluate": Command("pipeline.evaluate.__main__", (), "evaluate an export on a dataset"),
    "rebalance": Command("pipeline.rebalance", (), "balance the head of an exported classifier for a long tail"),
    "efficiency": Command("launchers.__main__", ("efficiency",), "time real steps of stage 3 side by side"),
    "inference": Command("launchers.__main__", ("inference",), "measure throughput against resolution"),
    "pareto": Command("launchers.__main__", ("pareto",), "plot speed measured here against reported accuracy"),
    "fields": Command("launchers.__main__", ("fields",), "draw effective receptive fields"),
}


def guarded(
    command: Callable[[list[str]], int],
    arguments: Sequence[str],
    *,
    explain: Callable[[Exception], PipelineError | None] = lambda error: None,
    rank: str = "0",
) -> int:
    """Run `command` and turn whatever ends it into an exit code and one sentence on stderr.

    Args:
        command: Takes the arguments and returns an exit code, or raises.
        arguments: Words of the command line, without the program's name.
        explain: Turns an exception that is not ours into one of `pipeline.errors`, or returns None for a bug.
        rank: The rank of this process. Ranks other than 0 do not repeat the sentence about an interruption.

    Returns:
        The command's own code; 0 if the reader of the output has closed it; the `exit_code` of a `PipelineError`; 5 for a
        disk that fails or a file without access; 130 for Ctrl-C; 1, with a stack trace, for a bug.
    """
    previous, threading.excepthook = threading.excepthook, _thread_problem
    try:
        return command(list(arguments))
    except KeyboardInterrupt:
        print("stopped at once; start the same command again to continue", file=sys.stderr, flush=True)
        return ExitCode.STOPPED
    except BrokenPipeError:
        # The reader of our output has read enough, as `head` does. Python would complain at exit when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.COMPLETE
    except Interrupted as stopped:
        if rank == "0":
            print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_code
    except Exception as error:
        known = error if isinstance(error, PipelineError) else explain(error) or _disk_problem(error)
        if known is None:
            traceback.print_exc()
            return ExitCode.BUG
        print(f"error: {known}", file=sys.stderr, flush=True)
        return known.exit_code
    finally:
        threading.excepthook = previous


def leave(code: int) -> NoReturn:
    """End this process at once, with its output flushed.

    A rank that failed must not wait for the others in the exit handlers of a process group that they still use.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_disk_error(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def _disk_problem(error: Exception) -> PipelineError | None:
    if isinstance(error, OSError) and error.errno in NO_ACCESS and error.filename:
        return EnvironmentProblem(
            f"{str(error.filename)[:200]}: {os.strerror(error.errno)}; give another file or folder, or ask its owner for access"
        )
    if not (isinstance(error, OSError) and _is_disk_error(error)):
        return None
    return EnvironmentProblem(
        f"{error.filename or 'a file'}: {os.strerror(error.errno or 0)}; free some space or repair the disk, then start the"
        " same command again: what was complete is kept"
    )


def _thread_problem(problem: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own. The main thread meets its error at the next event, and says enough."""
    foreign = type(problem.thread).__module__.startswith("tensorboard") and isinstance(problem.exc_value, OSError)
    if not foreign and not _is_disk_error(problem.exc_value):
        threading.__excepthook__(problem)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the console script: `vmp COMMAND ...` calls the `main` of that command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print("usage: vmp COMMAND ...\n\ncommands (vmp COMMAND --help says more):")
        for name, command in COMMANDS.items():
            print(f"  {name:<12} {command.help}")
        return ExitCode.COMPLETE if words else ExitCode.CONFIG
    return guarded(_dispatch, words)


def _dispatch(words: list[str]) -> int:
    from pipeline.config import choose

    command = choose("command of vmp", words[0], COMMANDS)
    code: int = importlib.import_module(command.module).main([*command.words, *words[1:]])
    if words[0] == "stage":
        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
