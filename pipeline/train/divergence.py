"""Divergence: which step was the first bad one, equal on all ranks, and which data a rewind leaves out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipeline.train.config import LoopConfig
from pipeline.train.distributed import World, sum_over_ranks
from pipeline.train.recorder import Recorder
from pipeline.train.run import Run
from pipeline.train.saved_state import SavedState

FEWEST = 20  # losses, below which there is no telling what is usual
_NONE = 2**62


@dataclass(frozen=True)
class Anomaly:
    """What the divergence check finds.

    Args:
        reason: What is wrong, for people.
        data_step: The step of the data at which it began.
    """

    reason: str
    data_step: int


def find_anomaly(row: Mapping[str, float], recorder: Recorder, loop: LoopConfig, world: World) -> Anomaly | None:
    """Check a logged row, and name the first bad step among those since the last log line (collective).

    Args:
        row: The logged means, equal on all ranks.
        recorder: This rank's last steps.
        loop: The limits.
        world: The processes.

    Returns:
        The anomaly, equal on all ranks, or None.
    """
    skipped = row["train/skipped_updates"]
    bad = next((f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)), "")
    if not bad and skipped >= loop.max_skipped_steps:
        bad = f"a gradient is not finite ({skipped:.0f} updates were skipped)"
    if bad:
        return Anomaly(bad, _first_bad(recorder, world))
    if loop.spike_mads:
        losses = recorder.losses()
        sum_over_ranks(losses)  # means over the whole batch: with their own losses the ranks could disagree
        losses /= world.size
        if is_spike(row["train/loss"], losses, loop.spike_mads):
            unchecked = recorder.unchecked
            highest = int(losses[-len(unchecked) :].argmax())
            reason = f"the loss {row['train/loss']:.4g} is over {loop.spike_mads:g} deviations above the median"
            return Anomaly(reason, unchecked[highest].data_step)
    return None


def is_spike(loss: float, losses: torch.Tensor, mads: float) -> bool:
    """Return whether a loss is a spike.

    Args:
        loss: The loss in question.
        losses: (steps,) the recorded losses; fewer than FEWEST of them tell nothing.
        mads: Median absolute deviations above the median from which it is one.
    """
    if len(losses) < FEWEST:
        return False
    deviation = (losses - losses.median()).abs().median().clamp(min=1e-8)
    return bool(loss > losses.median() + mads * deviation)


def _first_bad(recorder: Recorder, world: World) -> int:
    """The first data step with a number that is not finite on some rank; the newest data step if there is none."""
    first = torch.tensor(next((r.data_step for r in recorder.unchecked if r.is_bad()), _NONE), device=world.device)
    if world.size > 1:
        dist.all_reduce(first, op=dist.ReduceOp.MIN)
    return recorder.records[-1].data_step if int(first) == _NONE else int(first)


def report(anomaly: Anomaly, run: Run, recorder: Recorder, step: int, rewinds: int) -> None:
    """Write what a person needs to find the cause: the incident, and every rank's last steps."""
    run.incident({"step": step, "reason": anomaly.reason, "data_step": anomaly.data_step, "number": rewinds})
    recorder.dump(run.folder / "report" / f"flight_step_{step:08d}_rank_{run.world.rank:05d}.jsonl")


def advice(anomaly: Anomaly, run: Run, step: int, rewinds: int) -> str:
    """Return the last sentence of a run that gives up after so many rewinds."""
    tried = f" after {rewinds} rewinds" if rewinds else ""
    otherwise = "raise loop.max_rewinds" if rewinds else "set loop.on_divergence=rewind"
    return (
        f"{anomaly.reason} by step {step}{tried}, first at data step {anomaly.data_step}; the last steps are in"
        f" {run.folder / 'report'}, `python -m stages {run.folder.name} --replay {run.folder} {anomaly.data_step}` names the"
        f" module; lower optim.lr, lengthen optim.warmup_steps, or {otherwise}"
    )


def data_step_of(step: int, left_out: Sequence[int]) -> int:
    """Return the step of the data that an optimizer step takes, when the data steps `left_out` are skipped."""
    data_step = step
    for hole in sorted(left_out):
        if hole <= data_step:
            data_step += 1
    return data_step


def next_data_step(state: SavedState) -> int:
    """Return the first data step that a checkpoint of this state has not seen."""
    return data_step_of(state.step, state.loop.left_out)
