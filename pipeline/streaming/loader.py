"""Endless batches for one rank; the loader's whole state is the optimizer step."""

import itertools
import logging
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.storage.config import RemoteConfig
from pipeline.streaming.batch import Batch
from pipeline.streaming.batches import EvalParts, Part, TrainParts
from pipeline.streaming.buffers import Buffers
from pipeline.streaming.config import LoaderConfig, derive_virtual_readers
from pipeline.streaming.order import Order, SampleIndices, cut_blocks, cut_runs, rank_lanes
from pipeline.streaming.quarantine import Quarantine
from pipeline.streaming.reader import Reader
from pipeline.streaming.sampling import sample_weights
from pipeline.streaming.transforms import View
from pipeline.streaming.workers import make_parts

logger = logging.getLogger(__name__)


class Loader:
    """Endless batches of one rank, the same global batches for every world size that divides the virtual_readers.

    Its state is one integer: `batches(step)` begins with the batch of that optimizer step, by arithmetic.
    `sample_indices` are manifest sample_indices; `hide_labels` hands out -1 for every label. Samples that cannot be decoded
    are replaced, counted and, with `quarantine`, named in that file (one JSON object a line); past
    `config.max_unreadable` of this rank's share, DataError.
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
        quarantine: Path | None = None,
    ) -> None:
        sample_indices = np.sort(np.asarray(sample_indices, np.int64))
        weights, groups = sample_weights(manifest.labels[sample_indices], config)
        num_readers = config.virtual_readers or derive_virtual_readers(global_batch, len(sample_indices))
        if 0 < len(sample_indices) < num_readers:
            raise ConfigError(
                f"virtual_readers is {num_readers}, but {manifest.folder} has only {len(sample_indices)} samples to share"
                " among them; leave virtual_readers out"
            )
        if hide_labels and config.sampling != "uniform":
            raise ConfigError(
                f"sampling = {config.sampling} of a stream whose labels are hidden would tell them; use uniform"
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
        self._lanes = rank_lanes(num_readers, rank, world_size)
        reader = Reader(manifest, sample_indices, runs, config.remote)
        self._source = TrainParts(manifest, views, reader, order, self._lanes)
        self._labels = None if hide_labels else manifest.labels
        self._quarantine = Quarantine(
            manifest, quarantine, int(config.max_unreadable * len(sample_indices) / world_size)
        )
        self._buffers = Buffers()
        self._running: list[Generator[Part, None, None]] = []
        logger.info(
            "%s: an epoch is %d samples = %.1f steps of %d; %d shards, %d blocks, %d virtual readers",
            manifest.folder,
            order.epoch_size,
            self.steps_per_epoch,
            global_batch,
            len(manifest.shards),
            len(blocks) - 1,
            num_readers,
        )

    @property
    def steps_per_epoch(self) -> float:
        """Epochs follow one another without a seam, so this need not be whole."""
        return self.order.epoch_size / self.order.global_batch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This rank's part of global batch `start_step` and of all that follow; never ends."""
        parts = make_parts(self._source, itertools.count(start_step), self.config.workers, self.config.prefetch)
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
    sample_indices: SampleIndices,
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
    sample_indices = np.sort(np.asarray(sample_indices, np.int64))
    reader = Reader(manifest, sample_indices, cut_runs(manifest, sample_indices), remote)
    source = EvalParts(manifest, views, reader, sample_indices, batch_size, rank, world_size)
    parts = make_parts(source, range(len(source)), workers, prefetch=2)
    try:
        for part in parts:
            yield _batch(part, views, manifest.labels, 1, buffers)
    finally:
        parts.close()
        source.reader.close()


def _check_cache(manifest: Manifest, sample_indices: SampleIndices, config: LoaderConfig, world_size: int) -> None:
    """ConfigError if the cache cannot hold what this rank shuffles at a time: every range would be fetched again."""
    if manifest.location and len(sample_indices):
        mean = float(manifest.samples["length"][sample_indices].mean())
        needed = mean * min(2 * config.window, len(sample_indices)) / world_size / 1e9
        if needed > config.remote.cache_gb:
            raise ConfigError(
                f"remote.cache_gb = {config.remote.cache_gb:g} is less than the {needed:.3g} GB that window = "
                f"{config.window} keeps in use on one rank; raise it or lower window"
            )


def _batch(part: Part, views: View, labels: NDArray[np.int64] | None, virtual_readers: int, buffers: Buffers) -> Batch:
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
        virtual_readers=virtual_readers,
    )
