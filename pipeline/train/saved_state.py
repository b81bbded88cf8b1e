"""What a checkpoint says about itself: `state.json` and `COMPLETE`, as schemas (torch-free).

A checkpoint whose hashes hold may still contradict itself, after an edit or a bug. The schemas find that before a weight is
restored, and the restart then uses the checkpoint before it.
"""

import json
import re
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
        task: The Task's small numbers.
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
