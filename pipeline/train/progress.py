"""Progress for people: a bar on a terminal, one plain line per log interval elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping

logger = logging.getLogger(__name__)

# The numbers of a line, in this order; all others are in metrics.jsonl.
_SHOWN = (
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "ssl/mask_rate",
    "ema/alpha",
    "val/loss",
    "val/linear",
    "val/knn",
    "val/top1",
    "val/teacher_top1",
    "perf/images_per_second",
    "perf/data_wait_share",
    "perf/mfu",
    "perf/memory_gib",
)


class Progress:
    """Progress of a run on the screen.

    Args:
        name: Name of the stage.
        done: Steps done so far.
        total: Steps of the whole run.
        shown: Whether anything is shown (on rank 0).
    """

    def __init__(self, name: str, *, done: int, total: int, shown: bool) -> None:
        self.name, self.total, self.shown = name, total, shown
        self._started, self._start = time.monotonic(), done
        self._bar = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=name, unit="step", dynamic_ncols=True, leave=True)

    def advance(self) -> None:
        """Count a step."""
        if self._bar:
            self._bar.update()

    def rewind(self, step: int) -> None:
        """Continue from an earlier step, and estimate the time left from there."""
        self._started, self._start = time.monotonic(), step
        if self._bar:
            self._bar.reset()
            self._bar.initial = self._bar.n = step
            self._bar.refresh()

    def line(self, step: int, row: Mapping[str, float]) -> None:
        """Show the main numbers of a row, and the time left."""
        shown = [f"{key.removeprefix('train/').replace('/', ' ')} {row[key]:.4g}" for key in _SHOWN if key in row]
        if self._bar:
            self._bar.set_postfix_str("  ".join(shown))
        elif self.shown and shown:  # a validation without images has no numbers
            elapsed = time.monotonic() - self._started
            left = elapsed / max(1, step - self._start) * (self.total - step)
            logger.info("%s step %d/%d  %s  eta %s", self.name, step, self.total, "  ".join(shown), _clock(left))

    def close(self) -> None:
        """Close the bar."""
        if self._bar:
            self._bar.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
