"""Checkpoints: what continues this run. Written per parameter, so they know neither a world size nor a ZeRO stage.

checkpoints/step_00000500/
  shards_00000.safetensors   "KIND/NAME@START": elements of the flattened parameter NAME (master, exp_avg, ..., teacher)
  state.json                 step, AdamW's count, the task's numbers, a fingerprint of config and data
  COMPLETE                   sha256 of every file; a folder without it does not exist for anyone

A save is collective: every rank writes its shards into a temporary folder, then rank 0 marks it complete and renames.
"""

import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.errors import Diverged, HandoverError
from pipeline.models.card import sha256_of
from pipeline.train.engine import Engine
from pipeline.train.task import Task

logger = logging.getLogger(__name__)


def save(folder: Path, *, step: int, engine: Engine, task: Task, fingerprint: str, keep: int) -> Path:
    """Write `folder`/step_N whole or not at all (collective); keep the newest `keep`. Refuses what is not finite."""
    final = folder / f"step_{step:08d}"
    temporary = folder / f".step_{step:08d}.tmp"
    world = engine.world
    if world.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _barrier(world.size)
    digests: list[dict[str, str] | None] = [None] * world.size
    digest: dict[str, str] = {}
    tensors = {} if engine.replicated and not world.is_main else _shards(engine, task)
    bad = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    if tensors and not bad:
        path = temporary / f"shards_{world.rank:05d}.safetensors"
        save_file(tensors, path)
        _fsync(path)
        digest[path.name] = sha256_of(path)
    if world.size > 1:
        dist.all_gather_object(digests, digest if not bad else {"": bad[0]})
    else:
        digests = [digest if not bad else {"": bad[0]}]
    files = {name: value for part in digests if part for name, value in part.items()}
    if "" in files:
        raise Diverged(f"step {step} is not saved: {files['']} is not finite; the checkpoints before it stand")
    if world.is_main:
        state = {
            "step": step,
            "optimizer_step": engine.optimizer_step(),
            "task": task.state_dict(),
            "fingerprint": fingerprint,
        }
        files["state.json"] = _write(temporary / "state.json", json.dumps(state, indent=1))
        _write(temporary / "COMPLETE", json.dumps(files, indent=1))
        _fsync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(temporary, final)
        _fsync(folder)
        for old in complete(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier(world.size)
    return final


def restore(folder: Path, *, engine: Engine, task: Task, fingerprint: str) -> int:
    """Continue from the newest sound checkpoint, walking back over damaged ones; returns its step, 0 if there is none."""
    for path in complete(folder):
        damage = _damage(path)
        if damage:
            logger.warning("%s is damaged (%s); going back to the one before", path, damage)
            continue
        state = json.loads((path / "state.json").read_text())
        if state["fingerprint"] != fingerprint:
            raise HandoverError(
                f"{path} was written by a run with another config or other data;"
                f" choose another run.experiment, or remove {folder.parent}"
            )
        kinds = task.sharded_state()
        engine.restore(_reader(path), state["optimizer_step"], kinds)
        task.load_state_dict(state["task"], engine)
        logger.info("resumed from %s", path)
        return int(state["step"])
    return 0


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((p.parent for p in folder.glob("step_*/COMPLETE")), reverse=True)


def _shards(engine: Engine, task: Task) -> dict[str, Tensor]:
    moments = engine.base_optimizer.state
    tensors = {}
    for shard in engine.shards:
        kinds = {"master": shard.flat}
        kinds.update({k: moments[shard.flat][k] for k in ("exp_avg", "exp_avg_sq") if k in moments.get(shard.flat, {})})
        kinds.update({kind: by_flat[shard.flat] for kind, by_flat in task.sharded_state().items()})
        for kind, tensor in kinds.items():
            tensors[f"{kind}/{shard.name}@{shard.start}"] = shard.of(tensor).cpu().clone()
    return tensors


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


def _damage(path: Path) -> str:
    """What is wrong with a checkpoint, or nothing."""
    try:
        files = json.loads((path / "COMPLETE").read_text())
    except (OSError, ValueError):
        return "COMPLETE cannot be read"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256_of(path / name) != digest:
            return f"{name} has other bytes than were written"
    return ""


def _write(path: Path, text: str) -> str:
    path.write_text(text)
    _fsync(path)
    return sha256_of(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()
