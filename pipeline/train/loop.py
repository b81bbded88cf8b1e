"""The training loop, the only one. Read it from top to bottom: batch, loss, backward, step, teacher, log, evaluate, save.

Everything that could be state is a function of the step instead: the learning rate, the order of the data, the
randomness. So resuming is restoring the weights and seeking the loaders.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from pipeline.errors import DataError, Diverged, HandoverError, Interrupted
from pipeline.report.tensorboard import Board
from pipeline.train import checkpoint
from pipeline.train.checkpoint import Saver
from pipeline.train.distributed import any_rank
from pipeline.train.divergence import Anomaly, advice, data_step_of, find_anomaly, next_data_step, report
from pipeline.train.host_memory import old_objects_unsearched
from pipeline.train.meter import Meter
from pipeline.train.peak import peak_flops
from pipeline.train.progress import Progress
from pipeline.train.run import Run
from pipeline.train.saved_state import LoopRecord
from pipeline.train.selection import Selection
from pipeline.train.shard_check import ShardCheck
from pipeline.train.signals import stop_flag
from pipeline.train.tracer import Tracer
from pipeline.train.training import Draws, Training, train_step

logger = logging.getLogger(__name__)

# (step, board) -> numbers for the log; called by all ranks at the same steps.
Evaluate = Callable[[int, Board], dict[str, float]]

FINGERPRINT_TOLERANCE = 1e-3  # relative; another world size or ZeRO stage sums in another order


def fit(training: Training, run: Run, evaluate: Evaluate) -> "Ending":
    """Train for `loop.steps` optimizer steps, continuing from the run's newest sound checkpoint.

    Args:
        training: What is trained, on what, by which rules.
        run: The folder that receives numbers and checkpoints.
        evaluate: Called every `loop.eval_every` steps and after the last; also before the first if the weights are trained
            already and validations are compared.

    Returns:
        Where the run ended. The weights are those of the last step; with `loop.select=best` the task holds the best ones.

    Raises:
        Interrupted: After a signal or the time limit; everything is saved.
        Diverged: For numbers that are not finite or leap, once the allowed rewinds are used up.
        DataError: A shard has another content than its manifest states. Checkpoints that may have learnt from it are removed.
    """
    engine, loop, recorder = training.engine, training.loop, training.recorder
    world, deadline = engine.world, time.monotonic() + 60 * (loop.time_limit_minutes or math.inf)
    saver = Saver(run.checkpoints, training)
    shards = ShardCheck(training.datasets, world)
    state, saves = _restore(training, run, shards), 0
    display = _Display(training, run, state.step)
    meter = Meter(world, training.flops, peak_flops(world.device, engine.config.precision))
    tracer, draws = Tracer(run.folder, world), Draws(training)
    if state.step == 0:
        with meter.pausing():
            _begin(training, state, evaluate, display, saver, shards)
    run.status("running", step=state.step, steps=loop.steps)
    with stop_flag() as stop, shards, old_objects_unsearched():
        check_shards = partial(_check_shards, shards, saver, run, lambda: bool(stop))
        while state.step < loop.steps and not state.ended_early:
            data_step = data_step_of(state.step, state.left_out)
            with meter.waiting():
                drawn = draws.take(data_step)
            done = train_step(training, drawn, step=state.step, data_step=data_step)
            meter.add(done.metrics)
            meter.count(images=sum(map(len, drawn.values())), moved=done.moved)
            recorder.note(state.step, data_step, drawn, done.loss)
            state.step += 1
            display.progress.advance()
            step, last = state.step, state.step == loop.steps
            voting = step % loop.vote_every == 0 and not last
            stopping = voting and any_rank(bool(stop) or time.monotonic() > deadline, world)
            saving = last or stopping or step % loop.save_every == 0
            evaluating = last or bool(loop.eval_every and step % loop.eval_every == 0)

            # Nothing is saved that has not been checked, and with patience a validation may be the end.
            if saving or step % loop.log_every == 0 or (evaluating and loop.patience):
                row = _log_row(training, meter, step, moved=done.moved)
                anomaly = find_anomaly(row, recorder, loop, world)
                if anomaly:
                    report(anomaly, run, recorder, step, state.rewinds + 1)
                    saver.finish()
                    state = _rewind(training, run, shards, state, anomaly)
                    display.rewind(state.step)
                    continue
                recorder.mark_checked()
                _tell_incidents(training, run, saver, row, step)
                display.show(step, row)
                run.status("running", step=step, steps=loop.steps)
            # Before saving: a run that continues from this checkpoint does not evaluate this step again.
            if evaluating:
                with meter.pausing():
                    state.ended_early = _validate(training, state, evaluate, display) and not last
                saving |= state.ended_early
            if saving:
                with meter.pausing():
                    if not stopping:
                        check_shards(state.proven, wait=bool(saves) or last or state.ended_early)
                    _save(saver, training, state, shards)
                saves += 1
            tracer.advance(step, look=step % loop.vote_every == 0)
            if voting:
                run.beat()
                saver.finish(wait=stopping)
                check_shards(state.proven)
            if stopping:
                by = stop.name or ("its time limit" if time.monotonic() > deadline else "another rank")
                raise _interruption(run, by, step, loop.steps)
        check_shards(state.proven, wait=True)
        if not shards.settled:
            raise Interrupted(f"{run.folder} stopped by {stop.name or 'another rank'}; start it again to finish")
    saver.finish()
    tracer.close()
    recorder.dump(run.folder / "report" / f"flight_rank_{world.rank:05d}.jsonl")
    display.close()
    draws.close()
    return Ending(step=state.step, steps=loop.steps, selection=state.selection)


def _interruption(run: Run, by: str, step: int, steps: int) -> Interrupted:
    """Note the interruption in the run's folder and return what the loop raises."""
    run.status("interrupted", step=step, steps=steps)
    return Interrupted(
        f"{run.folder} stopped by {by} at step {step} of {steps}; all is saved, start it again to continue"
    )


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Where a run ended.

    Args:
        step: The last optimizer step.
        steps: Those that the config asked for; more than `step` if `loop.patience` ended the run.
        selection: What its validations found.
    """

    step: int
    steps: int
    selection: Selection


@dataclass(kw_only=True)
class _LoopState:
    """What a run is at beside its weights; saved with them."""

    step: int
    left_out: list[int] = field(default_factory=list)  # data steps that a rewind has closed
    rewinds: int = 0
    selection: Selection = field(default_factory=Selection)
    ended_early: bool = False
    proven: int = 0  # the newest step that was saved when all shards had been checked


class _Display:
    """Where the rows of a run go: metrics.jsonl, TensorBoard and the screen."""

    def __init__(self, training: Training, run: Run, step: int) -> None:
        self.run, self.global_batch = run, training.loop.global_batch
        shown = training.engine.world.is_main
        self.board = Board(run.folder / "tb" if shown else None, step, self.global_batch)
        self.progress = Progress(run.folder.name, done=step, total=training.loop.steps, shown=shown)

    def show(self, step: int, row: dict[str, float]) -> None:
        self.run.append_metrics(row | {"step": step, "samples": step * self.global_batch})
        self.board.scalars(row, step)
        self.progress.line(step, row)

    def rewind(self, step: int) -> None:
        self.board.rewind(step)
        self.progress.rewind(step)

    def close(self) -> None:
        self.progress.close()
        self.board.close()


def _log_row(training: Training, meter: Meter, step: int, *, moved: bool) -> dict[str, float]:
    """The means since the last log line, and the norms of this step (collective)."""
    engine = training.engine
    lr = training.lr_at(step - 1) * training.task.lr_factor()
    row = meter.flush() | {"train/lr": lr, "train/weight_norm": engine.weight_norm()}
    return row | {"train/grad_norm": engine.grad_norm()} if moved else row


def _begin(
    training: Training, state: _LoopState, evaluate: Evaluate, display: _Display, saver: Saver, shards: ShardCheck
) -> None:
    """Validate and save the state before the first step, where something needs it (collective).

    Validated: trained weights are a result already, so a stage whose states are all clearly worse ends with what it was given.
    """
    if training.starts_trained and training.loop.compares and not state.selection.seen:
        _validate(training, state, evaluate, display)
    if training.loop.on_divergence == "rewind":
        _save(saver, training, state, shards)


def _validate(training: Training, state: _LoopState, evaluate: Evaluate, display: _Display) -> bool:
    """Validate, keep the state if it is the best so far, and return whether patience is over (collective)."""
    loop, selection = training.loop, state.selection
    row = evaluate(state.step, display.board)
    display.show(state.step, row)
    if not loop.compares:
        return False
    if selection.see(state.step, row, training.task.criteria()) and training.task.best:
        training.task.best.keep()
    return loop.patience is not None and selection.waited >= loop.patience


def _tell_incidents(training: Training, run: Run, saver: Saver, row: dict[str, float], step: int) -> None:
    """Note skipped updates and the task's alarms; with `loop.on_alarm=stop` an alarm raises Diverged."""
    if row["train/skipped_updates"]:
        run.incident({"step": step, "reason": f"{row['train/skipped_updates']:.0f} updates were skipped"})
    for alarm in training.task.alarms(row):
        run.incident({"step": step, "reason": alarm})
        logger.log(logging.WARNING if run.world.is_main else logging.DEBUG, "step %d: %s", step, alarm)
        if training.loop.on_alarm == "stop":
            saver.finish()
            raise Diverged(f"{run.folder} stopped at step {step}: {alarm} (set loop.on_alarm=note to continue anyway)")


