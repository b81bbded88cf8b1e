"""Endless batches for one rank; the loader's whole state is the optimizer step."""

import itertools
import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pipeline.data import seeds
from pipeline.data.batch import Batch
from pipeline.data.buffers import Buffers
from pipeline.data.config import LoaderConfig, RemoteConfig
from pipeline.data.decode import UnreadableImage, decode
from pipeline.data.manifest import Manifest
from pipeline.data.order import Order, Positions, cut_blocks, cut_runs, rank_lanes
from pipeline.data.quarantine import Quarantine
from pipeline.data.reader import Reader
from pipeline.data.sampling import sample_weights
from pipeline.data.transforms import View
from pipeline.errors import ConfigError, DataError, PipelineError

STEPS_AHEAD = 4  # of each worker, for which remote bytes are fetched in advance
MAX_REPLACEMENTS = 100  # how far along its lane a slot looks for a readable image
_VIEW = 5  # stream of random numbers


@dataclass(kw_only=True)
class Part:
    """One batch as a worker hands it over: uint8, so a quarter of the bytes."""

    views: dict[str, Tensor]  # (B, 3, H, W) uint8
    indices: Tensor  # (B,) int64
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # position and reason
    failure: PipelineError | None = None  # a value: DataLoader would bury its sentence in a stack trace


class _Source(Dataset[Part]):
    """Batch number k of one rank; what DataLoader's workers index. Subclasses say which samples it has."""

    def __init__(self, manifest: Manifest, views: View, reader: Reader) -> None:
        self.manifest, self.views, self.reader = manifest, views, reader
        self._prefetched = 0  # the bytes of earlier parts are there or under way

    def __getitem__(self, k: int) -> Part:
        try:
            self._prefetch(k)
            return self.part(k)
        except PipelineError as error:
            return Part(views={}, indices=torch.empty(0), failure=error)

    def part(self, k: int) -> Part:
        raise NotImplementedError

    def needs(self, k: int) -> Positions:
        """The manifest positions of part(k)."""
        raise NotImplementedError

    def _prefetch(self, k: int) -> None:
        """This worker's own next parts; within the window, each needs only a few ranges not yet there."""
        if self.manifest.location:
            worker = torch.utils.data.get_worker_info()
            stride = worker.num_workers if worker else 1
            for following in range(max(k, self._prefetched), k + (STEPS_AHEAD + 1) * stride, stride):
                self.reader.prefetch(self.needs(following))
                self._prefetched = following + stride

    def empty(self, count: int) -> Part:
        shape = (count, 3, *self.views.image_size)
        views = {name: _shared_pixels(shape) for name in self.views.names}
        return Part(views=views, indices=torch.full((count,), -1))


class _TrainSource(_Source):
    """Batch k is optimizer step k: the rank's lanes of the global batch."""

    def __init__(self, manifest: Manifest, views: View, reader: Reader, order: Order, lanes: range) -> None:
        super().__init__(manifest, views, reader)
        self.order, self.lanes = order, lanes

    def needs(self, k: int) -> Positions:
        return self.order.step(k, self.lanes).ravel()

    def part(self, k: int) -> Part:
        size = self.order.lane_batch
        part = self.empty(len(self.lanes) * size)
        for row, lane in enumerate(self.lanes):
            positions, epochs = self.order.take(lane, k * size, size)
            for column in range(size):
                slot = row * size + column
                place = lane, k * size + column
                self._fill(part, slot, int(positions[column]), int(epochs[column]), place)
        return part

    def _fill(self, part: Part, slot: int, position: int, epoch: int, place: tuple[int, int]) -> None:
        """One sample into its slot; for one that cannot be decoded, the next readable one along its lane.

        So the global batch stays full and the same at every world size, whoever finds the damage.
        """
        lane, first = place
        for step in range(1, MAX_REPLACEMENTS + 1):
            try:
                pixels = decode(self.reader.read(position))
            except UnreadableImage as error:
                part.unreadable.append((position, str(error)))
                following, epochs = self.order.take(lane, first + step, 1)
                position, epoch = int(following[0]), int(epochs[0])
                continue
            # A sample that appears several times in an epoch looks different each time.
            again = () if self.order.weights is None else place
            seed = seeds.fold(self.order.seed, epoch, position, _VIEW, *again)
            for name, view in self.views.pixels(pixels, seed).items():
                part.views[name][slot] = view
            part.indices[slot] = position
            return
        raise DataError(f"{MAX_REPLACEMENTS} images in a row cannot be decoded, the last: {part.unreadable[-1][1]}")


class _EvalSource(_Source):
    """Batch k is the k-th slice of every rank's padded, equal share."""

    def __init__(
        self,
        manifest: Manifest,
        views: View,
        reader: Reader,
        positions: Positions,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(manifest, views, reader)
        self.positions, self.batch_size, self.rank, self.world_size = positions, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.positions) // (self.batch_size * self.world_size))

    def needs(self, k: int) -> Positions:
        first = (k * self.world_size + self.rank) * self.batch_size
        return self.positions[first : first + self.batch_size]

    def part(self, k: int) -> Part:
        part = self.empty(self.batch_size)
        for slot, position in enumerate(self.needs(k).tolist()):
            try:
                pixels = decode(self.reader.read(position))
            except UnreadableImage as error:
                raise DataError(
                    f"evaluation sample {self.manifest.key(position)!r} in {self.manifest.folder}: {error}; "
                    "a score must count every sample, so repair it or make a split without it"
                ) from None
            for name, view in self.views.pixels(pixels, 0).items():
                part.views[name][slot] = view
            part.indices[slot] = position
        return part


