"""Samples that could not be decoded, or not plainly: they are counted and named, and too many damaged ones end the run."""

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from pipeline.datasets.manifest import Manifest
from pipeline.errors import DataError
from pipeline.images import NOTES, Notes, TooLarge, UnreadableImage

logger = logging.getLogger(__name__)


class Quarantine:
    """The distinct unreadable samples that one rank has met.

    Args:
        manifest: Their dataset.
        path: File to append them to, one JSON object a line; None = only log them.
        allowed: How many samples may be unreadable before the run ends. Too large ones are named, but do not count: they
            are not damaged.
    """

    def __init__(self, manifest: Manifest, path: Path | None, allowed: int) -> None:
        self.manifest, self.path, self.allowed = manifest, path, allowed
        self.sample_indices: set[int] = set()
        self._damaged: list[str] = []  # reasons

    def add(self, found: Iterable[tuple[int, UnreadableImage]]) -> None:
        """Record sample indices with their reasons.

        Raises:
            DataError: More samples than `allowed` have been met.
        """
        for sample_index, error in found:
            if sample_index in self.sample_indices:
                continue
            self.sample_indices.add(sample_index)
            key, reason = self.manifest.key(sample_index), str(error)
            folder = self.manifest.folder_of(sample_index)
            if not isinstance(error, TooLarge):
                self._damaged.append(reason)
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
        if len(self._damaged) > self.allowed:
            named = f"; {self.path} names them" if self.path else ""
            raise DataError(
                f"{len(self._damaged)} samples of {self.manifest} cannot be decoded, {self.allowed} are allowed per"
                f" process, the last: {self._damaged[-1]}{named}; repair the shards or raise data.loader.max_unreadable"
            )


class NoteLog:
    """Counts what images needed to be decoded, and logs each kind the first time and whenever its count grew tenfold.

    An image counts each time it is read.

    Args:
        name: What the log calls the dataset.
    """

    def __init__(self, name: str) -> None:
        self.name, self.counts = name, Notes()

    def add(self, notes: Notes) -> None:
        """Count the notes of a batch."""
        for kind, number in notes.items():
            before = self.counts[kind]
            self.counts[kind] += number
            if not before or len(str(before)) < len(str(self.counts[kind])):
                number = self.counts[kind]
                plural = "s" if number > 1 else ""
                logger.info("%s: this process has read %d image%s %s", self.name, number, plural, NOTES[kind])
