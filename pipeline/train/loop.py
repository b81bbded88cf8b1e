"""The training loop, the only one. Read it from top to bottom: batch, loss, backward, step, teacher, log, evaluate, save.

Everything that could be state is a function of the step instead: the learning rate, the order of the data, the
randomness. So resuming is restoring the weights and seeking the loaders.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from pipeline.errors import Diverged, HandoverError, Interrupted
from pipeline.report.tensorboard import Board
from pipeline.streaming.loader import Batch, Loader
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Saver
from pipeline.train.config import LoopConfig
from pipeline.train.distributed import any_rank
from pipeline.train.divergence import advice, data_step_of, find_anomaly, next_data_step, report
from pipeline.train.engine import Engine
from pipeline.train.meter import Meter
from pipeline.train.peak import peak_flops
from pipeline.train.progress import Progress
from pipeline.train.recorder import Recorder
from pipeline.train.run import Run
from pipeline.train.schedules import Schedule
from pipeline.train.signals import stop_flag
from pipeline.train.task import Mean, Task
from pipeline.train.tracer import Tracer

logger = logging.getLogger(__name__)

# (step, board) -> numbers for the log; called by all ranks at the same steps.
Evaluate = Callable[[int, Board], dict[str, float]]

PROBE_TOLERANCE = 1e-3  # relative; another world size or ZeRO stage sums in another order


def fit(
    task: Task,
    engine: Engine,
    streams: Mapping[str, Loader],
    run: Run,
    *,
    loop: LoopConfig,
    lr_at: Schedule,
    accumulation: int,
    fingerprint: str,
    seed: int,
    evaluate: Evaluate,
    recorder: Recorder,
    fingerprint_images: torch.Tensor,
    flops: float,
) -> None:
    """Train for `loop.steps` optimizer steps, continuing from the run's newest sound checkpoint.

    `lr_at` gives the learning rate of a step; `streams` yield this rank's samples of each step; `accumulation` cuts them
    into equal micro-batches; `flops` is what a step must compute, over all ranks (for MFU: nothing counts twice).
    Raises Interrupted (everything saved) after a signal or the time limit, and Diverged for numbers that are not finite
    or leap, once its rewinds are used up.
    """
    world, deadline = engine.world, time.monotonic() + 60 * (loop.time_limit_minutes or math.inf)
    saver = Saver(
        run.checkpoints,
        engine=engine,
        task=task,
        fingerprint=fingerprint,
        keep=loop.keep_checkpoints,
        keep_every=loop.keep_every,
        background=loop.background_save,
    )
    left_out: list[int] = []  # places in the data that a rewind has closed
    rewinds = 0

    def save() -> None:
        saver.save(
            step, {"left_out": left_out, "rewinds": rewinds, "probe": task.probe(engine.model, fingerprint_images)}
        )

    def restore(before: float = math.inf) -> tuple[int, dict[str, Any]]:
        """Continue from the newest checkpoint that has not seen the data_step `before` of the data; the later ones go."""
        restored, state = checkpoint.restore(
            run.checkpoints,
            engine=engine,
            task=task,
            fingerprint=fingerprint,
            accept=lambda saved: next_data_step(saved) <= before,
        )
        if state:
            _prove(task.probe(engine.model, fingerprint_images), state["probe"], run, restored)
        if before < math.inf:
            if not state:
                raise Diverged(
                    f"no checkpoint of {run.checkpoints} is from before data_step {before}: nothing to rewind to"
                )
            checkpoint.remove_after(run.checkpoints, restored, world)
        run.truncate_metrics(restored)
        return restored, state

    step, state = restore()
    left_out, rewinds = state.get("left_out", left_out), state.get("rewinds", rewinds)
    board = Board(run.folder / "tb" if world.is_main else None, step, loop.global_batch)
    progress = Progress(run.folder.name, done=step, total=loop.steps, shown=world.is_main)
    meter = Meter(world, flops, peak_flops(world.device, engine.config.precision))
    tracer = Tracer(run.folder, world)
    drawn_next, skipped_updates = -1, 0
    if step == 0 and loop.on_divergence == "rewind":
        save()

    run.status("running", step=step, steps=loop.steps)
    with stop_flag() as stop:
        while step < loop.steps:
            data_step = data_step_of(step, left_out)
            if data_step != drawn_next:
                batches = {name: stream.batches(data_step) for name, stream in streams.items()}
            drawn_next = data_step + 1
            with meter.waiting():
                drawn = {name: next(stream).to(world.device, non_blocking=True) for name, stream in batches.items()}
            lr = lr_at(step)
            torch.manual_seed(step_seed(seed, data_step, world.rank))  # of drop path
            done = train_step(task, engine, drawn, accumulation=accumulation, lr=lr)
            meter.add(done.metrics)
            skipped_updates += not done.moved
            recorder.note(step, data_step, drawn, done.loss)
            step += 1
            meter.count(sum(map(len, drawn.values())))
            progress.advance()
            last = step == loop.steps
            voting = step % loop.vote_every == 0 and not last
            stopping = voting and any_rank(bool(stop) or time.monotonic() > deadline, world)
            saving = last or stopping or step % loop.save_every == 0

            if saving or step % loop.log_every == 0:  # nothing is saved that has not been judged
                row = meter.flush() | {"train/lr": lr, "train/skipped_updates": float(skipped_updates)}
                row |= {"train/weight_norm": engine.weight_norm()}
                if done.moved:
                    row |= {"train/grad_norm": engine.grad_norm()}
                anomaly = find_anomaly(row, recorder, loop, world)
                skipped_updates = 0
                if anomaly:
                    rewinds += 1
                    report(anomaly, run, recorder, step, rewinds)
                    saver.finish()
                    if loop.on_divergence == "stop" or rewinds > loop.max_rewinds:
                        raise Diverged(advice(anomaly, run, step, rewinds - 1))
                    step, _ = restore(before=anomaly.data_step)
                    board.rewind(step)
                    progress.rewind(step)
                    recorder.forget_from(step)
                    left_out, drawn_next = [*left_out, anomaly.data_step], -1
                    continue
                recorder.judged()
                row |= {"step": step, "samples": step * loop.global_batch}
                if row["train/skipped_updates"]:
                    run.incident({"step": step, "reason": f"{row['train/skipped_updates']:.0f} updates were skipped"})
                for alarm in task.alarms(row):
                    run.incident({"step": step, "reason": alarm})
                    logger.log(logging.WARNING if world.is_main else logging.DEBUG, "step %d: %s", step, alarm)
                    if loop.on_alarm == "stop":
                        saver.finish()
                        raise Diverged(f"{run.folder} stopped at step {step}: {alarm} (loop.on_alarm=note goes on)")
                run.append_metrics(row)
                board.scalars(row, step)
                progress.line(step, row)
                run.status("running", step=step, steps=loop.steps)
            if last or (loop.eval_every and step % loop.eval_every == 0):
                with meter.pausing():
                    row = evaluate(step, board)
                run.append_metrics(row | {"step": step, "samples": step * loop.global_batch})
                board.scalars(row, step)
                progress.line(step, row)
            if saving:
                with meter.pausing():
                    save()
            tracer.advance(step, look=step % loop.vote_every == 0)
            if voting:
                run.beat()
                saver.finish(wait=stopping)
            if stopping:
                run.status("interrupted", step=step, steps=loop.steps)
                reason = stop.name or ("its time limit" if time.monotonic() > deadline else "another rank")
                raise Interrupted(
                    f"{run.folder} stopped by {reason} at step {step} of {loop.steps};"
                    " all is saved, start it again to continue"
                )
    saver.finish()
    tracer.close()
    recorder.dump(run.folder / "report" / f"flight_rank_{world.rank:05d}.jsonl")
    progress.close()
    board.close()
    for stream in streams.values():
        stream.close()


class StepResult(NamedTuple):
    """`moved`: whether the engine updated the weights; `loss`: the mean over the micro-batches, on the device."""

    moved: bool
    loss: torch.Tensor
    metrics: list[tuple[str, Mean]]


def train_step(task: Task, engine: Engine, drawn: Mapping[str, Batch], *, accumulation: int, lr: float) -> StepResult:
    """One optimizer step: the micro-batches' losses, the update, then the teacher. Reads nothing from the device."""
    loss, moved = torch.zeros((), device=engine.world.device), False
    metrics: list[tuple[str, Mean]] = []
    for micro in _micro_batches(drawn, accumulation):
        with engine.precision():
            output = task.loss(engine.model, micro)
        engine.backward(output.loss)
        moved = engine.step(lr)
        loss += output.loss.detach() / accumulation
        metrics += output.metrics.items()
    if moved:
        metrics += task.after_step(engine, loss).items()
    return StepResult(moved, loss, [("train/loss", Mean(loss, 1.0)), *metrics])


def _prove(answer: float, saved: float, run: Run, step: int) -> None:
    """A restored model must answer the probe as it did when it was saved: no resume that trains as from scratch."""
    if not abs(answer - saved) <= PROBE_TOLERANCE * max(abs(saved), 1e-6):
        raise HandoverError(
            f"step {step} of {run.checkpoints} was restored but answers the probe with {answer:.6g}, where it answered"
            f" {saved:.6g} when it was saved; its code or kernels have changed: start a new experiment"
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Randomness is folded in from where we are, so there is no generator to save."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _micro_batches(drawn: Mapping[str, Batch], accumulation: int) -> list[dict[str, Batch]]:
    parts = {name: batch.chunks(accumulation) for name, batch in drawn.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(accumulation)]