class Loader:
    """Endless batches of one rank, the same global batches for every world size that divides the lanes.

    Its state is one integer: `batches(step)` begins with the batch of that optimizer step, by arithmetic.
    `positions` are manifest positions; `hide_labels` hands out -1 for every label. Samples that cannot be decoded
    are replaced, counted and, with `quarantine`, named in that file (one JSON object a line); past
    `config.max_unreadable` of this rank's share, DataError.
    """

    def __init__(
        self,
        manifest: Manifest,
        positions: Positions,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        views: View,
        config: LoaderConfig,
        hide_labels: bool = False,
        quarantine: Path | None = None,
    ) -> None:
        positions = np.sort(np.asarray(positions, np.int64))
        weights, groups = sample_weights(manifest.labels[positions], config)
        _check_cache(manifest, positions, config, world_size)
        blocks, runs = cut_blocks(manifest, positions, config.lanes)
        order = Order(
            positions,
            blocks,
            global_batch=global_batch,
            lanes=config.lanes,
            window=config.window,
            seed=seed,
            weights=weights,
            groups=groups,
        )
        self.order, self.config, self.views = order, config, views
        self._lanes = rank_lanes(config.lanes, rank, world_size)
        reader = Reader(manifest, positions, runs, config.remote)
        self._source = _TrainSource(manifest, views, reader, order, self._lanes)
        self._labels = None if hide_labels else manifest.labels
        self._quarantine = Quarantine(manifest, quarantine, int(config.max_unreadable * len(positions) / world_size))
        self._buffers = Buffers()
        self._running: list[Generator[Part, None, None]] = []

    @property
    def steps_per_epoch(self) -> float:
        """Epochs follow one another without a seam, so this need not be whole."""
        return self.order.epoch_size / self.order.global_batch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This rank's part of global batch `start_step` and of all that follow; never ends."""
        parts = _parts(self._source, itertools.count(start_step), self.config.workers, self.config.prefetch)
        self._running.append(parts)
        for part in parts:
            self._quarantine.add(part.unreadable)
            yield _batch(part, self.views, self._labels, len(self._lanes), self._buffers)

    def close(self) -> None:
        """Ends the worker processes; iterators handed out before end too."""
        while self._running:
            self._running.pop().close()
        self._source.reader.close()


def evaluation_batches(
    manifest: Manifest,
    positions: Positions,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    views: View,
    workers: int = 0,
    remote: RemoteConfig = RemoteConfig(),  # noqa: B008 - frozen
) -> Iterator[Batch]:
    """Every sample exactly once over all ranks, the same number of batches on each; padding has label and index -1.

    `batch_size` is per rank. DataError for a sample that cannot be decoded: a score must not skip any.
    """
    buffers = Buffers()
    positions = np.sort(np.asarray(positions, np.int64))
    reader = Reader(manifest, positions, cut_runs(manifest, positions), remote)
    source = _EvalSource(manifest, views, reader, positions, batch_size, rank, world_size)
    parts = _parts(source, range(len(source)), workers, prefetch=2)
    try:
        for part in parts:
            yield _batch(part, views, manifest.labels, 1, buffers)
    finally:
        parts.close()
        source.reader.close()


def _check_cache(manifest: Manifest, positions: Positions, config: LoaderConfig, world_size: int) -> None:
    """ConfigError if the cache cannot hold what this rank shuffles at a time: every range would be fetched again."""
    if manifest.location and len(positions):
        mean = float(manifest.samples["length"][positions].mean())
        needed = mean * min(2 * config.window, len(positions)) / world_size / 1e9
        if needed > config.remote.cache_gb:
            raise ConfigError(
                f"remote.cache_gb = {config.remote.cache_gb:g} is less than the {needed:.3g} GB that window = "
                f"{config.window} keeps in use on one rank; raise it or lower window"
            )


def _parts(source: _Source, numbers: Iterable[int], workers: int, prefetch: int) -> Generator[Part, None, None]:
    """source[k] for each number, in order, by `workers` processes."""
    if not workers:
        parts: Iterable[Part] = map(source.__getitem__, numbers)
    else:
        parts = DataLoader(
            source,
            batch_size=None,
            sampler=numbers,
            num_workers=workers,
            prefetch_factor=prefetch,
            collate_fn=_unchanged,
        )
    for part in parts:
        if part.failure:
            raise part.failure
        yield part


def _shared_pixels(shape: tuple[int, ...]) -> Tensor:
    """Zeroed uint8; in a worker already in the shared memory that carries it over, which saves a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)  # new shared pages are zero


def _unchanged(part: Any) -> Any:
    return part


def _batch(part: Part, views: View, labels: NDArray[np.int64] | None, lanes: int, buffers: Buffers) -> Batch:
    hidden = torch.full_like(part.indices, -1)
    if labels is not None:
        known = torch.from_numpy(labels[part.indices.numpy()])
        hidden = torch.where(part.indices >= 0, known, hidden)
    images = {name: views.normalise(view, buffers.take(view.shape)) for name, view in part.views.items()}
    return Batch(
        images=images["images"],
        strong=images.get("strong"),
        labels=hidden,
        indices=part.indices,
        lanes=lanes,
    )
