"""Checkpoints: what continues this run. Written per parameter, so they know neither a world size nor a ZeRO stage.

checkpoints/step_00000500/
  shards_00000.safetensors   "KIND/NAME@START": elements of the flattened parameter NAME (master, exp_avg, ..., teacher, buffer)
  state.json                 step, AdamW's count, the task's and the loop's numbers, the probe's answer, a fingerprint
  COMPLETE                   sha256 of every file; a folder without it does not exist for anyone

A save is collective. Every rank copies its shards (the only stall), a thread of its own writes them into a temporary
folder, and at a later step boundary, when all have finished, rank 0 marks the folder complete and renames it.
"""

import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from pipeline.errors import Diverged, EnvironmentProblem, HandoverError
from pipeline.files import publish, replace_text, sha256_of
from pipeline.train.distributed import World, any_rank
from pipeline.train.engine import Engine
from pipeline.train.shardfile import write_shards
from pipeline.train.task import Task

logger = logging.getLogger(__name__)


class Saver:
    """Writes the checkpoints of one run: the newest `keep`, and every `keep_every`-th step for ever."""

    def __init__(
        self,
        folder: Path,
        *,
        engine: Engine,
        task: Task,
        fingerprint: str,
        keep: int,
        keep_every: int | None,
        background: bool,
    ) -> None:
        self.folder, self.engine, self.task, self.fingerprint = folder, engine, task, fingerprint
        self.keep, self.keep_every, self.background = keep, keep_every, background
        self._writing: _Writing | None = None

    def save(self, step: int, loop_state: dict[str, Any]) -> None:
        """Begin a save, after the one before has ended (collective). Raises Diverged for a value that is not finite."""
        self.finish()
        world = self.engine.world
        temporary = self.folder / f".step_{step:08d}.tmp"
        tensors = {} if self.engine.replicated and not world.is_main else _shards(self.engine, self.task)
        bad = next((name for name, value in tensors.items() if not torch.isfinite(value).all()), "")
        problem = "" if not world.is_main else _make_empty(temporary)
        if any_rank(bool(bad), world):
            raise Diverged(
                f"step {step} is not saved: {bad or 'a shard of another rank'} is not finite; the checkpoints before it stand"
            )
        if any_rank(bool(problem), world):
            raise EnvironmentProblem(f"no checkpoint can be written: {problem or 'rank 0 cannot make its folder'}")
        state = {
            "step": step,
            "optimizer_step": self.engine.optimizer_step(),
            "task": self.task.state_dict(),
            "loop": loop_state,
            "fingerprint": self.fingerprint,
        }
        self._writing = _Writing(temporary, self.folder / f"step_{step:08d}", world.rank, tensors, state)
        self._writing.start()
        if not self.background:
            self.finish()

    def finish(self, wait: bool = True) -> None:
        """Complete a save whose writing has ended on all ranks, waiting for it if asked (collective).

        Raises EnvironmentProblem where a rank could not write; the checkpoints before it stand.
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
                " make room and start again: the checkpoints before it stand"
            )
        digests: list[dict[str, str]] = [writing.digests]
        if world.size > 1:
            digests = [{} for _ in range(world.size)]
            dist.all_gather_object(digests, writing.digests)
        if world.is_main:
            _complete(writing, {name: digest for part in digests for name, digest in part.items()})
            for old in complete(self.folder)[self.keep :]:
                if not self.keep_every or step_of(old) % self.keep_every:
                    shutil.rmtree(old, ignore_errors=True)
        any_rank(False, world)  # nobody goes on before the folder is there


class _Writing(Thread):
    """One rank's part of one save."""

    def __init__(
        self, temporary: Path, final: Path, rank: int, tensors: dict[str, Tensor], state: dict[str, Any]
    ) -> None:
        super().__init__(daemon=True)
        self.temporary, self.final, self.rank, self.tensors, self.state = temporary, final, rank, tensors, state
        self.digests: dict[str, str] = {}
        self.problem = ""

    def run(self) -> None:
        try:
            if self.tensors:
                path = self.temporary / f"shards_{self.rank:05d}.safetensors"
                self.digests[path.name] = write_shards(path, self.tensors)
            if self.rank == 0:
                path = self.temporary / "state.json"
                self.digests[path.name] = replace_text(path, json.dumps(self.state, indent=1))
        except OSError as error:
            self.problem = f"{error.strerror} ({path})"
        except Exception as error:  # whatever it is, what it left is no checkpoint
            self.problem = f"{type(error).__name__}: {error}"
        finally:
            self.tensors = {}


