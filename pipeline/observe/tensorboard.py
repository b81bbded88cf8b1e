"""TensorBoard: the same rows as metrics.jsonl, one folder a run, continuous over resumes."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Board:
    """Writes to `folder`; events after `step` (of a run that was cut) are purged. A board without a folder is silent."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def scalars(self, row: dict[str, float], step: int) -> None:
        if self._writer:
            for name, value in row.items():
                if "/" in name:
                    self._writer.add_scalar(name, value, step)

    def image(self, name: str, pixels: "Tensor", step: int) -> None:
        """pixels (3, H, W) in [0, 1]."""
        if self._writer:
            self._writer.add_image(name, pixels, step)

    def close(self) -> None:
        if self._writer:
            self._writer.close()
