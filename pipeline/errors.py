"""The errors that a person or a machine can cause, each with the exit code that it ends in.

The text of an error is one sentence: what happened, what was expected or is allowed, what to type.
"""

from typing import ClassVar

from pipeline.exit_codes import ExitCode


def first_line(error: BaseException, most: int = 200) -> str:
    """Return the first line of what an error says, or the name of its class if it says nothing.

    Errors of libraries may have no text, or a text of many lines. A sentence for a person takes this part of it.

    Args:
        error: Any error, of a library too.
        most: Characters that are kept.
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:most]


class PipelineError(Exception):
    """Base of all: a command ends with `exit_code` and the sentence, without a stack trace."""

    exit_code: ClassVar[ExitCode] = ExitCode.BUG


class ConfigError(PipelineError):
    """A value that a person typed is wrong: an unknown key, a wrong type, an impossible combination."""

    exit_code = ExitCode.CONFIG


class DataError(PipelineError):
    """Shards, a manifest, a split or an image are missing or damaged."""

    exit_code = ExitCode.DATA


class HandoverError(PipelineError):
    """An export or checkpoint is missing, damaged or does not fit."""

    exit_code = ExitCode.HANDOVER


class EnvironmentProblem(PipelineError):
    """The machine lacks something: a package, space, a writable folder, a consistent launch environment."""

    exit_code = ExitCode.ENVIRONMENT


class Diverged(PipelineError):
    """Training reached numbers that are not finite, or that leap."""

    exit_code = ExitCode.DIVERGED


class DistributedFailure(PipelineError):
    """Another rank died or hangs."""

    exit_code = ExitCode.DISTRIBUTED


class Interrupted(BaseException):
    """A signal or a time limit stopped the command, and what it needs is saved: start it again to continue.

    As KeyboardInterrupt it is no Exception. Code that goes on without something that failed must not go on after a signal.
    """

    exit_code: ClassVar[ExitCode] = ExitCode.INTERRUPTED
