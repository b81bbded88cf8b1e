"""Which sample is where in the endless stream: a pure function of (seed, epoch, index), with no state.

The stream is epoch after epoch, cut into global batches of G slots; batch s holds the stream's places [s·G, (s+1)·G)
and may straddle two epochs. A batch's slots belong to L virtual_readers, G/L consecutive slots each. In an epoch the selected
samples are gathered into blocks (neighbours on disk), the blocks are permuted, the result is cut into one piece per
lane, and each lane shuffles its piece within a window. Ranks own virtual_readers, so neither the world size nor the number of
workers appears here, and a step is found by arithmetic.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline import seeds
from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, DataError

SampleIndices = NDArray[np.int64]

# What each stream of random numbers is for; part of every seed.
_BLOCKS, _WINDOW, _REPEATS, _EXTRAS = 1, 2, 3, 4

BLOCK_BYTES = 2 * 2**20  # what one request fetches: object stores reach full speed at a few MB
MAX_GAP_BYTES = 256 * 2**10  # unselected bytes that are cheaper to read over than to ask around
BLOCKS_PER_LANE = 16  # below this many, the virtual_readers would be mixed too little: see `cut_blocks`


def cut_blocks(
    manifest: Manifest, sample_indices: SampleIndices, virtual_readers: int
) -> tuple[SampleIndices, SampleIndices]:
    """What is shuffled as one, and what is read as one: first index into `sample_indices` of each, and the end.

    They are the same unless the dataset is so small that blocks of 1/8 BLOCK_BYTES would leave a lane fewer than
    BLOCKS_PER_LANE: then samples are shuffled one by one, and every node reads about everything anyway.
    """
    wanted = int(manifest.samples["length"][sample_indices].astype(np.int64).sum()) // (
        virtual_readers * BLOCKS_PER_LANE
    )
    if wanted < BLOCK_BYTES // 8:
        return np.arange(len(sample_indices) + 1), cut_runs(manifest, sample_indices)
    runs = cut_runs(manifest, sample_indices, min(BLOCK_BYTES, wanted))
    return runs, runs


def cut_runs(manifest: Manifest, sample_indices: SampleIndices, span: int = BLOCK_BYTES) -> SampleIndices:
    """First index into `sample_indices` of each stretch of one shard, about `span` bytes without large gaps; and the end."""
    samples = manifest.samples[sample_indices]
    starts = samples["offset"].astype(np.int64)
    lengths = samples["length"].astype(np.int64)
    shards = manifest.shard_of(sample_indices)
    gaps = starts[1:] - (starts[:-1] + lengths[:-1])
    fresh = np.ones(len(sample_indices), bool)  # whether a sample begins a run without holes
    fresh[1:] = (shards[1:] != shards[:-1]) | (gaps > MAX_GAP_BYTES)
    run_start = starts[np.maximum.accumulate(np.where(fresh, np.arange(len(sample_indices)), 0))]
    fresh[1:] |= np.diff((starts - run_start) // span) != 0
    return np.append(np.flatnonzero(fresh), len(sample_indices))


class Order:
    """The stream over `sample_indices` (sorted manifest sample_indices), see the top of this file.

    `weights` (len(sample_indices),) are the mean number of times each sample appears in an epoch, `groups` the classes
    among which appearances are kept even; without them each appears exactly once.
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
            raise DataError("no samples to order: this part of the split is empty; choose another part or split")
        if global_batch % virtual_readers:
            raise ConfigError(
                f"virtual_readers = {virtual_readers} does not divide the global batch of {global_batch}; "
                f"possible are {', '.join(map(str, divisors(global_batch)))}"
            )
        self.sample_indices, self.blocks, self.seed = sample_indices, blocks, seed
        self.virtual_readers, self.lane_batch, self.global_batch = (
            virtual_readers,
            global_batch // virtual_readers,
            global_batch,
        )
        self.window = max(1, window // virtual_readers)
        self.weights, self._groups = weights, groups
        self.epoch_size = len(sample_indices) if weights is None else max(1, round(float(weights.sum())))
        # Two epochs: a batch may straddle them.
        self._epoch = functools.lru_cache(maxsize=2)(self._read_order)
        self._lane = functools.lru_cache(maxsize=2 * virtual_readers)(self._lane_order)

    def step(self, step: int, virtual_readers: Sequence[int]) -> SampleIndices:
        """(len(virtual_readers), G/L) the manifest sample_indices of global batch `step`, for the given virtual_readers."""
        return np.stack([self.take(lane, step * self.lane_batch, self.lane_batch)[0] for lane in virtual_readers])

    def take(self, lane: int, first: int, count: int) -> tuple[SampleIndices, SampleIndices]:
        """(count,) manifest sample_indices and epochs of a lane's own endless stream, from its place `first` on."""
        step, inside = divmod(first, self.lane_batch)
        epoch = (step * self.global_batch + lane * self.lane_batch + inside) // self.epoch_size
        pieces, epochs = [], []
        while count:
            inside = first - self._lane_start(epoch, lane)
            piece = self._lane(epoch, lane)[inside : inside + count]
            pieces.append(piece)
            epochs.append(np.full(len(piece), epoch))
            first, count, epoch = first + len(piece), count - len(piece), epoch + 1
        return self.sample_indices[np.concatenate(pieces)], np.concatenate(epochs)

    def _lane_start(self, epoch: int, lane: int) -> int:
        """How many places of the lane's stream come before `epoch`."""
        whole, rest = divmod(epoch * self.epoch_size, self.global_batch)
        return whole * self.lane_batch + min(max(rest - lane * self.lane_batch, 0), self.lane_batch)

    def _places_before(self, epoch: int, lane: int) -> int:
        """How many places of all virtual_readers below `lane` come before `epoch`."""
        whole, rest = divmod(epoch * self.epoch_size, self.global_batch)
        return whole * self.lane_batch * lane + min(rest, lane * self.lane_batch)

    def _lane_order(self, epoch: int, lane: int) -> NDArray[np.int32]:
        before = self._places_before(epoch + 1, lane) - self._places_before(epoch, lane)
        size = self._lane_start(epoch + 1, lane) - self._lane_start(epoch, lane)
        # Each sample moves by less than the window: so a lane needs only nearby blocks at a time.
        reach = min(self.window, size)
        moved = np.arange(size) * (self.window < size) + seeds.uniforms(size, self.seed, epoch, lane, _WINDOW) * reach
        return self._epoch(epoch)[before : before + size][np.argsort(moved, kind="stable")]

    def _read_order(self, epoch: int) -> NDArray[np.int32]:
        """(epoch_size,) indices into `sample_indices`, block after block."""
        shuffled = seeds.permutation(len(self.blocks) - 1, self.seed, epoch, _BLOCKS)
        sizes = np.diff(self.blocks)[shuffled]
        first = np.repeat(self.blocks[shuffled] - np.cumsum(sizes) + sizes, sizes)
        order = (first + np.arange(len(first))).astype(np.int32)
        if self.weights is None:
            return order
        repeats = self._repeats(epoch)
        once, more = order[repeats[order] > 0], np.repeat(order, np.maximum(repeats[order] - 1, 0))
        # Further appearances lie anywhere in the epoch: side by side they would fill a batch with one image.
        places = np.concatenate(
            [np.arange(len(once)) / len(once), seeds.uniforms(len(more), self.seed, epoch, _EXTRAS)]
        )
        return np.concatenate([once, more])[np.argsort(places, kind="stable")]

    def _repeats(self, epoch: int) -> NDArray[np.int64]:
        """How often each sample appears: its weight rounded down or up, the total exact, classes even."""
        assert self.weights is not None
        draw = seeds.uniforms(len(self.sample_indices) + 1, self.seed, epoch, _REPEATS)
        groups = np.zeros(len(self.sample_indices), np.int64) if self._groups is None else self._groups
        shuffled = np.lexsort((draw[:-1], groups))  # within a class anyone may get the extra appearance
        mass = np.cumsum(self.weights[shuffled])
        edges = np.floor(mass * (self.epoch_size / mass[-1]) + draw[-1] * (1 - 1e-9)).astype(np.int64)
        edges[-1] = self.epoch_size  # rounding must not lose or add one
        repeats = np.empty(len(shuffled), np.int64)
        repeats[shuffled] = np.diff(np.minimum(edges, self.epoch_size), prepend=0)
        return repeats


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def rank_lanes(virtual_readers: int, rank: int, world_size: int) -> range:
    """The virtual_readers a rank owns: consecutive, so that the ranks' batches end to end are the global batch."""
    if virtual_readers % world_size:
        raise ConfigError(
            f"virtual_readers = {virtual_readers} cannot be shared evenly by {world_size} processes; "
            f"make it a multiple of {world_size} that divides the global batch"
        )
    own = virtual_readers // world_size
    return range(rank * own, (rank + 1) * own)


def shuffle_quality(order: Order, manifest: Manifest, steps: int = 20) -> float:
    """How mixed a global batch is, 1 for a uniform shuffle, near 0 for batches read straight off the disk.

    The distinct neighbourhoods (runs of one 4096th of the dataset in storage order) among a batch's samples,
    as a fraction of what uniform draws would give; mean over `steps` batches of epoch 0.
    """
    num_runs = min(4096, len(order.sample_indices))
    run_of = np.full(manifest.num_samples, -1)
    run_of[order.sample_indices] = np.arange(len(order.sample_indices)) * num_runs // len(order.sample_indices)
    steps = max(1, min(steps, order.epoch_size // order.global_batch))
    stride = max(1, order.epoch_size // order.global_batch // steps)
    batches = [order.step(k * stride, range(order.virtual_readers)).ravel() for k in range(steps)]
    expected = num_runs * (1 - (1 - 1 / num_runs) ** order.global_batch)
    return float(np.mean([len(np.unique(run_of[batch])) for batch in batches]) / expected)
