"""Small commands that the fuzzers need beside the product's: `load EXPORT`, and `meet`, which joins a process group."""

import os
from datetime import timedelta
from pathlib import Path

from pipeline.cli import guarded
from pipeline.errors import DistributedFailure, PipelineError


def main(arguments: list[str]) -> int:
    """Run one of them and return its exit code."""
    return guarded(_run, arguments, explain=_lost)


def _run(arguments: list[str]) -> int:
    if arguments[0] == "load":
        from pipeline.exports.export import load_classifier

        load_classifier(Path(arguments[1]))
    else:
        from pipeline.train.rendezvous import keep_to_the_ranks, open_store, rendezvous

        found = rendezvous(os.environ)
        keep_to_the_ranks(found, public_address=False)
        open_store(found, timedelta(seconds=1))
    return 0


def _lost(error: Exception) -> PipelineError | None:
    from pipeline.train.distributed import is_communication_failure

    if not is_communication_failure(error):
        return None
    return DistributedFailure(f"another rank is away: {str(error).splitlines()[0]}")