def restore(
    folder: Path,
    *,
    engine: Engine,
    task: Task,
    fingerprint: str,
    accept: Callable[[dict[str, Any]], bool] = lambda state: True,
    set_aside: bool = True,
) -> tuple[int, dict[str, Any]]:
    """Continue from the newest sound checkpoint whose state is accepted, walking back over damaged ones (collective).

    Returns its step and the loop's numbers; (0, {}) if there is none. The ranks share the reading of hashes and go by
    the list of rank 0, so they cannot disagree. Damaged ones are set aside under another name, lest they count among
    those that are kept.
    """
    world = engine.world
    found: list[list[Path]] = [complete(folder)]
    if world.size > 1:
        dist.broadcast_object_list(found, src=0)
    for path in found[0]:
        damage = _damage(path, world.rank, world.size)
        if any_rank(bool(damage), world):
            logger.warning("%s is damaged (%s); going back to the one before", path, damage or "seen by another rank")
            if world.is_main and set_aside:
                os.rename(path, path.with_name(f"damaged_{path.name}"))
            continue
        state = json.loads((path / "state.json").read_text())
        if state["fingerprint"] != fingerprint:
            raise HandoverError(
                f"{path} was written by a run on other data or another split;"
                f" choose another run.experiment, or remove {folder.parent}"
            )
        if not accept(state):
            continue
        kinds, read = task.sharded_state(), _reader(path)
        engine.restore(read, state["optimizer_step"], kinds)
        for name, buffer in _buffers(engine, task).items():
            buffer.copy_(read("buffer", name, 0, buffer.numel()).view_as(buffer))
        task.load_state_dict(state["task"], engine)
        logger.info("resumed from %s", path)
        return int(state["step"]), state["loop"]
    return 0, {}


def remove_after(folder: Path, step: int, world: World) -> None:
    """Remove the checkpoints of later steps: no restart may continue from them (collective)."""
    if world.is_main:
        for path in complete(folder):
            if step_of(path) > step:
                (path / "COMPLETE").unlink()  # first, so that half a removal leaves nothing to resume from
                shutil.rmtree(path, ignore_errors=True)
    any_rank(False, world)  # nobody goes on before they are gone


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((p.parent for p in folder.glob("step_*/COMPLETE")), reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _buffers(engine: Engine, task: Task) -> dict[str, Tensor]:
    """Whole tensors beside the weights, which rank 0 saves for all: counters fit fp32 up to 16 million steps."""
    return engine.buffers() | {f"task.{name}": value for name, value in task.buffers().items()}


def _shards(engine: Engine, task: Task) -> dict[str, Tensor]:
    """Copies of all that this rank owns: training goes on while they are written."""
    moments = engine.base_optimizer.state
    extra = task.sharded_state()
    tensors = {}
    for shard in engine.shards:
        kinds = {"master": shard.flat}
        kinds.update({k: moments[shard.flat][k] for k in ("exp_avg", "exp_avg_sq") if k in moments.get(shard.flat, {})})
        kinds.update({kind: by_flat[shard.flat] for kind, by_flat in extra.items()})
        for kind, tensor in kinds.items():
            tensors[f"{kind}/{shard.name}@{shard.start}"] = shard.of(tensor).to("cpu", copy=True)
    if engine.world.is_main:  # every rank has its own running statistics; those of rank 0 go on, as they are exported
        own = _buffers(engine, task)
        tensors |= {f"buffer/{name}@0": b.flatten().float().to("cpu", copy=True) for name, b in own.items()}
    return tensors


def _complete(writing: _Writing, files: dict[str, str]) -> None:
    replace_text(writing.temporary / "COMPLETE", json.dumps(files, indent=1))
    publish(writing.temporary, writing.final)


def _make_empty(folder: Path) -> str:
    try:
        for leftover in folder.parent.glob(".step_*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        return f"{error.strerror} ({folder})"
    return ""


def _reader(path: Path) -> Callable[[str, str, int, int], Tensor]:
    """Elements of a saved parameter, whichever ranks' files hold them."""
    files = [safe_open(file, framework="pt") for file in sorted(path.glob("shards_*.safetensors"))]
    pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)
    for file in files:
        for key in file.keys():  # noqa: SIM118 - a safe_open file is no mapping
            kind, _, rest = key.partition("/")
            name, _, start = rest.rpartition("@")
            pieces[kind, name].append((int(start), file.get_slice(key).get_shape()[0], file, key))

    def read(kind: str, name: str, start: int, numel: int) -> Tensor:
        out = torch.empty(numel)
        found = 0
        for begin, length, file, key in pieces[kind, name]:
            low, high = max(begin, start), min(begin + length, start + numel)
            if low < high:
                out[low - start : high - start] = file.get_slice(key)[low - begin : high - begin]
                found += high - low
        if found != numel:
            raise HandoverError(f"{path} lacks {numel - found} of {numel} elements of {kind} of {name}")
        return out

    return read


def _damage(path: Path, rank: int, world_size: int) -> str:
    """What is wrong with this rank's share of the files of a checkpoint, or nothing."""
    try:
        files = json.loads((path / "COMPLETE").read_text())
        share = sorted(files.items())[rank::world_size]
    except (OSError, ValueError, AttributeError):
        return "COMPLETE cannot be read"
    for name, digest in share:
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != digest:
            return f"{name} has other bytes than were written"
    return "" if "state.json" in files else "COMPLETE does not name state.json"
