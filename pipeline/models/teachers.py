"""Frozen teachers from timm, and answers kept. A teacher from one of our exports is simply `export.load_export`."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError, HandoverError
from pipeline.models.config import TIMM_PREFIX, TimmConfig
from pipeline.models.timm_model import TimmModel
from pipeline.models.weights import load_weights


def timm_teacher(name: str, weights: Path, num_classes: int, image_size: tuple[int, int]) -> TimmModel:
    """The timm model `name` with a weights file from disk, classifier and all (nothing is downloaded).

    Raises HandoverError if the name, the file or the images do not fit.
    """
    config = TimmConfig(name=TIMM_PREFIX + name, num_classes=num_classes, image_size=image_size)
    try:
        model = TimmModel(**config.model_dump()).eval()
    except ConfigError as error:
        raise HandoverError(str(error)) from None
    report = load_weights(model, weights)
    if report.fresh or report.dropped:
        raise HandoverError(
            f"{weights} does not answer for {num_classes} classes: {report}; a teacher needs the dataset's classes"
        )
    try:
        with torch.no_grad():
            model(torch.zeros(1, 3, *image_size))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise HandoverError(f"timm's {name} takes no images of {image_size}: {str(error).splitlines()[0]}") from error
    return model


class KeptAnswers:
    """A frozen teacher whose logits are kept on disk by the pixels it saw, so that a second run does not pay for them.

    A view is a function of (sample, view seed), and what is mixed of (seed, place in the data): equal pixels are the same
    view, mixed or not, whatever drew it. `teacher` (B, 3, H, W) -> (B, K). `name` tells teachers apart (hash of its weights).
    Every rank appends to a file of its own, records of 16 + 4 K bytes; a record cut off by a kill is dropped.
    """

    def __init__(
        self, teacher: Callable[[Tensor], Tensor], folder: Path, *, name: str, num_classes: int, rank: int
    ) -> None:
        self.teacher = teacher
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record = np.dtype([("key", "V16"), ("logits", "<f4", (num_classes,))])
        self._rows: dict[bytes, np.ndarray] = {}
        for path in sorted(self.folder.glob("answers_*.bin")):
            whole = path.stat().st_size // self._record.itemsize
            if whole:
                rows = np.memmap(path, self._record, mode="r", shape=(whole,))
                self._rows.update((row["key"].tobytes(), row["logits"]) for row in rows)
        self._path = self.folder / f"answers_{rank:05d}.bin"
        self.asked = 0  # images that the teacher itself has seen

    def __call__(self, images: Tensor) -> Tensor:
        keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images.float().cpu()]
        new = [i for i, key in enumerate(keys) if key not in self._rows]
        if new:
            answers = self.teacher(images[new]).float().cpu().numpy()
            self.asked += len(new)
            records = np.empty(len(new), self._record)
            for record, i, answer in zip(records, new, answers, strict=True):
                record["key"], record["logits"] = np.void(keys[i]), answer
                self._rows[keys[i]] = answer
            self._append(records.tobytes())
        return torch.from_numpy(np.stack([self._rows[key] for key in keys])).to(images.device)

    def _append(self, data: bytes) -> None:
        with self._path.open("ab") as file:
            size = os.fstat(file.fileno()).st_size
            file.truncate(size - size % self._record.itemsize)
            file.write(data)
