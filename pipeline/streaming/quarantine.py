"""Samples that could not be decoded: they are counted and named, and too many of them end the run."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from pipeline.datasets.manifest import Manifest
from pipeline.errors import DataError

logger = logging.getLogger(__name__)


class Quarantine:
    """The distinct unreadable samples that one rank has met.

    Args:
        manifest: Their dataset.
        path: File to append them to, one JSON object a line; None = only log them.
        allowed: How many samples may be unreadable before the run ends.
    """

    def __init__(self, manifest: Manifest, path: Path | None, allowed: int) -> None:
        self.manifest, self.path, self.allowed = manifest, path, allowed
        self.sample_indices: set[int] = set()

    def add(self, found: Iterable[tuple[int, str]]) -> None:
        """Record sample indices with their reasons.

        Raises:
            DataError: More samples than `allowed` have been met.
        """
        for sample_index, reason in found:
            if sample_index in self.sample_indices:
                continue
            self.sample_indices.add(sample_index)
            key = self.manifest.key(sample_index)
            folder = self.manifest.folder_of(sample_index)
            logger.warning("%s: sample %r cannot be decoded: %s", folder, key, reason)
            if self.path:
                shard = self.manifest.shards[int(self.manifest.shard_of(sample_index))].name
                line = {
                    "sample_index": sample_index,
                    "key": key,
                    "dataset": str(folder),
                    "shard": shard,
                    "reason": reason,
                }
                with self.path.open("a") as file:  # one short line: ranks may append to the same file
                    file.write(json.dumps(line) + "\n")
        if len(self.sample_indices) > self.allowed:
            named = f"; {self.path} names them" if self.path else ""
            raise DataError(
                f"{len(self.sample_indices)} samples of {self.manifest} cannot be decoded, {self.allowed} are "
                f"allowed per process, the last: {reason}{named}; repair the shards or raise data.loader.max_unreadable"
            )
