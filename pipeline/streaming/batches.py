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
from pipeline.images import Notes, Pixels, UnreadableImage, decode
from pipeline.streaming.order import Order, SampleIndices
from pipeline.streaming.reader import Reader
from pipeline.streaming.transforms import View

STEPS_AHEAD = 4  # steps of each worker whose remote bytes are fetched in advance
KEPT_BYTES = 64 * 2**20  # a stream whose decoded images take no more than this is decoded once
MAX_REPLACEMENTS = 100  # how many samples of its virtual reader a slot tries until one can be decoded
_VIEW = 5  # stream of random numbers


@dataclass(kw_only=True)
class RawBatch:
    """One batch as a worker hands it over: uint8 pixels, a quarter of the bytes of float32.

    Attributes:
        views: (B, 3, H, W) uint8 pixels by the name of the view.
        indices: (B,) int64 sample indices; -1 is padding.
        unreadable: Sample index and reason of each sample that could not be decoded.
        notes: How many images needed what to be decoded.
        failure: The error that ended the batch. It travels as a value, since DataLoader would bury its sentence in a
            stack trace.
    """

    views: dict[str, Tensor]
    indices: Tensor
    unreadable: list[tuple[int, UnreadableImage]] = field(default_factory=list)
    notes: Notes = field(default_factory=Notes)
    failure: PipelineError | None = None


class Batches(ABC, Dataset[RawBatch]):
    """The batches of one rank by number, for DataLoader's workers. Subclasses say which samples a batch has."""

    def __init__(self, manifest: Manifest, views: View, reader: Reader) -> None:
        self.manifest, self.views, self.reader = manifest, views, reader
        self._prefetched = 0  # batches below this number are fetched or being fetched

    def __getitem__(self, k: int) -> RawBatch:
        try:
            self._prefetch(k)
            return self.batch(k)
        except PipelineError as error:
            return RawBatch(views={}, indices=torch.empty(0), failure=error)

    @abstractmethod
    def batch(self, k: int) -> RawBatch:
        """Read and decode batch k."""

    @abstractmethod
    def needs(self, k: int) -> SampleIndices:
        """Return the sample indices of batch k."""

    def _prefetch(self, k: int) -> None:
        """Fetch the bytes of this worker's next batches ahead; within the window each needs only a few new ranges."""
        if self.manifest.remote:
            worker = torch.utils.data.get_worker_info()
            stride = worker.num_workers if worker else 1
            for following in range(max(k, self._prefetched), k + (STEPS_AHEAD + 1) * stride, stride):
                self.reader.prefetch(self.needs(following))
                self._prefetched = following + stride

    def _empty(self, count: int) -> RawBatch:
        """Return a batch of padding."""
        shape = (count, 3, *self.views.image_size)
        views = {name: _shared_pixels(shape) for name in self.views.names}
        return RawBatch(views=views, indices=torch.full((count,), -1))


class TrainBatches(Batches):
    """Batch k belongs to optimizer step k: the samples of this rank's `virtual_readers` in the global batch."""

    def __init__(self, manifest: Manifest, views: View, reader: Reader, order: Order, virtual_readers: range) -> None:
        super().__init__(manifest, views, reader)
        self.order, self.virtual_readers = order, virtual_readers
        self._decoded: dict[int, Pixels] = {}

    def needs(self, k: int) -> SampleIndices:
        """Return the sample indices of batch k, before any of them is replaced."""
        return self.order.step(k, self.virtual_readers).ravel()

    def batch(self, k: int) -> RawBatch:
        """Read and decode batch k; a sample that cannot be decoded is replaced and listed."""
        size = self.order.reader_batch
        batch = self._empty(len(self.virtual_readers) * size)
        for row, virtual_reader in enumerate(self.virtual_readers):
            sample_indices, epochs = self.order.take(virtual_reader, k * size, size)
            for column in range(size):
                slot = row * size + column
                place = virtual_reader, k * size + column
                self._fill(batch, slot, int(sample_indices[column]), int(epochs[column]), place)
        return batch

    def _fill(self, batch: RawBatch, slot: int, sample_index: int, epoch: int, place: tuple[int, int]) -> None:
        """Put one sample into its slot, or else the next one of its virtual reader that can be decoded.

        So the global batch stays full and is the same at every world size, whichever rank finds the damage.
        """
        virtual_reader, first = place
        for step in range(1, MAX_REPLACEMENTS + 1):
            try:
                pixels = self._pixels(sample_index, batch.notes)
            except UnreadableImage as error:
                batch.unreadable.append((sample_index, error))
                following, epochs = self.order.take(virtual_reader, first + step, 1)
                sample_index, epoch = int(following[0]), int(epochs[0])
                continue
            # A sample that appears several times in an epoch looks different each time.
            again = () if self.order.weights is None else place
            seed = seeds.fold(self.order.seed, epoch, sample_index, _VIEW, *again)
            for name, view in self.views.pixels(pixels, seed).items():
                batch.views[name][slot] = view
            batch.indices[slot] = sample_index
            return
        raise DataError(
            f"{MAX_REPLACEMENTS} images of {self.manifest} in a row cannot be decoded, the last: "
            f"{batch.unreadable[-1][1]}; `python -m pipeline.data verify {self.manifest.folder_of(sample_index)}` names all"
            " of them"
        )

    def _pixels(self, sample_index: int, notes: Notes) -> Pixels:
        """Read and decode an image, or return it as it was decoded before if the whole stream fits `KEPT_BYTES`."""
        pixels = self._decoded.get(sample_index)
        if pixels is None:
            pixels = decode(self.reader.read(sample_index), self.views.decoding, notes)
            # A stream of images of very different sizes keeps the small ones, so the bound holds for it too.
            if pixels.nbytes * len(self.order.sample_indices) <= KEPT_BYTES:
                self._decoded[sample_index] = pixels
        return pixels


class EvaluationBatches(Batches):
    """Batch k is this rank's slice of the k-th `world_size` * `batch_size` samples; the last ones are padded."""

    def __init__(
        self,
        manifest: Manifest,
        views: View,
        reader: Reader,
        sample_indices: SampleIndices,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int | None = None,
    ) -> None:
        super().__init__(manifest, views, reader)
        self.seed = seed
        self.sample_indices, self.batch_size, self.rank, self.world_size = sample_indices, batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.sample_indices) // (self.batch_size * self.world_size))

    def needs(self, k: int) -> SampleIndices:
        """Return the sample indices of batch k, without padding."""
        first = (k * self.world_size + self.rank) * self.batch_size
        return self.sample_indices[first : first + self.batch_size]

    def batch(self, k: int) -> RawBatch:
        """Read and decode batch k; a sample that cannot be decoded is an error."""
        batch = self._empty(self.batch_size)
        for slot, sample_index in enumerate(self.needs(k).tolist()):
            try:
                pixels = decode(self.reader.read(sample_index), self.views.decoding, batch.notes)
            except UnreadableImage as error:
                raise DataError(
                    f"evaluation sample {self.manifest.key(sample_index)!r} in {self.manifest.folder_of(sample_index)}: {error}; "
                    "a score must count every sample, so repair it or make a split without it"
                ) from None
            seed = 0 if self.seed is None else seeds.fold(self.seed, sample_index, _VIEW)
            for name, view in self.views.pixels(pixels, seed).items():
                batch.views[name][slot] = view
            batch.indices[slot] = sample_index
        return batch


def _shared_pixels(shape: tuple[int, ...]) -> Tensor:
    """Return zeroed uint8 pixels; in a worker they already are in the shared memory that carries them over."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape), device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(shape)  # new shared pages are zero
