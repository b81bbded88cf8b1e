"""Checkpoints, from which this run continues. They are written per parameter, so they know no world size and no ZeRO stage.

checkpoints/step_00000500/
  shards_00000.safetensors   "KIND/NAME@START": elements of the flattened parameter NAME (master, exp_avg, ..., teacher, buffer)
  state.json                 step, the optimizer's count, numbers of the task and the loop (with the fingerprint), hashes
  COMPLETE                   SHA-256 of every file; a folder without it is not a checkpoint

A save is collective. Every rank copies its shards, which is the only stall. A thread of each rank writes them into a
temporary folder. At a later step boundary, when all have finished, rank 0 marks the folder complete and renames it.
"""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import Diverged, EnvironmentProblem, HandoverError, first_line
from pipeline.exports.headers import Claim, read_safetensors_header
from pipeline.files import publish, remove, replace_text, sha256_of
from pipeline.train.distributed import World, any_rank, barrier, from_all, from_main, to_main
from pipeline.train.engine import Engine, full_shape
from pipeline.train.pieces import Piece, Pieces, piece_of
from pipeline.train.run import refuse_other_inputs
from pipeline.train.saved_state import (
    COMPLETE,
    STATE,
    LoopRecord,
    SavedState,
    complete,
    misfit,
    read_files,
    read_state,
    shards_name,
    step_of,
)
from pipeline.train.shardfile import write_shards
from pipeline.train.task import Task
from pipeline.train.training import Training

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of one run; keeps the newest `loop.keep_checkpoints`, and those of `loop.keep_every` for ever.

    Args:
        folder: The folder `checkpoints` of the run.
        training: What is saved.
    """

    def __init__(self, folder: Path, training: Training) -> None:
        self.folder, self.training = folder, training
        self.engine, self.task, self.loop = training.engine, training.task, training.loop
        self._writing: _Writing | None = None

    def save(self, step: int, loop: LoopRecord) -> None:
        """Begin a save, after the previous one has ended (collective).

        Args:
            step: Optimizer steps that the weights have seen.
            loop: The loop's own numbers, equal on all ranks.

        Raises:
            Diverged: If a value is not finite.
            EnvironmentProblem: If the folder cannot be written.
        """
        self.finish()
        world = self.engine.world
        temporary = self.folder / f".step_{step:08d}.tmp"
        tensors = {} if self.engine.replicated and not world.is_main else _shards(self.engine, self.task)
        bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), "")
        problem = "" if not world.is_main else _make_empty(temporary)
        if any_rank(bool(bad), world):
            raise Diverged(
                f"step {step} is not saved: {bad or 'a shard of another rank'} is not finite; earlier checkpoints are kept"
            )
        if any_rank(bool(problem), world):
            raise EnvironmentProblem(f"no checkpoint can be written: {problem or 'rank 0 cannot make its folder'}")
        state = SavedState(
            step=step,
            optimizer_step=self.engine.optimizer_step(),
            task=self.task.state_dict(),
            loop=loop,
            inputs=dict(self.training.inputs),
        )
        self._writing = _Writing(temporary, self.folder / f"step_{step:08d}", world.rank, tensors, state)
        self._writing.start()
        if not self.loop.background_save:
            self.finish()

    def finish(self, wait: bool = True) -> None:
        """Complete a save whose writing has ended on all ranks (collective).

        Args:
            wait: Whether to wait until it has ended; otherwise an unfinished save is left for the next call.

        Raises:
            EnvironmentProblem: If a rank could not write; earlier checkpoints are kept.
        """
        writing, world = self._writing, self.engine.world
        if writing is None:
            return
        if wait:
            writing.join()
        if any_rank(writing.is_alive(), world):
            return
        self._writing = None
        if any_rank(bool(writing.problem), world):
            if world.is_main:
                shutil.rmtree(writing.temporary, ignore_errors=True)
            raise EnvironmentProblem(
                f"checkpoint {writing.final.name} could not be written: {writing.problem or 'another rank failed'};"
                " free space and start again: earlier checkpoints are kept"
            )
        digests = to_main(writing.digests, world)
        if world.is_main:
            _complete(writing, {name: digest for files in digests for name, digest in files.items()})
            for old in complete(self.folder)[self.loop.keep_checkpoints :]:
                if not self.loop.keep_every or step_of(old) % self.loop.keep_every:
                    shutil.rmtree(old, ignore_errors=True)
        barrier(world)


class _Writing(Thread):
    """The thread that writes the shards of one rank for one save."""

    def __init__(self, temporary: Path, final: Path, rank: int, tensors: dict[str, Tensor], state: SavedState) -> None:
        super().__init__(daemon=True)
        self.temporary, self.final, self.rank, self.tensors, self.state = temporary, final, rank, tensors, state
        self.digests: dict[str, str] = {}
        self.problem = ""

    def run(self) -> None:
        """Write the files, and keep their hashes or the reason why they could not be written."""
        try:
            if self.tensors:
                path = self.temporary / shards_name(self.rank)
                self.digests[path.name] = write_shards(path, self.tensors)
            if self.rank == 0:
                path = self.temporary / STATE
                self.digests[path.name] = replace_text(path, json.dumps(self.state.model_dump(), indent=1))
        except OSError as error:
            self.problem = f"{error.strerror} ({path})"
        except Exception as error:  # a thread cannot raise to the training; `finish` does
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            self.tensors = {}


def restore(
    folder: Path,
    training: Training,
    *,
    accept: Callable[[SavedState], bool] = lambda state: True,
    set_aside: bool = True,
) -> SavedState | None:
    """Continue from the newest sound checkpoint whose state is accepted, and skip damaged ones (collective).

    The ranks share the work of hashing and all use the list of rank 0, so they cannot disagree. Beside its share a rank opens
    only the files that hold what it owns (`pieces.py`).

    Args:
        folder: The folder `checkpoints` of the run.
        training: What is restored, in place.
        accept: Decides by the saved state whether a checkpoint will do.
        set_aside: Whether damaged ones are renamed, so that they do not count among those that are kept.

    Returns:
        What the checkpoint says; None if there is none.

    Raises:
        DataError: If the run trains on another dataset or split.
        HandoverError: If the run has other parents, or the checkpoint is sound but does not fit this model or stage.
    """
    engine, task, world = training.engine, training.task, training.engine.world
    for path in from_main(complete(folder) if world.is_main else [], world):
        files, damage = from_main(_files_of(path) if world.is_main else ({}, ""), world)
        own: list[Piece] = []
        if not damage:
            own, damage = _inspect(path, files, world)
        if any_rank(bool(damage), world):
            logger.warning(
                "%s is damaged (%s); the previous checkpoint is tried", path, damage or "found by another rank"
            )
            if world.is_main and set_aside:
                _set_aside(path)
            continue
        state = from_main(read_state(path) if world.is_main else None, world)
        assert state is not None
        refuse_other_inputs(folder.parent, state.inputs, training.inputs)
        if not accept(state):
            continue
        if problem := misfit(state, task.state_dict(), task.criteria(), training.loop.steps):
            raise HandoverError(
                f"{path / STATE} does not hold the numbers of this run ({problem}); remove that checkpoint, and the one before"
                " it is used"
            )
        pieces = Pieces(path, itertools.chain.from_iterable(from_all(own, world)))
        kinds, buffers = task.sharded_state(), _buffers(engine, task)
        for name, parameter in engine.named_parameters:  # on all ranks, so that none waits for one that has failed
            for kind in ("master", *(engine.moments[name] if state.optimizer_step else ()), *kinds):
                pieces.holding(kind, name, 0, full_shape(parameter).numel())
        for name, buffer in buffers.items():
            pieces.holding("buffer", name, 0, buffer.numel())
        engine.restore(pieces.read, state.optimizer_step, kinds)
        _restore_buffers(buffers, pieces, world)
        task.load_state_dict(state.task)
        logger.info("resumed from %s", path)
        return state
    return None


def _restore_buffers(buffers: Mapping[str, Tensor], pieces: Pieces, world: World) -> None:
    """Fill the whole tensors beside the weights: rank 0 reads them for all (collective)."""
    sizes = [buffer.numel() for buffer in buffers.values()]
    flat = torch.empty(sum(sizes), device=world.device)
    if world.is_main and sizes:
        flat.copy_(torch.cat([pieces.read("buffer", name, 0, size) for name, size in zip(buffers, sizes, strict=True)]))
    if world.size > 1 and sizes:
        dist.broadcast(flat, src=0)
    for buffer, values in zip(buffers.values(), flat.split(sizes), strict=True):
        buffer.copy_(values.view_as(buffer))


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, beside those of the same step that were set aside before."""
    names = (f"damaged_{path.name}{f'_{k}' if k else ''}" for k in itertools.count())
    os.rename(path, next(other for name in names if not (other := path.with_name(name)).exists()))


