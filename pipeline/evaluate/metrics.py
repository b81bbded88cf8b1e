"""Everything that is said of a classifier, from one table of its answers; and the mean of any loss over a set."""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.evaluate.bootstrap import intervals
from pipeline.evaluate.calibration import expected_calibration_error, reliability
from pipeline.evaluate.open_set import open_set
from pipeline.evaluate.predictions import LabelledBatch, Predictions

Groups = Mapping[str, np.ndarray]


def summary(answers: Predictions, num_classes: int, groups: Groups) -> dict[str, float]:
    """In percent: top1 and top5 over samples, balanced over classes, the mean class of each group that has
    samples, and the calibration error; the mean loss in nats."""
    table = answers.confusion(num_classes)
    per_class = per_class_accuracy(table)
    right = answers.predicted == answers.labels
    result = {
        "top1": 100.0 * table.trace() / max(1, table.sum()),
        "top5": 100.0 * float(np.mean(answers.place < 5)),
        "balanced": _mean(per_class),
    }
    result |= {
        name: _mean(found) for name, classes in groups.items() if not np.isnan(found := per_class[classes]).all()
    }
    result["ece"] = expected_calibration_error(reliability(answers.confidence, right))
    result["nll"] = float(np.mean(answers.loss))
    return result


def per_class_accuracy(table: np.ndarray) -> np.ndarray:
    """Percent of each class's samples that are called by their name; NaN for a class without samples."""
    total = table.sum(1)
    return np.where(total > 0, 100.0 * table.diagonal() / np.maximum(total, 1), np.nan)


def report(answers: Predictions, groups: Groups, classes: tuple[str, ...]) -> dict[str, Any]:
    """Everything about one model on one set, for evaluation.json. A class without samples has no accuracy (None)."""
    table = answers.confusion(len(classes))
    right = answers.predicted == answers.labels
    bounds = intervals(table.diagonal(), table.sum(1), groups)
    return {
        **summary(answers, len(classes), groups),
        **open_set(table, groups),
        "samples": len(answers.labels),
        "intervals": {name: [round(i.low, 4), round(i.high, 4)] for name, i in bounds.items()},
        "groups": {name: [classes[c] for c in members] for name, members in groups.items()},
        "per_class": {
            name: None if np.isnan(a) else round(float(a), 4)
            for name, a in zip(classes, per_class_accuracy(table), strict=True)
        },
        "reliability": [b._asdict() for b in reliability(answers.confidence, right)],
        "confusion": table.tolist(),
    }


def write_per_class(path: Path, answers: Predictions, classes: tuple[str, ...], trained_on: tuple[int, ...]) -> None:
    """A CSV, one line a class: samples, right answers, accuracy, the class it is most often mistaken for."""
    table = answers.confusion(len(classes))
    mistakes = table - np.diag(table.diagonal())
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "labelled_in_training", "samples", "right", "accuracy", "mistaken_for", "times"])
        for c, name in enumerate(classes):
            worst = int(mistakes[c].argmax())
            total, times = int(table[c].sum()), int(mistakes[c, worst])
            accuracy = f"{100 * table[c, c] / total:.4f}" if total else ""
            labelled = trained_on[c] if trained_on else ""
            writer.writerow([name, labelled, total, table[c, c], accuracy, classes[worst] if times else "", times])


@torch.no_grad()
def mean_loss(
    model: nn.Module, batches: Iterable[LabelledBatch], loss: Callable[[Tensor, Tensor], Tensor], device: torch.device
) -> float:
    """Mean over samples and ranks of loss(model(images), images) -> (B,) (collective)."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for batch in batches:
        images = batch.images.to(device)
        values = loss(model(images), images)[batch.indices.to(device) >= 0]
        sums += torch.stack([values.double().sum(), sums.new_tensor(len(values))])
    model.train(was_training)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(sums)
    total, count = sums.tolist()
    return total / max(1.0, count)


def _mean(values: np.ndarray) -> float:
    return float(values[~np.isnan(values)].mean())
