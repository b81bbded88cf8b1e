"""When training leaves the road: which step it was, seen alike by all ranks, and what data is not to be seen again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from pipeline.train.config import LoopConfig
from pipeline.train.distributed import World
from pipeline.train.recorder import Recorder
from pipeline.train.run import Run

FEWEST = 20  # losses that tell what is usual
_NONE = 2**62


@dataclass(frozen=True)
class Anomaly:
    """`data_step`: the place in the data of the first bad step."""

    reason: str
    data_step: int


def find_anomaly(row: Mapping[str, float], recorder: Recorder, loop: LoopConfig, world: World) -> Anomaly | None:
    """Evaluator a logged row, equal on all ranks, and name the bad step among those since the last log line (collective)."""
    skipped = row["train/skipped_updates"]
    bad = next((f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)), "")
    if not bad and skipped >= loop.max_skipped_steps:
        bad = f"a gradient is not finite ({skipped:.0f} updates were skipped)"
    if bad:
        return Anomaly(bad, _first_bad(recorder, world))
    if loop.spike_mads:
        losses = recorder.losses()
        if world.size > 1:  # of the whole batch: the ranks' own would let them disagree
            dist.all_reduce(losses)
            losses /= world.size
        if is_spike(row["train/loss"], losses, loop.spike_mads):
            unchecked = recorder.unchecked
            highest = int(losses[-len(unchecked) :].argmax())
            reason = f"the loss {row['train/loss']:.4g} lies over {loop.spike_mads:g} deviations above those before"
            return Anomaly(reason, unchecked[highest].data_step)
    return None


def is_spike(loss: float, losses: torch.Tensor, mads: float) -> bool:
    """Whether `loss` lies that many median absolute deviations above the median of `losses` (steps,)."""
    if len(losses) < FEWEST:
        return False
    deviation = (losses - losses.median()).abs().median().clamp(min=1e-8)
    return bool(loss > losses.median() + mads * deviation)


def _first_bad(recorder: Recorder, world: World) -> int:
    """Position of the first step with a number that is not finite on some rank; if none saw one, of the newest step."""
    first = torch.tensor(next((r.data_step for r in recorder.unchecked if r.is_bad()), _NONE), device=world.device)
    if world.size > 1:
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return recorder.records[-1].data_step if int(first) == _NONE else int(first)


def report(anomaly: Anomaly, run: Run, recorder: Recorder, step: int, rewinds: int) -> None:
    """Leave behind what a person needs: the incident, and every rank's last steps."""
    run.incident({"step": step, "reason": anomaly.reason, "data_step": anomaly.data_step, "number": rewinds})
    recorder.dump(run.folder / "report" / f"flight_step_{step:08d}_rank_{run.world.rank:05d}.jsonl")


def advice(anomaly: Anomaly, run: Run, step: int, rewinds: int) -> str:
    """The last sentence of a run that has given up after so many rewinds."""
    tried = f" after {rewinds} rewinds" if rewinds else ""
    return (
        f"{anomaly.reason} by step {step}{tried}, first at data_step {anomaly.data_step} of the data; the last steps are in"
        f" {run.folder / 'report'}, `python -m stages {run.folder.name} --replay {run.folder} {anomaly.data_step}` names the"
        " module; lower optim.lr, lengthen optim.warmup_steps, or set loop.on_divergence=rewind"
    )


def data_step_of(step: int, left_out: Sequence[int]) -> int:
    """Place in the data of an optimizer step, when the places `left_out` are passed over."""
    data_step = step
    for hole in sorted(left_out):
        if hole <= data_step:
            data_step += 1
    return data_step


def next_data_step(state: Mapping[str, Any]) -> int:
    """Place in the data of the first step that a checkpoint of this state has not seen."""
    return data_step_of(state["step"], state["loop"]["left_out"])