def _rewind(training: Training, run: Run, shards: ShardCheck, state: _LoopState, anomaly: Anomaly) -> _LoopState:
    """Continue from before the anomaly and leave its data step out for good; Diverged if that is not allowed (any more)."""
    if training.loop.on_divergence == "stop" or state.rewinds >= training.loop.max_rewinds:
        raise Diverged(advice(anomaly, run, state.step, state.rewinds))
    restored = _restore(training, run, shards, before=anomaly.data_step)
    training.recorder.forget_from(restored.step)
    left_out = [*state.left_out, anomaly.data_step]
    return replace(restored, left_out=left_out, rewinds=state.rewinds + 1)


def _check_shards(
    shards: ShardCheck, saver: Saver, run: Run, enough: Callable[[], bool], proven: int, *, wait: bool = False
) -> None:
    """Raise DataError if a shard has changed, and remove the checkpoints that may have learnt from it (collective)."""
    if problem := shards.problem(wait=wait, enough=enough):
        saver.finish()
        checkpoint.remove_after(run.checkpoints, proven, run.world)
        raise DataError(f"{problem} (checkpoints after step {proven} are removed, since they may have learnt from it)")


def _save(saver: Saver, training: Training, state: _LoopState, shards: ShardCheck) -> None:
    if shards.settled:
        state.proven = state.step
    record = LoopRecord(
        left_out=state.left_out,
        rewinds=state.rewinds,
        fingerprint=training.fingerprint(),
        hashed=shards.stamps(),
        proven=state.proven,
        selection=state.selection.model_copy(),  # a thread writes it while training continues
        ended_early=state.ended_early,
    )
    saver.save(state.step, record)


