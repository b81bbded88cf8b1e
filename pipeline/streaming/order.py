"""The order of the samples: a pure function of (seed, epoch, index), with no state.

The stream is epoch after epoch, cut into global batches of G places. Batch s holds the places [s·G, (s+1)·G) of the
stream and may straddle two epochs. The places of a batch belong to V virtual readers, G/V consecutive places each.

In each epoch the samples are gathered into blocks of neighbours on disk. The blocks are permuted, the result is cut into
one piece per virtual reader, and each virtual reader shuffles its piece within a window. A process owns whole virtual
readers. So the order knows neither the number of processes nor of workers, and any step is found by arithmetic.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline import seeds
from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, DataError

SampleIndices = NDArray[np.int64]

# Streams of random numbers, by what they are for; part of every seed.
_BLOCKS, _WINDOW, _REPEATS, _EXTRAS = 1, 2, 3, 4

BLOCK_BYTES = 2 * 2**20  # what one request fetches: object stores reach full speed at a few MB
MAX_GAP_BYTES = 256 * 2**10  # a smaller gap of unselected bytes is cheaper to read than a second request
BLOCKS_PER_READER = 16  # with fewer blocks the virtual readers are mixed too little: see `cut_blocks`


def cut_blocks(
    manifest: Manifest, sample_indices: SampleIndices, virtual_readers: int
) -> tuple[SampleIndices, SampleIndices]:
    """Cut the samples into blocks, which are shuffled as one, and runs, which are read as one.

    Blocks and runs are the same except in a small dataset, where blocks of an eighth of BLOCK_BYTES would leave a
    virtual reader fewer than BLOCKS_PER_READER of them. There samples are shuffled one by one, and every node reads
    nearly everything anyway.

    Args:
        manifest: The dataset.
        sample_indices: (N,) sorted sample indices of the stream.
        virtual_readers: Number of virtual readers.

    Returns:
        The blocks and the runs, each as the first index into `sample_indices` of every one, and N at the end.
    """
    rows, shards = manifest.rows(sample_indices), manifest.shard_of(sample_indices)
    wanted = int(rows["length"].astype(np.int64).sum()) // (virtual_readers * BLOCKS_PER_READER)
    if wanted < BLOCK_BYTES // 8:
        return np.arange(len(sample_indices) + 1), _cut(rows, shards, BLOCK_BYTES)
    runs = _cut(rows, shards, min(BLOCK_BYTES, wanted))
    return runs, runs


def cut_runs(manifest: Manifest, sample_indices: SampleIndices, span: int = BLOCK_BYTES) -> SampleIndices:
    """Cut the samples into runs: stretches of one shard of about `span` bytes without a large gap.

    Returns:
        The first index into `sample_indices` of each run, and the number of samples at the end.
    """
    return _cut(manifest.rows(sample_indices), manifest.shard_of(sample_indices), span)


def _cut(rows: NDArray[np.void], shards: SampleIndices, span: int) -> SampleIndices:
    starts = rows["offset"].astype(np.int64)
    lengths = rows["length"].astype(np.int64)
    gaps = starts[1:] - (starts[:-1] + lengths[:-1])
    fresh = np.ones(len(rows), bool)  # whether a sample begins a run without holes
    fresh[1:] = (shards[1:] != shards[:-1]) | (gaps > MAX_GAP_BYTES)
    run_start = starts[np.maximum.accumulate(np.where(fresh, np.arange(len(rows)), 0))]
    fresh[1:] |= np.diff((starts - run_start) // span) != 0
    return np.append(np.flatnonzero(fresh), len(rows))


class Order:
    """The endless order of one stream; the top of this file explains it.

    Args:
        sample_indices: (N,) sorted sample indices of the stream.
        blocks: First index into `sample_indices` of each block, and N at the end.
        global_batch: Samples per step over all processes.
        virtual_readers: Number of virtual readers; divides `global_batch`.
        window: Reach of the shuffle in samples, over all virtual readers.
        seed: Seed of the order.
        weights: (N,) how often each sample appears in an epoch on average; None = exactly once.
        groups: (N,) class of each sample. Within a class, appearances differ by at most one.

    Raises:
        DataError: There are no samples.
        ConfigError: `virtual_readers` does not divide `global_batch`.
    """

    def __init__(
        self,
        sample_indices: SampleIndices,
        blocks: SampleIndices,
        *,
        global_batch: int,
        virtual_readers: int,
        window: int,
        seed: int,
        weights: NDArray[np.float64] | None = None,
        groups: NDArray[np.int64] | None = None,
    ) -> None:
        if not len(sample_indices):
            raise DataError("this stream has no samples; choose another split")
        if global_batch % virtual_readers:
            raise ConfigError(
                f"data.loader.virtual_readers {virtual_readers} does not divide the global batch of {global_batch};"
                " leave virtual_readers out"
            )
        self.sample_indices, self.blocks, self.seed = sample_indices, blocks, seed
        self.virtual_readers, self.global_batch = virtual_readers, global_batch
        self.reader_batch = global_batch // virtual_readers
        self.window = max(1, window // virtual_readers)
        self.weights, self._groups = weights, groups
        self.epoch_size = len(sample_indices) if weights is None else max(1, round(float(weights.sum())))
        # Two epochs: a batch may straddle them.
        self._epoch = functools.lru_cache(maxsize=2)(self._read_order)
        self._piece = functools.lru_cache(maxsize=2 * virtual_readers)(self._shuffled_piece)

    def step(self, step: int, virtual_readers: Sequence[int]) -> SampleIndices:
        """Return (len(virtual_readers), G/V) the sample indices of global batch `step` for these virtual readers."""
        return np.stack(
            [self.take(reader, step * self.reader_batch, self.reader_batch)[0] for reader in virtual_readers]
        )

    def take(self, reader: int, first: int, count: int) -> tuple[SampleIndices, SampleIndices]:
        """Return the next samples of one virtual reader's own endless stream.

        Args:
            reader: Number of the virtual reader.
            first: Place in its stream of the first sample; batch s begins at s·G/V.
            count: How many samples.

        Returns:
            (count,) sample indices and (count,) the epoch of each.
        """
        step, inside = divmod(first, self.reader_batch)
        epoch = (step * self.global_batch + reader * self.reader_batch + inside) // self.epoch_size
        pieces, epochs = [], []
        while count:
            inside = first - self._reader_start(epoch, reader)
            piece = self._piece(epoch, reader)[inside : inside + count]
            pieces.append(piece)
            epochs.append(np.full(len(piece), epoch))
            first, count, epoch = first + len(piece), count - len(piece), epoch + 1
        return self.sample_indices[np.concatenate(pieces)], np.concatenate(epochs)

    def _reader_start(self, epoch: int, reader: int) -> int:
        """Return how many places of one virtual reader's stream come before `epoch`."""
        whole, rest = divmod(epoch * self.epoch_size, self.global_batch)
        return whole * self.reader_batch + min(max(rest - reader * self.reader_batch, 0), self.reader_batch)

    def _places_before(self, epoch: int, reader: int) -> int:
        """Return how many places of all virtual readers below `reader` come before `epoch`."""
        whole, rest = divmod(epoch * self.epoch_size, self.global_batch)
        return whole * self.reader_batch * reader + min(rest, reader * self.reader_batch)

    def _shuffled_piece(self, epoch: int, reader: int) -> NDArray[np.int32]:
        before = self._places_before(epoch + 1, reader) - self._places_before(epoch, reader)
        size = self._reader_start(epoch + 1, reader) - self._reader_start(epoch, reader)
        # Each sample moves by less than the window, so a virtual reader needs only nearby blocks at a time.
        reach = min(self.window, size)
        moved = np.arange(size) * (self.window < size) + seeds.uniforms(size, self.seed, epoch, reader, _WINDOW) * reach
        return self._epoch(epoch)[before : before + size][np.argsort(moved, kind="stable")]

    def _read_order(self, epoch: int) -> NDArray[np.int32]:
        """Return (epoch_size,) indices into `sample_indices`, block after block."""
        shuffled = seeds.permutation(len(self.blocks) - 1, self.seed, epoch, _BLOCKS)
        sizes = np.diff(self.blocks)[shuffled]
        first = np.repeat(self.blocks[shuffled] - np.cumsum(sizes) + sizes, sizes)
        order = (first + np.arange(len(first))).astype(np.int32)
        if self.weights is None:
            return order
        repeats = self._repeats(epoch)
        once, more = order[repeats[order] > 0], np.repeat(order, np.maximum(repeats[order] - 1, 0))
        # Further appearances are spread over the epoch: side by side they would fill a batch with one image.
        places = np.concatenate(
            [np.arange(len(once)) / len(once), seeds.uniforms(len(more), self.seed, epoch, _EXTRAS)]
        )
        return np.concatenate([once, more])[np.argsort(places, kind="stable")]

    def _repeats(self, epoch: int) -> NDArray[np.int64]:
        """Return how often each sample appears: its weight rounded down or up, with an exact total and even classes."""
        assert self.weights is not None
        draw = seeds.uniforms(len(self.sample_indices) + 1, self.seed, epoch, _REPEATS)
        groups = np.zeros(len(self.sample_indices), np.int64) if self._groups is None else self._groups
        shuffled = np.lexsort((draw[:-1], groups))  # within a class any sample may get the extra appearance
        mass = np.cumsum(self.weights[shuffled])
        edges = np.floor(mass * (self.epoch_size / mass[-1]) + draw[-1] * (1 - 1e-9)).astype(np.int64)
        edges[-1] = self.epoch_size  # rounding must not lose or add one
        repeats = np.empty(len(shuffled), np.int64)
        repeats[shuffled] = np.diff(np.minimum(edges, self.epoch_size), prepend=0)
        return repeats


