"""A cache on disk for a frozen teacher's predictions, so that a second run does not compute them again."""

import hashlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import EnvironmentProblem, HandoverError

logger = logging.getLogger(__name__)

PAGE_BYTES = 16384  # page of the database; it holds the logits of four images at 1000 classes
MEMORY_MIB = 32  # memory that pages of the database may take
LOCK_SECONDS = 60  # the longest wait for another process that writes


class PredictionCache:
    """A teacher that looks its logits up by the pixels of an image before it computes them.

    A view is a function of (sample, view seed), and a mix of (seed, data step). So equal pixels are the same view, mixed
    or not, whichever run drew it.

    The file is an SQLite database that all ranks and all runs with this teacher read and write. The predictions of a
    batch are one transaction: a kill leaves all of them or none. The file system must support locks (a local disk,
    NFS 4). Memory is bounded by MEMORY_MIB. A database that is full or fails ends no training: the teacher then computes.

    Args:
        teacher: Maps images (B, 3, H, W) to logits (B, K).
        path: The database file.
        gigabytes: Largest size of the file, in 1e9 bytes.

    Raises:
        EnvironmentProblem: If the file cannot be opened.
        HandoverError: If the file is no prediction cache.
    """

    def __init__(self, teacher: Callable[[Tensor], Tensor], path: Path, *, gigabytes: float) -> None:
        self.teacher = teacher
        self.num_computed = 0  # images that the teacher itself has seen
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level="IMMEDIATE")
            self._database.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            self._database.execute(f"PRAGMA cache_size = {-1024 * MEMORY_MIB}")
            self._database.execute(f"PRAGMA max_page_count = {max(1, int(gigabytes * 1e9 / PAGE_BYTES))}")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS predictions (pixels BLOB PRIMARY KEY, logits BLOB NOT NULL)"
            )
        except (OSError, sqlite3.OperationalError) as error:
            raise EnvironmentProblem(
                f"teacher.cache: {path} cannot be opened ({error}); give a writable folder of a file system with locks"
            ) from None
        except sqlite3.DatabaseError as error:
            raise HandoverError(
                f"teacher.cache: {path} is no prediction cache, or is damaged ({error}); delete it"
            ) from None
        self._readable = self._writable = True

    def __call__(self, images: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the teacher's logits (B, K), fp32, on the device of the images."""
        keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images.float().cpu()]
        logits = self._find(keys)
        new = [i for i, key in enumerate(keys) if key not in logits]
        if new:
            computed = self.teacher(images[new]).float().cpu().numpy()
            self.num_computed += len(new)
            fresh = {keys[i]: row.tobytes() for i, row in zip(new, computed, strict=True)}
            self._store(fresh)
            logits |= fresh
        rows = np.stack([np.frombuffer(logits[key], np.float32) for key in keys])
        return torch.from_numpy(rows).to(images.device)

    def _find(self, keys: list[bytes]) -> dict[bytes, bytes]:
        marks = ",".join("?" * len(keys))
        try:
            if self._readable:
                return dict(self._database.execute(f"SELECT * FROM predictions WHERE pixels IN ({marks})", keys))
        except sqlite3.Error as error:
            self._readable = self._writable = False
            logger.warning("teacher.cache cannot be read (%s); the teacher computes all predictions from now on", error)
        return {}

    def _store(self, logits: dict[bytes, bytes]) -> None:
        try:
            if self._writable:
                with self._database:
                    self._database.executemany("INSERT OR IGNORE INTO predictions VALUES (?, ?)", logits.items())
        except sqlite3.Error as error:
            self._writable = False
            logger.warning("teacher.cache stores no more predictions (%s); raise teacher.cache_gb", error)
