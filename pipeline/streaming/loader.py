"""Endless training batches and finite evaluation batches of one rank."""

import itertools
import logging
import tempfile
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.storage.config import RemoteConfig
from pipeline.streaming.batch import Batch
from pipeline.streaming.batches import EvaluationBatches, RawBatch, TrainBatches
from pipeline.streaming.config import LoaderConfig, derive_virtual_readers
from pipeline.streaming.order import Order, SampleIndices, cut_blocks, cut_runs, readers_of_rank
from pipeline.streaming.quarantine import NoteLog, Quarantine
from pipeline.streaming.reader import Reader
from pipeline.streaming.sampling import sample_weights
from pipeline.streaming.transfer import Transfer
from pipeline.streaming.transforms import View
from pipeline.streaming.workers import read_batches

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")

TEMPORARY_GB = 2.0  # largest cache of an evaluation that was given none


class Loader:
    """Endless batches of one rank; the global batches are the same for every world size.

    The whole state is one integer, the step: `batches(step)` begins there by arithmetic. A sample that cannot be
    decoded is replaced by the next one of its virtual reader, counted, and named in the quarantine file.

    Args:
        manifest: The dataset.
        sample_indices: Sample indices of the stream, in any order.
        global_batch: Samples per step over all ranks.
        rank: This process's number, from 0.
        world_size: Number of processes; divides the number of virtual readers.
        seed: Seed of the order and of the views.
        views: Makes the views of one image.
        config: How the stream is ordered and read. Without `virtual_readers` they are derived for this stream alone.
        hide_labels: Give -1 as every label, or what `guesses` has.
        guesses: Labels (n,) of all samples of the manifest, in place of hidden ones.
        quarantine: File to append undecodable samples to, one JSON object a line; None = only log them.
        device: Where the batches are needed.

    Raises:
        ConfigError: The numbers do not fit each other, or the sampling would reveal hidden labels.
        DataError: There are no samples. `batches` raises it when more samples than `config.max_unreadable` allows,
            as a share of this rank's samples, cannot be decoded.
    """

    def __init__(
        self,
        manifest: Manifest,
        sample_indices: SampleIndices,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        views: View,
        config: LoaderConfig,
        hide_labels: bool = False,
        guesses: np.ndarray | None = None,
        quarantine: Path | None = None,
        device: torch.device = CPU,
    ) -> None:
        sample_indices = np.sort(np.asarray(sample_indices, np.int64))
        weights, groups = sample_weights(manifest.labels[sample_indices], config)
        num_readers = config.virtual_readers or derive_virtual_readers(global_batch, len(sample_indices))
        if 0 < len(sample_indices) < num_readers:
            raise ConfigError(
                f"data.loader.virtual_readers is {num_readers}, but {manifest} has only {len(sample_indices)}"
                " samples to share among them; leave virtual_readers out"
            )
        if hide_labels and config.sampling != "uniform":
            raise ConfigError(
                f"data.loader.sampling={config.sampling} would reveal the labels of a stream that hides them;"
                " set it to uniform"
            )
        _check_cache(manifest, sample_indices, config, world_size)
        blocks, runs = cut_blocks(manifest, sample_indices, num_readers)
        order = Order(
            sample_indices,
            blocks,
            global_batch=global_batch,
            virtual_readers=num_readers,
            window=config.window,
            seed=seed,
            weights=weights,
            groups=groups,
        )
        self.order, self.config, self.views = order, config, views
        self._readers = readers_of_rank(num_readers, rank, world_size)
        reader = Reader(manifest, sample_indices, runs, config.remote)
        self._source = TrainBatches(manifest, views, reader, order, self._readers)
        self._labels = guesses if hide_labels else manifest.labels
        self._quarantine = Quarantine(
            manifest, quarantine, int(config.max_unreadable * len(sample_indices) / world_size)
        )
        self._notes = NoteLog(str(manifest.folder))
        self._transfer = Transfer(device, views)
        self._running: list[Generator[RawBatch, None, None]] = []
        self._features: Mapping[str, Tensor] | None = None
        logger.info(
            "%s: an epoch is %d samples = %.1f steps of %d; %d shards, %d blocks, %d virtual readers",
            manifest,
            order.epoch_size,
            self.steps_per_epoch,
            global_batch,
            len(manifest.shards),
            len(blocks) - 1,
            num_readers,
        )

    @property
    def steps_per_epoch(self) -> float:
        """Steps that one pass over the stream takes; not whole where a batch straddles two epochs."""
        return self.order.epoch_size / self.order.global_batch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yield this rank's share of global batch `start_step` and of every later one, on the device; never ends."""
        features = self._features
        found = self._read(start_step) if features is None else self._feature_batches(features, start_step)
        return self._transfer.deliver(found)

    def _read(self, start_step: int) -> Iterator[Batch]:
        raw_batches = read_batches(self._source, itertools.count(start_step), self.config.workers, self.config.prefetch)
        self._running.append(raw_batches)
        for raw in raw_batches:
            self._quarantine.add(raw.unreadable)
            self._notes.add(raw.notes)
            yield _batch(raw, self._labels, len(self._readers))

    def use_features(self, features: Mapping[str, Tensor]) -> None:
        """Give features in place of images from now on; nothing is read or decoded.

        Args:
            features: (views, samples, F) by the name of the view; samples in the order of their indices. Epoch e takes
                view e modulo the number of views.
        """
        self._features = features

    def _feature_batches(self, features: Mapping[str, Tensor], start_step: int) -> Iterator[Batch]:
        size, known = self.order.reader_batch, self.order.sample_indices
        for step in itertools.count(start_step):
            taken = [self.order.take(reader, step * size, size) for reader in self._readers]
            indices, epochs = (torch.from_numpy(np.concatenate(each)) for each in zip(*taken, strict=True))
            rows = torch.from_numpy(np.searchsorted(known, indices.numpy()))
            chosen = {name: each[epochs % len(each), rows] for name, each in features.items()}
            labels = torch.full_like(indices, -1)
            if self._labels is not None:
                labels = torch.from_numpy(self._labels[indices.numpy()])
            yield Batch(
                images=chosen["images"],
                strong=chosen.get("strong"),
                labels=labels,
                indices=indices,
                virtual_readers=len(self._readers),
            )

    def close(self) -> None:
        """End the worker processes, and with them every iterator that `batches` has given out."""
        while self._running:
            self._running.pop().close()
        self._source.reader.close()


