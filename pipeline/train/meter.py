"""Measurements between two log lines: the means of the losses, and how well the machine is used."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import psutil
import torch

from pipeline.train.distributed import World, sum_over_ranks
from pipeline.train.task import Mean


class Meter:
    """Means since the last flush, over all ranks, by counts. Nothing is read from the device before `flush`.

    Args:
        world: The processes.
        flops: FLOPs of a step over all ranks.
        peak: FLOP/s of one rank's device.
    """

    def __init__(self, world: World, flops: float, peak: float) -> None:
        self.world, self.flops, self.peak = world, flops, peak
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, tuple[torch.Tensor | float, torch.Tensor | float]] = {}
        self._started, self._waited = time.monotonic(), 0.0
        self._steps = self._images = self._skipped = 0

    def add(self, metrics: Iterable[tuple[str, Mean]]) -> None:
        """Add the means of one step."""
        for name, mean in metrics:
            total, weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + mean.total.double(), weight + mean.weight)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time spent inside as time without data."""
        begin = time.monotonic()
        yield
        self._waited += time.monotonic() - begin

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """Leave the time spent inside (an evaluation, a save) out of the step times."""
        begin = time.monotonic()
        yield
        self._started += time.monotonic() - begin

    def count(self, images: int, *, moved: bool) -> None:
        """Count a step.

        Args:
            images: Images of all streams that this rank read for it.
            moved: Whether the engine updated the weights.
        """
        self._steps += 1
        self._images += images
        self._skipped += not moved

    def flush(self) -> dict[str, float]:
        """Return name -> mean and begin anew (collective: all ranks have added the same names); a mean of nothing is left out."""
        names = sorted(self._sums)
        device = self.world.device
        pairs = [[torch.as_tensor(x, dtype=torch.float64, device=device) for x in self._sums[name]] for name in names]
        table = torch.stack([torch.stack(pair) for pair in pairs])
        sum_over_ranks(table)
        rows = table.tolist()
        seconds = time.monotonic() - self._started
        means = {name: total / count for name, (total, count) in zip(names, rows, strict=True) if count}
        means["perf/step_seconds"] = seconds / self._steps
        means["perf/images_per_second"] = self._images * self.world.size / seconds
        means["perf/data_wait_share"] = self._waited / seconds
        means["perf/tflops"] = self.flops * self._steps / seconds / 1e12
        means["perf/mfu"] = self.flops * self._steps / seconds / (self.peak * self.world.size)
        means["perf/memory_gib"] = memory_bytes(self.world.device) / 2**30
        means["train/skipped_updates"] = float(self._skipped)
        self._reset()
        return means


def memory_bytes(device: torch.device) -> int:
    """Return the bytes that this rank has used on its GPU at most, or that its process holds now on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
