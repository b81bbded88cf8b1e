"""What a classifier predicts for every sample, kept per sample, so that every metric is computed from one table.

Evaluation batches do not depend on the world size (`streaming.loader.evaluation_batches`). So the prediction for a sample,
and each metric, is the same on one process and on many.
"""

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.errors import DataError, first_line
from pipeline.files import open_regular, replacing

# What numpy and the zip archive around its arrays raise for damaged bytes.
_DAMAGED = (OSError, ValueError, KeyError, MemoryError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error)


class LabelledBatch(Protocol):
    """A batch of samples; an index below 0 marks padding, which lets all ranks take equally many steps."""

    @property
    def images(self) -> Tensor:
        """Images (B, 3, H, W)."""

    @property
    def labels(self) -> Tensor:
        """Class of each sample (B,)."""

    @property
    def indices(self) -> Tensor:
        """Sample index of each sample (B,), below 0 for padding."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One row per sample, sorted by sample index.

    Attributes:
        sample_indices: Rows of the manifest (N,).
        labels: True classes (N,).
        predicted: Predicted classes (N,).
        label_rank: Number of classes that score higher than the true one (N,); 0 if the prediction is right.
        confidence: Softmax probability of the predicted class (N,).
        loss: -log softmax probability of the true class (N,), in nats.
    """

    sample_indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    label_rank: NDArray[np.int64]
    confidence: NDArray[np.float64]
    loss: NDArray[np.float64]

    def confusion(self, num_classes: int) -> NDArray[np.int64]:
        """Count samples by true class and predicted class: (C, C)."""
        cells = self.labels * num_classes + self.predicted
        return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)

    def save(self, path: Path) -> None:
        """Write a .npz with one row per sample, whole or not at all, for comparisons sample by sample such as paired tests."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                sample_indices=self.sample_indices,
                labels=self.labels,
                predicted=self.predicted,
                label_rank=self.label_rank,
                confidence=self.confidence.astype(np.float32),
                loss=self.loss.astype(np.float32),
            )

    @classmethod
    def load(cls, path: Path, num_classes: int) -> "Predictions":
        """Read what `save` wrote.

        Args:
            path: The file.
            num_classes: How many classes the predictions are of.

        Raises:
            DataError: It is missing or damaged, or of other classes.
        """
        again = "evaluate the model again"
        try:
            with open_regular(path) as file, np.load(file, allow_pickle=False) as stored:
                found = cls(**{name: stored[name] for name in cls.__dataclass_fields__})
        except _DAMAGED as error:
            raise DataError(f"{path} is damaged ({first_line(error, 100)}); {again}") from None
        columns = [getattr(found, name) for name in cls.__dataclass_fields__]
        numbers = all(column.dtype.kind in "biuf" for column in columns)
        if not numbers or {column.shape for column in columns} != {found.labels.shape} or found.labels.ndim != 1:
            raise DataError(f"{path} is damaged (it is no table of predictions); {again}")
        classes = np.concatenate([found.labels, found.predicted, np.zeros(1, int)])
        if classes.min() < 0 or classes.max() >= num_classes or not all(np.isfinite(c).all() for c in columns):
            raise DataError(
                f"{path} is damaged (it has other classes than {num_classes}, or no finite numbers); {again}"
            )
        return found


def predict(
    model: nn.Module, batches: Iterable[LabelledBatch], device: torch.device, *, temperature: float = 1.0
) -> Predictions:
    """Predict all samples over all ranks (collective).

    Args:
        model: A classifier; it runs in eval mode and is left in the mode it had.
        batches: This rank's share, as many batches on every rank.
        device: Where the model is.
        temperature: Divides the logits.

    Returns:
        The predictions for all samples, equal on every rank.
    """
    return predict_at(model, batches, device, [temperature])[0]


@torch.no_grad()
def predict_at(
    model: nn.Module, batches: Iterable[LabelledBatch], device: torch.device, temperatures: Sequence[float]
) -> list[Predictions]:
    """Predict as `predict` does, at several temperatures in one pass; they differ in confidence and loss (collective)."""
    was_training = model.training
    model.eval()
    rows = []
    for batch in batches:
        logits = model(batch.images.to(device)).float()
        labels = batch.labels.to(device).clamp(min=0)
        own = logits.gather(1, labels[:, None])
        columns = [batch.indices.to(device), batch.labels.to(device), logits.argmax(-1), (logits > own).sum(1)]
        for temperature in temperatures:
            scaled = logits / temperature
            columns.append(F.softmax(scaled, dim=-1).amax(-1))
            columns.append(F.cross_entropy(scaled, labels, reduction="none"))
        rows.append(torch.stack([c.double() for c in columns], dim=1))  # fp64 holds sample indices up to 2^53
    model.train(was_training)
    width = 4 + 2 * len(temperatures)
    table = gather(torch.cat(rows) if rows else torch.zeros(0, width, dtype=torch.float64, device=device)).cpu().numpy()
    table = table[table[:, 0] >= 0]
    table = table[np.argsort(table[:, 0], kind="stable")]
    sample_indices, labels, predicted, label_rank = table[:, :4].astype(np.int64).T
    return [
        Predictions(
            sample_indices=sample_indices,
            labels=labels,
            predicted=predicted,
            label_rank=label_rank,
            confidence=table[:, 4 + 2 * k],
            loss=table[:, 5 + 2 * k],
        )
        for k in range(len(temperatures))
    ]


@torch.no_grad()
def collect_logits(
    model: nn.Module, batches: Iterable[LabelledBatch], device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return labels (N,) and logits (N, C) of all samples over all ranks, sorted by sample index (collective)."""
    was_training = model.training
    model.eval()
    keys, logits = [], []
    for batch in batches:
        logits.append(model(batch.images.to(device)).float())
        keys.append(torch.stack([batch.indices, batch.labels], dim=1).to(device))
    model.train(was_training)
    key, values = gather(torch.cat(keys)).cpu().numpy(), gather(torch.cat(logits)).cpu().numpy()
    order = np.argsort(key[:, 0], kind="stable")
    order = order[key[order, 0] >= 0]
    return key[order, 1], values[order].astype(np.float64)


def gather(rows: Tensor) -> Tensor:
    """Concatenate the rows of all ranks, which have equally many, in the order of the ranks (collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, rows.contiguous())
    return torch.cat(gathered)