def evaluation_batches(
    manifest: Manifest,
    sample_indices: SampleIndices,
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    views: View,
    workers: int = 0,
    remote: RemoteConfig = RemoteConfig(),  # noqa: B008 - frozen
    seed: int | None = None,
    device: torch.device = CPU,
) -> Iterator[Batch]:
    """Yield every sample exactly once over all ranks, in the same number of batches on each rank.

    Args:
        manifest: The dataset.
        sample_indices: Sample indices to evaluate, in any order.
        batch_size: Samples per rank and batch; the last batches are padded with label and index -1.
        rank: This process's number, from 0.
        world_size: Number of processes.
        views: Makes the view of one image.
        workers: Processes that read and decode; 0 = this process.
        remote: How remote shards are fetched. Without a cache folder a temporary one is used.
        seed: Seed of random views, one for each sample; None for views without randomness.
        device: Where the batches are needed.

    Raises:
        DataError: A sample cannot be decoded. A score must count every sample, so none is skipped.
    """
    sample_indices = np.sort(np.asarray(sample_indices, np.int64))
    temporary = None
    if manifest.remote and not remote.cache:
        temporary = tempfile.TemporaryDirectory(prefix="shards-")
        remote = remote.model_copy(update={"cache": temporary.name, "cache_gb": min(remote.cache_gb, TEMPORARY_GB)})
    reader = Reader(manifest, sample_indices, cut_runs(manifest, sample_indices), remote)
    source = EvaluationBatches(manifest, views, reader, sample_indices, batch_size, rank, world_size, seed)
    raw_batches = read_batches(source, range(len(source)), workers, prefetch=2)
    try:
        yield from Transfer(device, views).deliver(_batch(raw, manifest.labels, 1) for raw in raw_batches)
    finally:
        raw_batches.close()
        source.reader.close()
        if temporary:
            temporary.cleanup()


def _check_cache(manifest: Manifest, sample_indices: SampleIndices, config: LoaderConfig, world_size: int) -> None:
    """Refuse a cache that cannot hold what this rank shuffles at a time: every range would be fetched again."""
    if manifest.remote and len(sample_indices):
        mean = float(manifest.rows(sample_indices)["length"].mean())
        needed = mean * min(2 * config.window, len(sample_indices)) / world_size / 1e9
        if needed > config.remote.cache_gb:
            raise ConfigError(
                f"data.loader.remote.cache_gb {config.remote.cache_gb:g} is less than the {needed:.3g} GB that "
                f"data.loader.window {config.window} keeps in use on one rank; raise cache_gb or lower window"
            )


def _batch(raw: RawBatch, labels: NDArray[np.int64] | None, virtual_readers: int) -> Batch:
    """Return the batch of pixels with its labels, -1 where they are hidden (`labels` is None) or padding."""
    found = torch.full_like(raw.indices, -1)
    if labels is not None:
        known = torch.from_numpy(labels[raw.indices.numpy()])
        found = torch.where(raw.indices >= 0, known, found)
    return Batch(
        images=raw.views["images"],
        strong=raw.views.get("strong"),
        labels=found,
        indices=raw.indices,
        virtual_readers=virtual_readers,
    )