def remove_after(folder: Path, step: int, world: World) -> None:
    """Remove the checkpoints of later steps, so that no restart continues from them (collective)."""
    if world.is_main:
        for path in complete(folder):
            if step_of(path) > step:
                (path / COMPLETE).unlink()  # first, so that half a removal leaves nothing to resume from
                shutil.rmtree(path, ignore_errors=True)
    barrier(world)


def _buffers(engine: Engine, task: Task) -> dict[str, Tensor]:
    """Whole tensors beside the weights, saved by rank 0 for all; as fp32, which holds counters up to 16 million steps."""
    return engine.buffers() | {f"task.{name}": value for name, value in task.buffers().items()}


def _shards(engine: Engine, task: Task) -> dict[str, Tensor]:
    """Copies of all that this rank owns, so that training can continue while they are written."""
    moments = engine.base_optimizer.state
    extra = task.sharded_state()
    tensors = {}
    for shard in engine.shards:
        kinds = {"master": shard.flat}
        known = moments.get(shard.flat, {})
        kinds.update({k: known[k] for k in engine.moments[shard.name] if known.get(k) is not None})
        kinds.update({kind: by_flat[shard.flat] for kind, by_flat in extra.items()})
        for kind, tensor in kinds.items():
            tensors[f"{kind}/{shard.name}@{shard.start}"] = shard.of(tensor).to("cpu", copy=True)
    if engine.world.is_main:  # each rank has running statistics; those of rank 0 are saved, as they are exported
        own = _buffers(engine, task)
        tensors |= {f"buffer/{name}@0": b.flatten().float().to("cpu", copy=True) for name, b in own.items()}
    return tensors


