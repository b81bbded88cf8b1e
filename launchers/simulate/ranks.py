"""What each of many ranks would do at a start: its samples, its files, what it opens and reads."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launchers.plan.cost import FP32, Parameter, cuts
from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, PipelineError
from pipeline.streaming.order import Order, cut_blocks, readers_of_rank
from pipeline.train.pieces import Piece, Pieces
from pipeline.train.saved_state import STATE, shards_name
from stages import spec_of
from stages.check import check_readers, derive_batches, open_data
from stages.configs.base import StageConfig
from stages.spec import Stream, Subsets

# Where the data is absent: the size of ImageNet, in blocks of 2 MB.
IMAGES, CLASSES, BLOCK = 1_281_167, 1000, 20


@dataclass(frozen=True)
class Data:
    """The streams of a stage, and how their samples lie on the disk.

    Attributes:
        streams: By name, the first stream first.
        classes: Number of classes.
        manifest: None where the dataset is absent and a stand-in of ImageNet's size takes its place.
    """

    streams: dict[str, Stream]
    classes: int
    manifest: Manifest | None


def data_of(config: StageConfig) -> Data:
    """Open the data of a stage, or take a stand-in where it is absent."""
    try:
        data = open_data(config)
    except PipelineError:
        everything = np.arange(IMAGES)
        return Data(spec_of(config).streams(config, Subsets(everything, everything, everything[:0])), CLASSES, None)
    return Data(spec_of(config).streams(config, data.subsets), len(data.manifest.classes), data.manifest)


class Orders:
    """The orders of a stage's streams. Each is a pure function, so all ranks together must serve the same global batches.

    Args:
        config: The stage's config.
        data: Its streams.
    """

    def __init__(self, config: StageConfig, data: Data) -> None:
        self.readers = config.virtual_readers(len(stream.sample_indices) for stream in data.streams.values())
        self._orders = []
        for stream in data.streams.values():
            indices = np.sort(stream.sample_indices)
            if data.manifest is None:
                blocks = np.append(np.arange(0, len(indices), BLOCK), len(indices))
            else:
                blocks, _ = cut_blocks(data.manifest, indices, self.readers)
            self._orders.append(
                Order(
                    indices,
                    blocks,
                    global_batch=stream.global_batch,
                    virtual_readers=self.readers,
                    window=config.data.loader.window,
                    seed=config.run.seed,
                )
            )

    def served(self, world_size: int) -> str:
        """Hash what all ranks serve, end to end: the first batch, one that straddles two epochs, and one after it."""
        digest = hashlib.sha256()
        for order in self._orders:
            last = order.epoch_size // order.global_batch
            for step in (0, last, last + 1):
                for rank in range(world_size):
                    digest.update(order.step(step, readers_of_rank(self.readers, rank, world_size)).tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Restore:
    """A restart from a checkpoint.

    Attributes:
        files: Files of the checkpoint, over all ranks.
        opens: Files of the checkpoint that a rank opens, the most of any.
        opens_of_all: Those of all ranks together.
        bytes: Bytes that a rank reads from it, hashing included, the most of any.
    """

    files: int
    opens: int
    opens_of_all: int
    bytes: int


def restore(parameters: Sequence[Parameter], kinds: int, zero_stage: int, saved_by: int, world_size: int) -> Restore:
    """Find out who opens and reads what, by the same index as a real restore.

    Args:
        parameters: The trained parameters.
        kinds: Tensors that are saved of each beside its moments: the masters and the averages. They are all cut alike.
        zero_stage: Of both runs.
        saved_by: The number of ranks that wrote the checkpoint.
        world_size: The number of ranks that read it.
    """
    written = cuts(parameters, zero_stage, saved_by)
    pieces = Pieces(Path("step"), [Piece("master", c.name, c.start, c.numel, shards_name(c.rank)) for c in written])
    bytes_of = {p.name: FP32 * (kinds + len(p.moments)) for p in parameters}
    sizes: dict[str, int] = {STATE: 0}
    for cut in written:
        sizes[shards_name(cut.rank)] = sizes.get(shards_name(cut.rank), 0) + bytes_of[cut.name] * cut.numel
    names = sorted(sizes)
    opened = [set(names[rank::world_size]) for rank in range(world_size)]
    read = [sum(sizes[name] for name in found) for found in opened]
    for cut in cuts(parameters, zero_stage, world_size):
        for piece, low, high in pieces.holding("master", cut.name, cut.start, cut.numel):
            opened[cut.rank].add(piece.file)
            read[cut.rank] += bytes_of[cut.name] * (high - low)
    return Restore(len(names), max(map(len, opened)), sum(map(len, opened)), max(read))


def why_not(config: StageConfig, data: Data, world_size: int) -> str:
    """Say why a stage cannot run on that many ranks; empty if it can."""
    try:
        derive_batches(config.loop.global_batch, world_size, config.engine.micro_batch)
        check_readers(config, data.streams, world_size)
    except ConfigError as error:
        return str(error)
    return ""


def grows(worlds: Mapping[int, Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """List what a rank does more of in a larger world than in the smallest one."""
    first, *more = worlds.values()
    return [key for key in keys if any(world[key] > first[key] for world in more)]
