"""TensorBoard: the same rows as metrics.jsonl, in one folder per run, continuous over resumes and rewinds.

Names are those of the log; the x axis is the optimizer step. The main curves are also drawn over the samples seen, as
`samples/NAME`. They are in a folder of their own, because TensorBoard purges events by their x value. CUSTOM SCALARS has a
layout; HPARAMS compares runs by their last numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

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
    """Writes the events of one run.

    Args:
        folder: Folder of the events; a board without a folder writes nothing.
        step: Step that the run starts or continues from; later events, of a run that was cut, are purged.
        global_batch: Samples per step.
    """

    def __init__(self, folder: Path | None, step: int, global_batch: int = 1) -> None:
        self.folder, self.global_batch = folder, global_batch
        self._open(step)

    def _open(self, step: int) -> None:
        self._writer = self._by_samples = None
        if self.folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        self._by_samples = SummaryWriter(str(self.folder / "by_samples"), purge_step=step * self.global_batch + 1)
        if step == 0:
            charts = {g: {chart: ["Multiline", tags] for chart, tags in c.items()} for g, c in LAYOUT.items()}
            self._writer.add_custom_scalars(charts)

    def scalars(self, row: Mapping[str, float], step: int) -> None:
        """Write the values of a row whose names have a slash; `step` and `samples` have none."""
        if self._writer and self._by_samples:
            for name, value in row.items():
                if "/" in name:
                    self._writer.add_scalar(name, value, step)
                if name in BY_SAMPLES:
                    self._by_samples.add_scalar(f"samples/{name}", value, step * self.global_batch)

    def image(self, name: str, pixels: "Tensor", step: int) -> None:
        """Write a picture.

        Args:
            name: Its tag.
            pixels: Pixels (3, H, W) in [0, 1].
            step: Optimizer step.
        """
        if self._writer:
            self._writer.add_image(name, pixels, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """Write a histogram of `values` (n,), a tensor or an array; nothing if there are none."""
        if self._writer and len(values):
            self._writer.add_histogram(name, values, step)

    def class_counts(self, name: str, counts: Any, step: int) -> None:
        """Write how often each class was predicted, as a histogram with one bucket per class.

        Args:
            name: Its tag.
            counts: Count of each class (C,).
            step: Optimizer step.
        """
        if self._writer and sum(counts):
            named, edges = np.repeat(np.arange(len(counts)), counts), np.arange(len(counts) + 1) - 0.5
            self._writer.add_histogram(name, named, step, bins=edges)

    def rewind(self, step: int) -> None:
        """Purge what was written after `step`.

        The event goes into the same file, because a second file could sort before it.
        """
        if self._writer and self._by_samples:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            for writer, first in ((self._writer, step + 1), (self._by_samples, step * self.global_batch + 1)):
                start = Event(step=first, session_log=SessionLog(status=SessionLog.START))
                writer._get_file_writer().add_event(start, first)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Write the run's config and its last numbers for HPARAMS, into the run's own folder."""
        if self._writer:
            from torch.utils.tensorboard.summary import hparams

            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()}
            for summary in hparams(plain, dict(metrics)):
                self._writer._get_file_writer().add_summary(summary)
            for name, value in metrics.items():
                if not name.startswith("val/"):  # the last evaluation has written them
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        for writer in (self._writer, self._by_samples):
            if writer:
                writer.close()
