"""The bytes of a sample, from a local shard or, in ranges kept in a cache, from a remote one."""

import os
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, DataError
from pipeline.storage.cache import Cache
from pipeline.storage.config import RemoteConfig
from pipeline.storage.remote import fetch

MAX_OPEN_FILES = 64  # far under the usual limit of 1024 descriptors, with many workers on a node
FETCH_THREADS = 4  # per process; a range of 2 MB is mostly waiting


class Reader:
    """Reads single samples of one dataset by offset; one per process.

    `sample_indices` are all that will ever be read, sorted, and `runs` cuts them into what one request fetches
    (first index of each run, and the end). Both matter to remote shards only.
    """

    def __init__(
        self, manifest: Manifest, sample_indices: NDArray[np.int64], runs: NDArray[np.int64], remote: RemoteConfig
    ) -> None:
        self.manifest, self._remote = manifest, remote
        self._open: OrderedDict[int, int] = OrderedDict()  # shard or run -> descriptor, least recently used first
        self._sample_indices, self._runs = sample_indices, runs
        self._cache: Cache | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._asked: set[int] = set()
        if manifest.location:
            if not remote.cache:
                raise ConfigError(
                    f"{manifest.folder} has its shards at {manifest.location}, but remote.cache is empty; "
                    "name a folder on a local disk"
                )
            self._cache = Cache(Path(remote.cache), int(remote.cache_gb * 1e9))

    def read(self, sample_index: int) -> bytes:
        """The image's bytes as stored; DataError if the shard no longer holds them or cannot be reached."""
        sample = self.manifest.samples[sample_index]
        offset, length = int(sample["offset"]), int(sample["length"])
        if self._cache is None:
            shard = int(self.manifest.shard_of(sample_index))
            descriptor, start = self._descriptor(shard, self._open_shard), 0
        else:
            run = self._run_of(sample_index)
            descriptor, start = self._descriptor(run, self._open_run), self._extent(run)[1]
        data = os.pread(descriptor, length, offset - start)
        if len(data) != length:
            raise DataError(f"{self.manifest.folder}: sample {self.manifest.key(sample_index)!r} is cut off; verify it")
        return data

    def prefetch(self, sample_indices: NDArray[np.int64]) -> None:
        """Begin to fetch what these sample_indices need, in the background; errors show when they are read."""
        if self._cache is None:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(FETCH_THREADS)
        for run in {self._run_of(int(sample_index)) for sample_index in sample_indices} - self._asked:
            self._asked.add(run)
            self._pool.submit(self._fetch_ahead, run)
        if len(self._asked) > 4096:
            self._asked.clear()  # by now they may have left the cache

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
        while self._open:
            os.close(self._open.popitem()[1])

    def _run_of(self, sample_index: int) -> int:
        index = int(np.searchsorted(self._sample_indices, sample_index))
        return int(np.searchsorted(self._runs, index, side="right")) - 1

    def _extent(self, run: int) -> tuple[int, int, int]:
        """Shard, first byte and end of a run."""
        first, last = self._sample_indices[self._runs[run]], self._sample_indices[self._runs[run + 1] - 1]
        samples = self.manifest.samples
        stop = int(samples["offset"][last]) + int(samples["length"][last])
        return int(self.manifest.shard_of(first)), int(samples["offset"][first]), stop

    def _open_run(self, run: int) -> int:
        assert self._cache is not None
        index, start, stop = self._extent(run)
        shard = self.manifest.shards[index]
        url = f"{self.manifest.location.rstrip('/')}/{shard.name}"

        def download(file: BinaryIO) -> None:
            fetch(url, start, stop, shard.size, self._remote, file)

        return self._cache.open(f"{shard.sha256[:32]}-{start}-{stop}", stop - start, download)

    def _fetch_ahead(self, run: int) -> None:
        os.close(self._open_run(run))

    def _open_shard(self, shard: int) -> int:
        path = self.manifest.folder / self.manifest.shards[shard].name
        try:
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{path} cannot be opened ({error.strerror}); it was there at the start") from None

    def _descriptor(self, key: int, opener: Callable[[int], int]) -> int:
        if key not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[key] = opener(key)
        self._open.move_to_end(key)
        return self._open[key]