def _restore(training: Training, run: Run, shards: ShardCheck, before: float = math.inf) -> _LoopState:
    """Continue from the newest checkpoint that has not seen the data step `before`; remove the later ones (collective)."""
    saved = checkpoint.restore(run.checkpoints, training, accept=lambda found: next_data_step(found) <= before)
    shards.begin(saved.loop.hashed if saved else {})
    if saved:
        _check_fingerprint(training.fingerprint(), saved.loop.fingerprint, run, saved.step, shards)
    step = saved.step if saved else 0
    if before < math.inf:
        if not saved:
            raise Diverged(
                f"no checkpoint of {run.checkpoints} is from before data step {before}: nothing to rewind to"
            )
        checkpoint.remove_after(run.checkpoints, step, run.world)
    run.truncate_metrics(step if saved else -1)
    if not saved:
        return _LoopState(step=0)
    loop = saved.loop
    return _LoopState(
        step=step,
        left_out=loop.left_out,
        rewinds=loop.rewinds,
        proven=loop.proven,
        selection=loop.selection,
        ended_early=loop.ended_early,
    )


def _check_fingerprint(now: float, saved: float, run: Run, step: int, shards: ShardCheck) -> None:
    """A restored model must compute what it computed when it was saved: no resume may train as from scratch."""
    if not abs(now - saved) <= FINGERPRINT_TOLERANCE * max(abs(saved), 1e-6):
        if problem := shards.problem(wait=True):  # the images of the fingerprint batch are read from the shards
            raise DataError(problem)
        raise HandoverError(
            f"step {step} of {run.checkpoints} was restored, but its fingerprint is {now:.6g} and was {saved:.6g} when it was"
            " saved; its code or kernels have changed: start a new experiment"
        )
