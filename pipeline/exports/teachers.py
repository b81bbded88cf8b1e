"""Frozen teachers from timm, and answers kept. A teacher from one of our exports is simply `export.load_export`."""

import hashlib
import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError, EnvironmentProblem, HandoverError
from pipeline.exports.prefetch import missing_weights
from pipeline.exports.weights import load_weights
from pipeline.models.config import TIMM_PREFIX, TimmConfig
from pipeline.models.timm_model import TimmModel

logger = logging.getLogger(__name__)

PAGE = 16384  # bytes of a database's page
CACHE_MB = 32  # of its pages in memory
LOCK_SECONDS = 60  # how long another process may write


def timm_teacher(name: str, weights: Path, num_classes: int, image_size: tuple[int, int]) -> TimmModel:
    """The timm model `name` with a weights file from disk, classifier and all (nothing is downloaded).

    Raises HandoverError if the name, the file or the images do not fit.
    """
    if not weights.is_file():
        raise missing_weights(weights, TIMM_PREFIX + name)
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
    view, mixed or not, whatever drew it. `teacher` (B, 3, H, W) -> (B, K).

    `path` is an SQLite database, which every rank and every run with this teacher reads and writes: a batch's answers are
    one transaction, so a kill leaves all of them or none. It lies where locks work (a local disk, NFS 4). In memory there are
    CACHE_MB whatever it holds. At `gigabytes` it takes no more; no trouble with it ends a training, which goes on asking.
    Raises EnvironmentProblem if it cannot be opened, HandoverError for another file.
    """

    def __init__(self, teacher: Callable[[Tensor], Tensor], path: Path, *, gigabytes: float) -> None:
        self.teacher = teacher
        self.asked = 0  # images that the teacher itself has seen
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=LOCK_SECONDS, isolation_level="IMMEDIATE")
            self._database.execute(f"PRAGMA page_size = {PAGE}")  # four answers for 1000 classes
            self._database.execute(f"PRAGMA cache_size = {-1024 * CACHE_MB}")
            self._database.execute(f"PRAGMA max_page_count = {max(1, int(gigabytes * 1e9 / PAGE))}")
            self._database.execute("CREATE TABLE IF NOT EXISTS answers (pixels BLOB PRIMARY KEY, logits BLOB NOT NULL)")
        except (OSError, sqlite3.OperationalError) as error:
            raise EnvironmentProblem(
                f"teacher.cache: {path} cannot be opened ({error}); give a writable folder of a file system with locks"
            ) from None
        except sqlite3.DatabaseError as error:
            raise HandoverError(f"teacher.cache: {path} holds no answers, or is damaged ({error}); delete it") from None
        self._reads = self._writes = True

    def __call__(self, images: Tensor) -> Tensor:
        pixels = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images.float().cpu()]
        answers = self._find(pixels)
        new = [i for i, key in enumerate(pixels) if key not in answers]
        if new:
            asked = self.teacher(images[new]).float().cpu().numpy()
            self.asked += len(new)
            fresh = {pixels[i]: answer.tobytes() for i, answer in zip(new, asked, strict=True)}
            self._keep(fresh)
            answers |= fresh
        rows = np.stack([np.frombuffer(answers[key], np.float32) for key in pixels])
        return torch.from_numpy(rows).to(images.device)

    def _find(self, pixels: list[bytes]) -> dict[bytes, bytes]:
        marks = ",".join("?" * len(pixels))
        try:
            if self._reads:
                return dict(self._database.execute(f"SELECT * FROM answers WHERE pixels IN ({marks})", pixels))
        except sqlite3.Error as error:
            self._reads = self._writes = False
            logger.warning("teacher.cache cannot be read (%s): the teacher answers for everything from here on", error)
        return {}

    def _keep(self, answers: dict[bytes, bytes]) -> None:
        try:
            if self._writes:
                with self._database:
                    self._database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", answers.items())
        except sqlite3.Error as error:
            self._writes = False
            logger.warning("teacher.cache takes no more answers (%s); teacher.cache_gb is its limit", error)
