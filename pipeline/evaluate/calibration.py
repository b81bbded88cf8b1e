"""Calibration (Guo et al. 2017): reliability, expected calibration error, and temperature scaling.

Bins have equal width over the confidence. ECE is the mean gap between confidence and accuracy, weighted by the images in a
bin. The temperature minimises the negative log-likelihood on a set that is not the evaluated one.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 15
_LIMITS = (-3.0, 3.0)  # log temperature: from a twentieth to twenty
_GOLDEN = (5**0.5 - 1) / 2


class Bin(NamedTuple):
    """Samples whose confidence is in (low, low + 1 / NUM_BINS]; means are 0 in an empty bin."""

    low: float
    samples: int
    confidence: float
    accuracy: float


def reliability(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = NUM_BINS) -> list[Bin]:
    """Compute the bins of a reliability diagram.

    Args:
        confidence: Probability of the predicted class (N,).
        right: Whether the prediction is right (N,).
        bins: Number of bins.
    """
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(index, minlength=bins)
    known = np.maximum(count, 1)
    mean_confidence = np.bincount(index, weights=confidence, minlength=bins) / known
    accuracy = np.bincount(index, weights=right, minlength=bins) / known
    return [
        Bin(k / bins, int(n), float(c), float(a))
        for k, (n, c, a) in enumerate(zip(count, mean_confidence, accuracy, strict=True))
    ]


def expected_calibration_error(bins: list[Bin]) -> float:
    """Return the expected calibration error in percent."""
    total = max(1, sum(b.samples for b in bins))
    return 100.0 * sum(b.samples * abs(b.confidence - b.accuracy) for b in bins) / total


def fit_temperature(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Find the temperature T that minimises the mean loss of logits / T, to about 1e-6.

    The loss is convex in 1 / T, so it has one minimum in log T, and golden-section search finds it.

    Args:
        logits: Logits (N, C).
        labels: True classes (N,).
    """

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        scaled = scaled - scaled.max(1, keepdims=True)
        return float(np.mean(np.log(np.exp(scaled).sum(1)) - scaled[np.arange(len(labels)), labels]))

    low, high = _LIMITS
    while high - low > 1e-7:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return float(np.exp((low + high) / 2))