def readers_of_rank(virtual_readers: int, rank: int, world_size: int) -> range:
    """Return the virtual readers that a rank owns.

    They are consecutive, so the batches of all ranks end to end are the global batch.

    Raises:
        ConfigError: The ranks cannot share the virtual readers evenly.
    """
    if virtual_readers % world_size:
        raise ConfigError(
            f"data.loader.virtual_readers {virtual_readers} must be a multiple of the {world_size} processes;"
            " leave virtual_readers out, or change the number of processes"
        )
    own = virtual_readers // world_size
    return range(rank * own, (rank + 1) * own)


def shuffle_quality(order: Order, manifest: Manifest, steps: int = 20) -> float:
    """Measure how mixed a global batch is: 1 for a uniform shuffle, near 0 for samples in the order of the disk.

    The measure counts the distinct neighbourhoods among the samples of a batch, as a fraction of what uniform draws
    would give. A neighbourhood is one 4096th of the dataset in the order of the disk. The result is the mean over
    `steps` batches of epoch 0.
    """
    num_runs = min(4096, len(order.sample_indices))
    run_of = np.full(manifest.num_samples, -1)
    run_of[order.sample_indices] = np.arange(len(order.sample_indices)) * num_runs // len(order.sample_indices)
    steps = max(1, min(steps, order.epoch_size // order.global_batch))
    stride = max(1, order.epoch_size // order.global_batch // steps)
    batches = [order.step(k * stride, range(order.virtual_readers)).ravel() for k in range(steps)]
    expected = num_runs * (1 - (1 - 1 / num_runs) ** order.global_batch)
    return float(np.mean([len(np.unique(run_of[batch])) for batch in batches]) / expected)
