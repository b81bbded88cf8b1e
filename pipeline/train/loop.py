"""The training loop, the only one. Read it from top to bottom: batch, loss, backward, step, teacher, log, evaluate, save.

Everything that could be state is a function of the step instead: the learning rate, the order of the data, the
randomness. So resuming is restoring the weights and seeking the loaders.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist

from pipeline.data.loader import Batch, Loader
from pipeline.errors import Diverged, Interrupted
from pipeline.observe.progress import Progress
from pipeline.observe.tensorboard import Board
from pipeline.train import checkpoint
from pipeline.train.config import LoopConfig, OptimConfig
from pipeline.train.distributed import World, any_rank
from pipeline.train.engine import Engine
from pipeline.train.run import Run
from pipeline.train.schedules import warmup_cosine
from pipeline.train.signals import stop_flag
from pipeline.train.task import Mean, Task

# (step, board) -> numbers for the log; called by all ranks at the same steps.
Evaluate = Callable[[int, Board], dict[str, float]]


def fit(
    task: Task,
    engine: Engine,
    streams: Mapping[str, Loader],
    run: Run,
    *,
    loop: LoopConfig,
    optim: OptimConfig,
    accumulation: int,
    fingerprint: str,
    seed: int,
    evaluate: Evaluate,
) -> None:
    """Train for `loop.steps` optimizer steps, continuing from the run's newest sound checkpoint.

    `streams` yield this rank's samples of each step; `accumulation` cuts them into equal micro-batches.
    Raises Interrupted (everything saved) after a signal, and Diverged at the first logged number that is not finite.
    """
    world = engine.world
    step = checkpoint.restore(run.checkpoints, engine=engine, task=task, fingerprint=fingerprint)
    run.truncate_metrics(step)
    board = Board(run.folder / "tb" if world.is_main else None, step)
    progress = Progress(run.folder.name, done=step, total=loop.steps, shown=world.is_main)
    lr_at = warmup_cosine(optim.lr, optim.min_lr, optim.warmup_steps, loop.steps)
    batches = {name: stream.batches(step) for name, stream in streams.items()}
    meter = Meter(world)
    last_save = step

    def save() -> int:
        checkpoint.save(
            run.checkpoints, step=step, engine=engine, task=task, fingerprint=fingerprint, keep=loop.keep_checkpoints
        )
        return step

    run.status("running", step=step, steps=loop.steps)
    with stop_flag() as stop:
        while step < loop.steps:
            drawn = {name: next(stream).to(world.device) for name, stream in batches.items()}
            generator = torch.manual_seed(step_seed(seed, step, world.rank))
            lr = lr_at(step)
            moved = False
            for micro in _micro_batches(drawn, accumulation):
                with engine.precision():
                    output = task.loss(engine.model, micro, generator)
                engine.backward(output.loss)
                moved = engine.step(lr)
                meter.add(output.metrics | {"train/loss": Mean(output.loss.detach(), 1.0)})
            if moved:
                meter.add(task.after_step(engine, step))
            step += 1
            meter.count(sum(map(len, drawn.values())))
            progress.advance()
            last = step == loop.steps

            if step % loop.log_every == 0 or last:
                row = meter.flush() | {"train/lr": lr, "train/grad_norm": engine.grad_norm()}
                row |= {"step": step, "samples": step * loop.global_batch}
                _refuse_non_finite(row, step)
                run.append_metrics(row)
                board.scalars(row, step)
                progress.line(step, row)
                run.status("running", step=step, steps=loop.steps)
            if last or (loop.eval_every and step % loop.eval_every == 0):
                row = evaluate(step, board)
                run.append_metrics(row | {"step": step, "samples": step * loop.global_batch})
                board.scalars(row, step)
                progress.line(step, row)
            if last or step % loop.save_every == 0:
                last_save = save()
            if (step % loop.vote_every == 0 or last) and any_rank(bool(stop), world) and not last:
                if last_save != step:
                    save()
                run.status("interrupted", step=step, steps=loop.steps)
                raise Interrupted(
                    f"{run.folder} stopped by {stop.name or 'another rank'} at step {step} of {loop.steps};"
                    " all is saved, start it again to continue"
                )
    progress.close()
    board.close()
    for stream in streams.values():
        stream.close()


def step_seed(seed: int, step: int, rank: int) -> int:
    """Randomness is folded in from where we are, so there is no generator to save."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _micro_batches(drawn: dict[str, Batch], accumulation: int) -> list[dict[str, Batch]]:
    parts = {name: batch.chunks(accumulation) for name, batch in drawn.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(accumulation)]


def _refuse_non_finite(row: dict[str, float], step: int) -> None:
    for name, value in row.items():
        if not math.isfinite(value):
            raise Diverged(
                f"{name} is {value} by step {step}; lower optim.lr, lengthen optim.warmup_steps, or set engine.precision=fp32"
            )


class Meter:
    """Means since the last flush, over all ranks, by counts. Nothing is read from the device before `flush`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._started, self._steps, self._images = time.monotonic(), 0, 0

    def add(self, metrics: dict[str, Mean]) -> None:
        for name, mean in metrics.items():
            pair = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=self.world.device) for x in mean])
            self._sums[name] = self._sums.get(name, 0) + pair

    def count(self, images: int) -> None:
        """A step is done, for which this rank read so many images (of all streams)."""
        self._steps += 1
        self._images += images

    def flush(self) -> dict[str, float]:
        """name -> mean (collective: all ranks have metered the same names); a mean of nothing is left out."""
        names = sorted(self._sums)
        table = torch.stack([self._sums[name] for name in names])
        if self.world.size > 1:
            dist.all_reduce(table)
        rows = table.tolist()
        seconds = time.monotonic() - self._started
        means = {name: total / count for name, (total, count) in zip(names, rows, strict=True) if count}
        means["perf/step_seconds"] = seconds / self._steps
        means["perf/images_per_second"] = self._images * self.world.size / seconds
        self._reset()
        return means
