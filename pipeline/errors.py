"""Errors that a person can cause, and the exit codes of the process.

The text of an error is one sentence: what was given, what is allowed, what to do. The exit codes are a contract with
schedulers: for example, SLURM's `afterok` must never fire after an interrupted stage. They are defined only here.
"""


class PipelineError(Exception):
    """Base class. It ends the process with `exit_code` and its sentence, without a stack trace."""

    exit_code = 1


class ConfigError(PipelineError):
    """A wrong value that a person typed: an unknown key, a wrong type, an impossible combination."""

    exit_code = 2


class DataError(PipelineError):
    """A missing, damaged or unsuitable shard, manifest, split or image."""

    exit_code = 3


class HandoverError(PipelineError):
    """A missing, damaged or unsuitable export or checkpoint."""

    exit_code = 4


class EnvironmentProblem(PipelineError):
    """A missing package, a read-only folder, a contradiction in the launch environment."""

    exit_code = 5


class Diverged(PipelineError):
    """Training diverged: a loss, a gradient or a weight is NaN or infinite."""

    exit_code = 6


class DistributedFailure(PipelineError):
    """A rank died or stopped responding."""

    exit_code = 7


class Interrupted(PipelineError):
    """The run was stopped by a signal or a time limit and has saved its state; start it again to continue."""

    exit_code = 75
