"""Small commands that the fuzzers need beside the product's.

`load EXPORT` loads an export, `meet` joins a process group, and `index ADDRESS` reads tars there with few attempts.
`split DATA FILE SOUND` reads a damaged split: if it is accepted, it must mean what the sound one means.
`resume WEIGHTS ...` continues a stage: if it completes, its export must have these weights, unless WEIGHTS is empty.
"""

import os
from datetime import timedelta
from pathlib import Path

from pipeline.cli import guarded
from pipeline.errors import DistributedFailure, PipelineError, first_line


def main(arguments: list[str]) -> int:
    """Run one of them and return its exit code."""
    if arguments[0] == "resume":
        return _resume(arguments[1], arguments[2:])
    return guarded(_run, arguments, explain=_lost)


def _resume(sound: str, arguments: list[str]) -> int:
    from stages.__main__ import main as stage

    code = stage(arguments)
    if code == 0 and sound:
        found = Path("runs/smoke") / arguments[0] / "export/model.safetensors"
        assert found.read_bytes() == Path(sound).read_bytes(), (
            "the run ended with other weights than the undisturbed one"
        )
    return code


def _run(arguments: list[str]) -> int:
    if arguments[0] == "load":
        from pipeline.exports.export import load_classifier

        load_classifier(Path(arguments[1]))
    elif arguments[0] == "split":
        from pipeline.datasets.manifest import read_manifest
        from pipeline.datasets.splits import read_split

        manifest = read_manifest(Path(arguments[1]))
        found, sound = (read_split(Path(name), manifest) for name in arguments[2:])
        sealed = b'"sha256"' in Path(arguments[2]).read_bytes()  # a split of another tool has no seal
        assert found.hash == sound.hash or not sealed, "a damaged split was accepted"
    elif arguments[0] == "index":
        from pipeline.datasets.index import index_remote
        from pipeline.datasets.tars import MemberRules
        from pipeline.storage.config import RemoteConfig

        impatient = RemoteConfig(attempts=2, timeout_seconds=1.0, backoff_seconds=0.01)
        index_remote(arguments[1], Path("out"), None, impatient, 1, MemberRules())
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
    return DistributedFailure(f"another rank is away: {first_line(error)}")
