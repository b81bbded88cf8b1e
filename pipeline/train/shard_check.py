"""Whether the shards still are those that their manifests describe: each is hashed once per run, in the background.

Opening a dataset compares the sizes of the shards, because hashing them all would take minutes. So a thread of low priority
on each rank hashes its share while the run trains. A shard that has been hashed is known by its stamp: its size, the time
of its last modification and the time of its last change. No program can set the last one, so images that are exchanged
under a restored modification time are hashed again. The stamps are saved with the checkpoints, and a dataset that has
moved has other stamps: its hashes decide. Shards behind a URL are read in ranges and are not hashed.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import psutil
import torch.distributed as dist

from pipeline.datasets.manifest import Manifest
from pipeline.train.distributed import World, any_rank

logger = logging.getLogger(__name__)

Stamp = list[int]  # bytes, time of modification and time of change in nanoseconds; a list, as JSON has it
_PIECE = 1 << 20  # bytes that are hashed at once
_LOWEST_PRIORITY = 19
_LOOK_SECONDS = 1.0  # between two looks at the other ranks while all wait


class _File(NamedTuple):
    path: Path
    sha256: str


class ShardCheck:
    """Hashes the local shards of some datasets once; the ranks share them. `with` ends the thread.

    Args:
        datasets: The datasets.
        world: The processes.

    Attributes:
        settled: Whether all ranks knew at the last call of `problem` that no shard has changed.
    """

    def __init__(self, datasets: Sequence[Manifest], world: World) -> None:
        self.world = world
        files = [_File(*shard) for dataset in datasets for shard in dataset.local_shards()]
        self._files = list(dict.fromkeys(files))[world.rank :: world.size]
        self._known: dict[str, Stamp] = {}
        self._problem = ""
        self.settled = False
        self._hurry, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._hash_all, name="shard-check", daemon=True)

    def begin(self, known: Mapping[str, Stamp]) -> None:
        """Start to hash the shards that are not known already. Only the first call has an effect.

        Args:
            known: Stamps of shards that this run has hashed before, by their SHA-256.
        """
        if self._thread.ident is not None:
            return
        pending = []
        for file in self._files:
            if file.sha256 in known and _stamp(file.path) == list(known[file.sha256]):
                self._known[file.sha256] = list(known[file.sha256])
            else:
                pending.append(file)
        # Shards that have another stamp than before are more likely to have changed than those never hashed.
        self._files = sorted(pending, key=lambda file: file.sha256 not in known)
        self._thread.start()

    def problem(self, *, wait: bool = False, enough: Callable[[], bool] = bool) -> str:
        """Return what is wrong with a shard, as found by any rank so far; empty if nothing is (collective).

        Args:
            wait: Whether to wait until all ranks have hashed their shares.
            enough: Ends the waiting early where it becomes true on a rank.
        """
        if self.settled:
            return ""
        if wait:
            self._wait(enough)
        working = self._thread.is_alive()  # asked first: it may find something and end in between
        if any_rank(bool(self._problem), self.world):
            return next(filter(None, self._gather(self._problem)))
        self.settled = not any_rank(working, self.world)
        return ""

    def stamps(self) -> dict[str, Stamp]:
        """Return the stamps of all shards that have been hashed so far (collective)."""
        known = {sha256: stamp for found in self._gather(dict(self._known)) for sha256, stamp in found.items()}
        return dict(sorted(known.items()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._hurry.set()
        self._thread.join()

    def _wait(self, enough: Callable[[], bool]) -> None:
        self._hurry.set()
        if any_rank(self._thread.is_alive(), self.world):
            logger.info("waiting until the shards have been hashed: no second checkpoint is written before")
        while any_rank(self._thread.is_alive(), self.world) and not any_rank(enough(), self.world):
            self._thread.join(_LOOK_SECONDS)

    def _gather(self, own: Any) -> list[Any]:
        if self.world.size == 1:
            return [own]
        found: list[Any] = [None] * self.world.size
        dist.all_gather_object(found, own)
        return found

    def _hash_all(self) -> None:
        _lower_priority()
        for file in self._files:
            try:
                stamp, sha256 = _stamp(file.path), self._hash(file.path)
            except OSError as error:
                self._problem = f"{file.path} cannot be read ({error.strerror}); restore it"
                return
            if self._end.is_set():
                return
            if sha256 != file.sha256:
                self._problem = (
                    f"{file.path} has the size but not the content that its manifest states (its SHA-256 is {sha256[:12]}, not"
                    f" {file.sha256[:12]}): it was changed after it was converted; restore it, or convert again and train anew"
                )
                return
            self._known[file.sha256] = stamp

    def _hash(self, path: Path) -> str:
        """Hash a file with pauses as long as the work, unless somebody waits."""
        digest, buffer = hashlib.sha256(), bytearray(_PIECE)
        view = memoryview(buffer)
        with path.open("rb", buffering=0) as file:
            while not self._end.is_set():
                began = time.monotonic()
                size = file.readinto(buffer)
                if not size:
                    break
                digest.update(view[:size])
                self._hurry.wait(time.monotonic() - began)
        return digest.hexdigest()


def _stamp(path: Path) -> Stamp:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _lower_priority() -> None:
    """Let training go first, on the processor and on the disk, where the system has priorities for threads (Linux)."""
    thread = threading.get_native_id()
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, _LOWEST_PRIORITY)
    with suppress(OSError, AttributeError, ValueError, psutil.Error):
        psutil.Process(thread).ionice(psutil.IOPRIO_CLASS_IDLE)
