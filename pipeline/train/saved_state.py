"""What a checkpoint says about itself: `state.json` and `COMPLETE`, as schemas (torch-free).

A checkpoint whose hashes hold may still contradict itself, after an edit or a bug. The schemas find that before a weight is
restored, and the restart then uses the checkpoint before it.
"""

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.files import read_regular
from pipeline.train.selection import Selection

STATE, COMPLETE = "state.json", "COMPLETE"
SHARDS = re.compile(r"shards_\d{5}\.safetensors")
_FOLDER = re.compile(r"step_\d{8,}")

Count = Annotated[int, Field(ge=0, lt=2**53)]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class LoopRecord(_Record):
    """The loop's own numbers, equal on all ranks.

    Attributes:
        left_out: Data steps that a rewind has closed.
        rewinds: How often the run has rewound.
        fingerprint: Mean magnitude of the outputs on the fingerprint batch.
        hashed: Stamps of the shards whose content has been checked (`shard_check.Stamp`), by SHA-256.
        proven: The newest step that was saved when all shards had been checked.
        selection: What the validations have found, if they are compared.
        ended_early: Whether `loop.patience` has ended the run at this step.
    """

    left_out: list[Count]
    rewinds: Count
    fingerprint: float
    hashed: dict[str, list[int]] = {}
    proven: Count = 0
    selection: Selection = Selection()
    ended_early: bool = False


class SavedState(_Record):
    """The content of `state.json`.

    Attributes:
        step: Optimizer steps that the weights have seen.
        optimizer_step: AdamW's own count of updates.
        task: The Task's small numbers; `misfit` knows their form.
        loop: The loop's numbers.
        inputs: Hashes of the data and the parents, by config key.
    """

    step: Count
    optimizer_step: Annotated[float, Field(ge=0)]
    task: dict[str, Any]
    loop: LoopRecord
    inputs: dict[str, str | None]


def shards_name(rank: int) -> str:
    """Return the name of the file that a rank writes into a checkpoint."""
    return f"shards_{rank:05d}.safetensors"


def read_state(checkpoint: Path) -> SavedState:
    """Read the state of a checkpoint.

    Raises:
        OSError: It is absent or no regular file.
        ValueError: It is damaged.
    """
    return SavedState.model_validate(_object(checkpoint / STATE))


def read_files(checkpoint: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint, as its `COMPLETE` states them.

    Raises:
        OSError: `COMPLETE` is absent or no regular file.
        ValueError: It is damaged, or names anything but the files that a checkpoint has.
    """
    files = _object(checkpoint / COMPLETE)
    if not all(isinstance(digest, str) and (name == STATE or SHARDS.fullmatch(name)) for name, digest in files.items()):
        raise ValueError("it names other files than a checkpoint has")
    if STATE not in files:
        raise ValueError(f"it does not name {STATE}")
    return files


def misfit(state: SavedState, own: dict[str, Any], criteria: Collection[str], steps: int) -> str:
    """Return why a sound state is not one of the run that would continue from it.

    This is the only place that compares a Task's small numbers with the Task: a `load_state_dict` need not check them.

    Args:
        state: What the checkpoint says.
        own: What the Task would save before its first step: a saved state has the same names, lengths and types.
        criteria: The names by which the Task compares validations.
        steps: Optimizer steps of the whole run.

    Returns:
        The first reason; empty if the state fits.
    """
    best, last = state.loop.selection.best, state.loop.selection.last
    if state.step > steps:
        return f"it is of step {state.step}, and the run has {steps}"
    if not all(set(names) == set(criteria) for names in (best, last) if names) or len(best) > len(last):
        return f"its validations are not compared by {', '.join(criteria)}"
    return _other_form(state.task, own, "task")


def _other_form(found: Any, own: Any, place: str) -> str:
    """Say where `found` has other names, lengths or types than `own`, or a number that none can be. Integers count."""
    if type(found) is not type(own):
        return f"{place} is no {type(own).__name__}"
    if isinstance(own, dict):
        if found.keys() != own.keys():
            return f"{place} must have {', '.join(own) or 'nothing'}"
        return next(filter(None, (_other_form(found[name], own[name], f"{place}.{name}") for name in own)), "")
    if isinstance(own, list):
        if len(found) != len(own):
            return f"{place} has {len(found)} values in place of {len(own)}"
        return next(filter(None, (_other_form(found[k], own[k], f"{place}.{k}") for k in range(len(own)))), "")
    sound = math.isfinite(found) if isinstance(own, float) else not isinstance(own, int) or 0 <= found < 2**53
    return "" if sound else f"{place} is {str(found)[:40]}"


def complete(folder: Path) -> list[Path]:
    """Return the complete checkpoints, newest first."""
    found = (p.parent for p in folder.glob(f"step_*/{COMPLETE}") if _FOLDER.fullmatch(p.parent.name))
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Return the optimizer step of a checkpoint by its folder's name."""
    return int(path.name.removeprefix("step_"))


def _object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_regular(path))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values
