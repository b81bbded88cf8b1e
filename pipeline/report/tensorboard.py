"""TensorBoard: the same rows as metrics.jsonl, one folder a run, continuous over resumes and rewinds.

Names are those of the log and do not change; the axis is the optimizer step. What matters most is also drawn over the
samples seen, as `samples/NAME` (in a folder of its own, since a reader forgets what is behind by the axis). CUSTOM SCALARS
has a layout, HPARAMS compares runs by their last numbers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Chart -> the lines it joins (regular expressions), of all stages: a run shows what it has.
LAYOUT = {
    "Is it learning": {
        "loss": ["^train/loss$", "^val/loss$"],
        "parts of the loss": ["^train/(supervised|consistency|teacher_loss)$"],
        "clusters of stage 1": ["^cluster_loss/"],
        "accuracy": ["^train/top1$", "^val/top1$", "^val/teacher_top1$"],
        "head, medium, tail": ["^val/(head|medium|tail)$", "^val/teacher_(head|medium|tail)$"],
    },
    "Is the teacher sound": {
        "pseudo-labels": ["^ssl/(mask_rate|confidence)$"],
        "pseudo-labels against the truth": ["^pseudo/(precision|coverage)(_tail)?$"],
        "decay and guard": ["^ema/(alpha|guard_hit)$"],
        "energy": ["^ema/V$"],
    },
    "Is the machine busy": {
        "images per second": ["^perf/images_per_second$"],
        "waiting and utilisation": ["^perf/(data_wait_share|mfu)$"],
        "gradient norm": ["^train/grad_norm$"],
    },
}
BY_SAMPLES = ("train/loss", "val/loss", "val/top1", "val/teacher_top1")


class Board:
    """Writes to `folder`; events after `step` (of a run that was cut) are purged. A board without a folder is silent."""

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
        if self._writer and self._by_samples:
            for name, value in row.items():
                if "/" in name:
                    self._writer.add_scalar(name, value, step)
                if name in BY_SAMPLES:
                    self._by_samples.add_scalar(f"samples/{name}", value, step * self.global_batch)

    def image(self, name: str, pixels: "Tensor", step: int) -> None:
        """pixels (3, H, W) in [0, 1]."""
        if self._writer:
            self._writer.add_image(name, pixels, step)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """values (n,): a tensor or an array."""
        if self._writer and len(values):
            self._writer.add_histogram(name, values, step)

    def class_counts(self, name: str, counts: Any, step: int) -> None:
        """counts (C,), how often each class was named: a histogram with a bucket a class, around its number."""
        if self._writer and sum(counts):
            named, edges = np.repeat(np.arange(len(counts)), counts), np.arange(len(counts) + 1) - 0.5
            self._writer.add_histogram(name, named, step, bins=edges)

    def rewind(self, step: int) -> None:
        """What was written after `step` is undone: readers forget it. In the same file: a second one could sort before it."""
        if self._writer and self._by_samples:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            for writer, first in ((self._writer, step + 1), (self._by_samples, step * self.global_batch + 1)):
                start = Event(step=first, session_log=SessionLog(status=SessionLog.START))
                writer._get_file_writer().add_event(start, first)

    def hparams(self, values: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """The run's settings beside its last numbers, in the run itself and not in a folder of its own."""
        if self._writer:
            from torch.utils.tensorboard.summary import hparams

            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()}
            for summary in hparams(plain, dict(metrics)):
                self._writer._get_file_writer().add_summary(summary)
            for name, value in metrics.items():
                if not name.startswith("val/"):  # those of the last evaluation are there already
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        for writer in (self._writer, self._by_samples):
            if writer:
                writer.close()
