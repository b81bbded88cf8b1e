"""Batch number k of one rank, as the worker processes make it: bytes, pixels, views."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pipeline import seeds
from pipeline.datasets.manifest import Manifest
from pipeline.errors import DataError, PipelineError
from pipeline.images import UnreadableImage, decode
from pipeline.streaming.order import Order, SampleIndices
from pipeline.streaming.reader import Reader
from pipeline.streaming.transforms import View

STEPS_AHEAD = 4  # of each worker, for which remote bytes are fetched in advance
MAX_REPLACEMENTS = 100  # how far along its lane a slot looks for a readable image
_VIEW = 5  # stream of random numbers


@dataclass(kw_only=True)
class Part:
    """One batch as a worker hands it over: uint8, so a quarter of the bytes."""

    views: dict[str, Tensor]  # (B, 3, H, W) uint8
    indices: Tensor  # (B,) int64
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # sample_index and reason
    failure: PipelineError | None = None  # a value: DataLoader would bury its sentence in a stack trace


class Parts(ABC, Dataset[Part]):
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

    @abstractmethod
    def part(self, k: int) -> Part:
        """Batch k, read and decoded."""

    @abstractmethod
    def needs(self, k: int) -> SampleIndices:
        """The manifest sample_indices of part(k)."""

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


class TrainParts(Parts):
    """Batch k is optimizer step k: the rank's virtual_readers of the global batch."""

    def __init__(self, manifest: Manifest, views: View, reader: Reader, order: Order, virtual_readers: range) -> None:
        super().__init__(manifest, views, reader)
        self.order, self.virtual_readers = order, virtual_readers

    def needs(self, k: int) -> SampleIndices:
        return self.order.step(k, self.virtual_readers).ravel()

    def part(self, k: int) -> Part:
        size = self.order.lane_batch
        part = self.empty(len(self.virtual_readers) * size)
        for row, lane in enumerate(self.virtual_readers):
            sample_indices, epochs = self.order.take(lane, k * size, size)
            for column in range(size):
                slot = row * size + column
                place = lane, k * size + column
                self._fill(part, slot, int(sample_indices[column]), int(epochs[column]), place)
        return part

    def _fill(self, part: Part, slot: int, sample_index: int, epoch: int, place: tuple[int, int]) -> None:
        """One sample into its slot; for one that cannot be decoded, the next readable one along its lane.

        So the global batch stays full and the same at every world size, whoever finds the damage.
        """
        lane, first = place
        for step in range(1, MAX_REPLACEMENTS + 1):
            try:
                pixels = decode(self.reader.read(sample_index))
            except UnreadableImage as error:
                part.unreadable.append((sample_index, str(error)))
                following, epochs = self.order.take(lane, first + step, 1)
                sample_index, epoch = int(following[0]), int(epochs[0])
                continue
            # A sample that appears several times in an epoch looks different each time.
            again = () if self.order.weights is None else place
            seed = seeds.fold(self.order.seed, epoch, sample_index, _VIEW, *again)
            for name, view in self.views.pixels(pixels, seed).items():
                part.views[name][slot] = view
            part.indices[slot] = sample_index
            return
        raise DataError(f"{MAX_REPLACEMENTS} images in a row cannot be decoded, the last: {part.unreadable[-1][1]}")


class EvalParts(Parts):
    """Batch k is the k-th slice of every rank's padded, equal share."""

    def __init__(
        self,
        manifest: Manifest,
        views: View,
        reader: Reader,
        sample_indices: SampleIndices,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(manifest, views, reader)
        self.sample_indices, self.batch_size, self.rank, self.world_size = sample_indices, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.sample_indices) // (self.batch_size * self.world_size))

    def needs(self, k: int) -> SampleIndices:
        first = (k * self.world_size + self.rank) * self.batch_size
        return self.sample_indices[first : first + self.batch_size]

    def part(self, k: int) -> Part:
        part = self.empty(self.batch_size)
        for slot, sample_index in enumerate(self.needs(k).tolist()):
            try:
                pixels = decode(self.reader.read(sample_index))
            except UnreadableImage as error:
                raise DataError(
                    f"evaluation sample {self.manifest.key(sample_index)!r} in {self.manifest.folder}: {error}; "
                    "a score must count every sample, so repair it or make a split without it"
                ) from None
            for name, view in self.views.pixels(pixels, 0).items():
                part.views[name][slot] = view
            part.indices[slot] = sample_index
        return part


def _shared_pixels(shape: tuple[int, ...]) -> Tensor:
    """Zeroed uint8; in a worker already in the shared memory that carries it over, which saves a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)  # new shared pages are zero
