"""Metrics of a classifier, all computed from one table of its predictions; and the mean of any loss over a set."""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.evaluate.bootstrap import intervals
from pipeline.evaluate.calibration import Calibration, expected_calibration_error, reliability
from pipeline.evaluate.open_set import open_set
from pipeline.evaluate.predictions import LabelledBatch, Predictions
from pipeline.files import replacing

Groups = Mapping[str, np.ndarray]


def summary(predictions: Predictions, num_classes: int, groups: Groups) -> dict[str, float]:
    """Compute the main metrics.

    Returns:
        In percent: `top1` and `top5` over samples, `balanced` (the mean of the classes' accuracies), the same mean for each
        group that has samples, and `ece`, the expected calibration error. In nats: `nll`, the mean loss.
    """
    table = predictions.confusion(num_classes)
    per_class = per_class_accuracy(table)
    right = predictions.predicted == predictions.labels
    result = {
        "top1": 100.0 * table.trace() / max(1, table.sum()),
        "top5": 100.0 * float(np.mean(predictions.label_rank < 5)),
        "balanced": _mean(per_class),
    }
    result |= {
        name: _mean(found) for name, classes in groups.items() if not np.isnan(found := per_class[classes]).all()
    }
    result["ece"] = expected_calibration_error(reliability(predictions.confidence, right))
    result["nll"] = float(np.mean(predictions.loss))
    return result


def per_class_accuracy(table: np.ndarray) -> np.ndarray:
    """Return the accuracy of each class (C,) in percent from a confusion (C, C); NaN for a class without samples."""
    total = table.sum(1)
    return np.where(total > 0, 100.0 * table.diagonal() / np.maximum(total, 1), np.nan)


def report(predictions: Predictions, groups: Groups, classes: tuple[str, ...]) -> dict[str, Any]:
    """Compute all metrics of one model on one set, for evaluation.json.

    A class without samples has no accuracy (None).
    """
    table = predictions.confusion(len(classes))
    right = predictions.predicted == predictions.labels
    bounds = intervals(table.diagonal(), table.sum(1), groups)
    return {
        **summary(predictions, len(classes), groups),
        **open_set(table, groups),
        "samples": len(predictions.labels),
        "intervals": {name: [round(i.low, 4), round(i.high, 4)] for name, i in bounds.items()},
        "groups": {name: [classes[c] for c in members] for name, members in groups.items()},
        "per_class": {
            name: None if np.isnan(a) else round(float(a), 4)
            for name, a in zip(classes, per_class_accuracy(table), strict=True)
        },
        "reliability": [b._asdict() for b in reliability(predictions.confidence, right)],
        "confusion": table.tolist(),
    }


def report_calibrated(
    raw: Predictions, calibrated: Predictions, groups: Groups, classes: tuple[str, ...], calibration: Calibration
) -> dict[str, Any]:
    """Compute what `report` does of the calibrated predictions, and beside it their temperature.

    `ece_raw` and `nll_raw` are those of the raw predictions, at temperature 1.
    """
    before = summary(raw, len(classes), groups)
    return {
        **report(calibrated, groups, classes),
        "temperature": calibration.temperature,
        "calibration": calibration.words,
        "ece_raw": before["ece"],
        "nll_raw": before["nll"],
    }


def write_per_class(
    path: Path, predictions: Predictions, classes: tuple[str, ...], trained_on: tuple[int, ...]
) -> None:
    """Write a CSV with one line per class.

    Args:
        path: The file.
        predictions: Predictions of one model.
        classes: Names of the classes (C,).
        trained_on: Labelled training images of each class (C,); empty if unknown.
    """
    table = predictions.confusion(len(classes))
    mistakes = table - np.diag(table.diagonal())
    with replacing(path) as temporary, temporary.open("w", newline="") as file:
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
    """Average a loss over samples and ranks (collective).

    Args:
        model: The model; it runs in eval mode and is left in the mode it had.
        batches: This rank's share, as many batches on every rank; padding is left out.
        loss: Takes the model's output and the images, and returns a value per image (B,).
        device: Where the model is.
    """
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
