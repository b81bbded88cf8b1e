"""What a classifier says of every sample: asked once, kept per sample, so that every number is computed from one table.

A sample stands in the same batch at every world size (`data.loader.evaluation_batches`), so its answer, and each number
made of the answers, is the same on one process and on many.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn


class LabelledBatch(Protocol):
    """Samples; an index below 0 is padding, there so that all ranks take equally many steps."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...
    @property
    def indices(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One row a sample, in the order of their sample_indices."""

    sample_indices: NDArray[np.int64]  # in the manifest
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    place: NDArray[np.int64]  # of the true class: how many classes scored higher, 0 if none did
    confidence: NDArray[np.float64]  # softmax probability of the predicted class
    loss: NDArray[np.float64]  # -log softmax probability of the true class, in nats

    def confusion(self, num_classes: int) -> NDArray[np.int64]:
        """(C, C) counts, true class by predicted class."""
        cells = self.labels * num_classes + self.predicted
        return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)

    def save(self, path: Path) -> None:
        """For comparisons sample by sample, as paired tests need them: a .npz with a row a sample."""
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                sample_indices=self.sample_indices,
                labels=self.labels,
                predicted=self.predicted,
                place=self.place,
                confidence=self.confidence.astype(np.float32),
                loss=self.loss.astype(np.float32),
            )

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        with np.load(path, allow_pickle=False) as stored:
            return cls(**{name: stored[name] for name in cls.__dataclass_fields__})


@torch.no_grad()
def ask(
    model: nn.Module, batches: Iterable[LabelledBatch], device: torch.device, *, temperature: float = 1.0
) -> Predictions:
    """The answers to all samples over all ranks, equal on each (collective); the logits are divided by `temperature`."""
    was_training = model.training
    model.eval()
    rows = []
    for batch in batches:
        logits = model(batch.images.to(device)).float() / temperature
        labels = batch.labels.to(device).clamp(min=0)
        own = logits.gather(1, labels[:, None])
        confidence, predicted = F.softmax(logits, dim=-1).max(-1)
        columns = (
            batch.indices.to(device),
            batch.labels.to(device),
            predicted,
            (logits > own).sum(1),
            confidence,
            F.cross_entropy(logits, labels, reduction="none"),
        )
        rows.append(torch.stack([c.double() for c in columns], dim=1))  # fp64 holds sample_indices up to 2^53
    model.train(was_training)
    table = gather(torch.cat(rows) if rows else torch.zeros(0, 6, dtype=torch.float64, device=device)).cpu().numpy()
    table = table[table[:, 0] >= 0]
    table = table[np.argsort(table[:, 0], kind="stable")]
    sample_indices, labels, predicted, place = table[:, :4].astype(np.int64).T
    return Predictions(
        sample_indices=sample_indices,
        labels=labels,
        predicted=predicted,
        place=place,
        confidence=table[:, 4],
        loss=table[:, 5],
    )


@torch.no_grad()
def collect(
    model: nn.Module, batches: Iterable[LabelledBatch], device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels (N,) and outputs (N, C) of all samples over all ranks, in the order of their sample_indices (collective)."""
    was_training = model.training
    model.eval()
    keys, outputs = [], []
    for batch in batches:
        outputs.append(model(batch.images.to(device)).float())
        keys.append(torch.stack([batch.indices, batch.labels], dim=1).to(device))
    model.train(was_training)
    key, output = gather(torch.cat(keys)).cpu().numpy(), gather(torch.cat(outputs)).cpu().numpy()
    order = np.argsort(key[:, 0], kind="stable")
    order = order[key[order, 0] >= 0]
    return key[order, 1], output[order].astype(np.float64)


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, which have equally many, rank after rank (collective)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