def _complete(writing: _Writing, files: dict[str, str]) -> None:
    replace_text(writing.temporary / COMPLETE, json.dumps(files, indent=1))
    publish(writing.temporary, writing.final)


def _make_empty(folder: Path) -> str:
    try:
        for leftover in folder.parent.glob(".step_*.tmp"):
            remove(leftover)
        folder.mkdir(parents=True)
    except OSError as error:
        return f"{error.strerror} ({folder})"
    return ""


def _files_of(path: Path) -> tuple[dict[str, str], str]:
    """Return the hashes of a checkpoint's files, and why they cannot be read, or an empty string."""
    try:
        return read_files(path), ""
    except (OSError, ValueError) as error:
        return {}, f"{COMPLETE} cannot be read: {first_line(error)}"


def _inspect(path: Path, files: Mapping[str, str], world: World) -> tuple[list[Piece], str]:
    """Check this rank's share of the files of a checkpoint.

    Returns:
        What they hold, and what is wrong with them, or an empty string.
    """
    pieces: list[Piece] = []
    for name, digest in sorted(files.items())[world.rank :: world.size]:
        if not (path / name).is_file():
            return [], f"{name} is missing"
        try:
            if sha256_of(path / name) != digest:
                return [], f"{name} has other bytes than were written"
            pieces += _content(path / name)
        except (OSError, ValueError, HandoverError) as error:
            return [], f"{name} cannot be read: {first_line(error)}"
    return pieces, ""


def _content(file: Path) -> list[Piece]:
    """Return what a file holds whose hash is right; ValueError or HandoverError if it contradicts itself."""
    if file.name == STATE:
        if read_state(file.parent).step != step_of(file.parent):
            raise ValueError("it is of another step")
        return []
    pieces = []
    for key, claim in read_safetensors_header(file, whole=False).items():
        if len(claim.shape) != 1 or claim != Claim("F32", claim.shape):
            raise ValueError(f"{key[:60]!r} is no flat tensor of fp32")
        pieces.append(piece_of(key, claim.shape[0], file.name))
    return pieces
