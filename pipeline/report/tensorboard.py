"""TensorBoard: the same rows as metrics.jsonl, in one folder per run, continuous over resumes and rewinds.

Names are those of the log; the x axis is the optimizer step. The main curves are also drawn over the samples seen, as
`samples/NAME`. They are in a folder of their own, because TensorBoard purges events by their x value. CUSTOM SCALARS has a
layout; HPARAMS compares runs by their last numbers.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.cli import DISK_ERRORS
from pipeline.errors import first_line

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)

# Chart -> the curves it joins (regular expressions), for all stages: a run shows the curves that it has.
LAYOUT = {
    "Learning": {
        "loss": ["^train/loss$", "^val/loss$"],
        "terms of the loss": ["^train/(supervised|consistency|teacher_loss)$"],
        "loss of each cluster in stage 1": ["^cluster_loss/"],
        "accuracy": ["^train/top1$", "^val/top1$", "^val/teacher_top1$"],
        "accuracy of head, medium and tail classes": ["^val/(head|medium|tail)$", "^val/teacher_(head|medium|tail)$"],
    },
    "Teacher and pseudo-labels": {
        "accepted share and mean confidence": ["^ssl/(mask_rate|confidence)$"],
        "precision and coverage of pseudo-labels": ["^pseudo/(precision|coverage)(_tail)?$"],
        "decay of the teacher": ["^ema/(alpha|guard_hit)$"],
        "distance between student and teacher (V)": ["^ema/V$"],
    },
    "Speed and gradients": {
        "images per second": ["^perf/images_per_second$"],
        "time spent waiting for data, and MFU": ["^perf/(data_wait_share|mfu)$"],
        "gradient norm": ["^train/grad_norm$"],
    },
}
BY_SAMPLES = ("train/loss", "val/loss", "val/top1", "val/teacher_top1")


class Board:
    """Writes the events of one run. A folder that is taken away or cannot be used is given up with a warning.

    Args:
        folder: Folder of the events; a board without a folder writes nothing.
        step: Step that the run starts or continues from; later events, of a run that was cut, are purged.
        global_batch: Samples per step.
    """

    def __init__(self, folder: Path | None, step: int, global_batch: int = 1) -> None:
        self.folder, self.global_batch = folder, global_batch
        self._writers: tuple[SummaryWriter, SummaryWriter] | None = None  # over the steps, and over the samples
        if folder is not None:
            self._attempt(lambda: self._open(folder, step))

    def _open(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        (folder / "by_samples").mkdir(parents=True, exist_ok=True)  # before a thread is started
        writer = SummaryWriter(str(folder), purge_step=step + 1)
        self._writers = writer, SummaryWriter(str(folder / "by_samples"), purge_step=step * self.global_batch + 1)
        if step == 0:
            charts = {g: {chart: ["Multiline", tags] for chart, tags in c.items()} for g, c in LAYOUT.items()}
            writer.add_custom_scalars(charts)

    def _attempt(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:  # the thread of TensorBoard hands on its errors at a later event
            if error.errno in DISK_ERRORS:  # the next checkpoint would meet it too
                raise
            logger.warning("%s is given up (%s); metrics.jsonl has every number", self.folder, first_line(error))
            writers, self._writers = self._writers or (), None
            for writer in writers:  # so that their threads end now
                with suppress(OSError):
                    writer.close()

    def _write(self, act: "Callable[[SummaryWriter, SummaryWriter], None]") -> None:
        if self._writers is not None:
            over_steps, over_samples = self._writers
            self._attempt(lambda: act(over_steps, over_samples))

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        """Write the values of a row whose names have a slash; `step` and `samples` have none."""

        def write(over_steps: "SummaryWriter", over_samples: "SummaryWriter") -> None:
            for name, value in row.items():
                if "/" in name:
                    over_steps.add_scalar(name, value, step)
                if name in BY_SAMPLES:
                    over_samples.add_scalar(f"samples/{name}", value, step * self.global_batch)

        self._write(write)

    def image(self, name: str, pixels: "Tensor", step: int) -> None:
        """Write a picture.

        Args:
            name: Its tag.
            pixels: Pixels (3, H, W) in [0, 1].
            step: Optimizer step.
        """
        self._write(lambda over_steps, _: over_steps.add_image(name, pixels, step))

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Write a histogram of `values` (n,), a tensor or an array; nothing if there are none."""
        if len(values):
            self._write(lambda over_steps, _: over_steps.add_histogram(name, values, step))

    def class_counts(self, name: str, counts: Any, step: int) -> None:
        """Write how often each class was predicted, as a histogram with one bucket per class.

        Args:
            name: Its tag.
            counts: Count of each class (C,).
            step: Optimizer step.
        """
        if self._writers is not None and sum(counts):
            named, edges = np.repeat(np.arange(len(counts)), counts), np.arange(len(counts) + 1) - 0.5
            self._write(lambda over_steps, _: over_steps.add_histogram(name, named, step, bins=edges))

    def rewind(self, step: int) -> None:
        """Purge what was written after `step`.

        The event goes into the same file, because a second file could sort before it.
        """

        def write(*writers: "SummaryWriter") -> None:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            for writer, first in zip(writers, (step + 1, step * self.global_batch + 1), strict=True):
                start = Event(step=first, session_log=SessionLog(status=SessionLog.START))
                writer._get_file_writer().add_event(start, first)

        self._write(write)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Write the run's config and its last numbers for HPARAMS, into the run's own folder."""

        def write(over_steps: "SummaryWriter", _: "SummaryWriter") -> None:
            from torch.utils.tensorboard.summary import hparams

            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()}
            for summary in hparams(plain, dict(metrics)):
                over_steps._get_file_writer().add_summary(summary)
            for name, value in metrics.items():
                if not name.startswith("val/"):  # the last evaluation has written them
                    over_steps.add_scalar(name, value, step)

        self._write(write)

    def close(self) -> None:
        """Flush and close the files."""

        def close(*writers: "SummaryWriter") -> None:
            for writer in writers:
                writer.close()

        self._write(close)
