"""The bytes of a sample: from a local shard or image file, or from a remote shard in ranges that a cache keeps."""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, DataError
from pipeline.storage.cache import Cache
from pipeline.storage.config import RemoteConfig
from pipeline.storage.remote import fetch

K = TypeVar("K", Path, int)

MAX_OPEN_FILES = 64  # far under the usual limit of 1024 descriptors, with many workers on a node
FETCH_THREADS = 4  # per process; fetching a range of 2 MB is mostly waiting


class Reader:
    """Reads single samples of one dataset by offset; each process has its own.

    Args:
        manifest: The dataset.
        sample_indices: (N,) sorted sample indices of all samples that will ever be read; for remote shards only.
        runs: First index into `sample_indices` of each range that one request fetches, and N at the end.
        remote: How remote shards are fetched.

    Raises:
        ConfigError: The shards are remote and `remote.cache` is empty.
    """

    def __init__(
        self, manifest: Manifest, sample_indices: NDArray[np.int64], runs: NDArray[np.int64], remote: RemoteConfig
    ) -> None:
        self.manifest, self._remote = manifest, remote
        # A local file, or the number of a run -> descriptor, least recently used first
        self._open: OrderedDict[Path | int, int] = OrderedDict()
        self._sample_indices, self._runs = sample_indices, runs
        self._cache: Cache | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._asked: set[int] = set()
        if manifest.remote:
            if not remote.cache:
                raise ConfigError(
                    f"{manifest} has its shards at {manifest.location}, but data.loader.remote.cache is empty; "
                    "set it to a folder on a local disk"
                )
            self._cache = Cache(Path(remote.cache), int(remote.cache_gb * 1e9))

    def read(self, sample_index: int) -> bytes:
        """Return the image's bytes as stored.

        Raises:
            DataError: The shard no longer holds them or cannot be reached.
        """
        sample = self.manifest.rows(sample_index)
        length = int(sample["length"])
        if not self.manifest.url_of(int(self.manifest.shard_of(sample_index))):
            path, start = self.manifest.place_of(sample_index)
            descriptor = self._descriptor(path, _open_file)
        else:
            run = self._run_of(sample_index)
            descriptor, start = self._descriptor(run, self._open_run), int(sample["offset"]) - self._extent(run)[1]
        data = os.pread(descriptor, length, start)
        if len(data) != length:
            folder = self.manifest.folder_of(sample_index)
            raise DataError(
                f"{folder}: sample {self.manifest.key(sample_index)!r} is cut off; "
                f"`python -m pipeline.data verify {folder}` finds all damage"
            )
        self.manifest.check_bytes(sample_index, data)
        return data

    def prefetch(self, sample_indices: NDArray[np.int64]) -> None:
        """Start to fetch these samples in the background; an error shows when one is read."""
        if self._cache is None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(FETCH_THREADS)
        for run in {self._run_of(int(sample_index)) for sample_index in sample_indices} - self._asked:
            self._asked.add(run)
            if self.manifest.url_of(self._extent(run)[0]):
                self._pool.submit(self._fetch_ahead, run)
        if len(self._asked) > 4096:
            self._asked.clear()  # the first of them may have left the cache

    def close(self) -> None:
        """Close all files and end the threads."""
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        while self._open:
            os.close(self._open.popitem()[1])

    def _run_of(self, sample_index: int) -> int:
        index = int(np.searchsorted(self._sample_indices, sample_index))
        return int(np.searchsorted(self._runs, index, side="right")) - 1

    def _extent(self, run: int) -> tuple[int, int, int]:
        """Return the shard, the first byte and the end of a run."""
        first, last = self._sample_indices[self._runs[run]], self._sample_indices[self._runs[run + 1] - 1]
        begin, end = self.manifest.rows(first), self.manifest.rows(last)
        return int(self.manifest.shard_of(first)), int(begin["offset"]), int(end["offset"]) + int(end["length"])

    def _open_run(self, run: int) -> int:
        assert self._cache is not None
        index, start, stop = self._extent(run)
        shard, url = self.manifest.shards[index], self.manifest.url_of(index)

        def download(file: BinaryIO) -> None:
            fetch(url, start, stop, shard.size, self._remote, file)

        return self._cache.open(f"{shard.sha256[:32]}-{start}-{stop}", stop - start, download)

    def _fetch_ahead(self, run: int) -> None:
        os.close(self._open_run(run))

    def _descriptor(self, key: K, opener: Callable[[K], int]) -> int:
        if key not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[key] = opener(key)
        self._open.move_to_end(key)
        return self._open[key]


def _open_file(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"{path} cannot be opened ({error.strerror}), though it was there at the start; restore it"
        ) from None
