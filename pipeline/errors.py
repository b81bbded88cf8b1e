"""What a person can cause, and the exit code it ends in.

Each error's text is one sentence: what was given, what is allowed, what to do. The codes are a contract with
schedulers (SLURM's `afterok` must never fire on an interrupted stage), so they are stated here and nowhere else.
"""


class PipelineError(Exception):
    """Base: ends the process with `exit_code` and its sentence, never with a stack trace."""

    exit_code = 1


class ConfigError(PipelineError):
    """A value a person typed: unknown key, wrong type, impossible combination."""

    exit_code = 2


class DataError(PipelineError):
    """Shards, manifest, split or image."""

    exit_code = 3


class HandoverError(PipelineError):
    """An export or checkpoint that is missing, damaged or does not fit."""

    exit_code = 4


class EnvironmentProblem(PipelineError):
    """A missing package, a read-only folder, a contradiction in the launch environment."""

    exit_code = 5


class Diverged(PipelineError):
    """Training left the finite numbers."""

    exit_code = 6


class DistributedFailure(PipelineError):
    """A rank died or hung."""

    exit_code = 7


class Interrupted(PipelineError):
    """Stopped by a signal or a time limit with everything saved: start again to continue."""

    exit_code = 75
