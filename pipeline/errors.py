"""The errors that a person or a machine can cause, each with the exit code that it ends in.

The text of an error is one sentence: what happened, what was expected or is allowed, what to type.
"""

from typing import ClassVar

from pipeline.exit_codes import ExitCode


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


class Interrupted(PipelineError):
    """A signal or a time limit stopped the run, and everything is saved: start it again to continue."""

    exit_code = ExitCode.INTERRUPTED
