"""When training leaves the road: which step it was, seen alike by all ranks, and what data is not to be seen again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.train.config import LoopConfig
from pipeline.train.distributed import World
from pipeline.train.recorder import Recorder

_NONE = 2**62


@dataclass(frozen=True)
class Trouble:
    """`position`: the place in the data of the first bad step."""

    reason: str
    position: int


def find_trouble(
    row: Mapping[str, float], recorder: Recorder, loop: LoopConfig, skipped_updates: int, world: World
) -> Trouble | None:
    """Judge a logged row, equal on all ranks; where it is bad, ask every rank's recorder for the first bad step (collective)."""
    bad = next((f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)), "")
    if not bad and skipped_updates >= loop.max_skipped_steps:
        bad = f"the engine skipped {skipped_updates} updates in a row"
    if bad:
        record = recorder.first_bad()
        mine = record.position if record else _NONE
    elif loop.spike_mads and recorder.is_spike(row["train/loss"], loop.spike_mads):
        bad = f"the loss {row['train/loss']:.4g} lies over {loop.spike_mads:g} deviations above those before"
        mine = max(recorder.records, key=lambda r: (float(r.loss), -r.position)).position
    else:
        return None
    first = torch.tensor(mine, device=world.device)
    if world.size > 1:
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    newest = recorder.records[-1].position
    return Trouble(bad, newest if int(first) == _NONE else int(first))


def position_of(step: int, left_out: Sequence[int]) -> int:
    """Place in the data of an optimizer step, when the places `left_out` are passed over."""
    position = step
    for hole in sorted(left_out):
        if hole <= position:
            position += 1
    return position
