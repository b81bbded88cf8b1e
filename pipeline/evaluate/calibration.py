"""Calibration (Guo et al. 2017): reliability, expected calibration error, and temperature scaling.

Bins have equal width over the confidence. ECE is the mean gap between confidence and accuracy, weighted by the images in a
bin. The temperature minimises the negative log-likelihood on a set that is not the evaluated one.

An export's temperature is found by `calibrate`, on the validation images. The rules for few of them are ours:

- Below FEWEST images it is 1: nothing can be said.
- Below SHARPENS_FROM images it is at least 1. A handful of wrong predictions shows that a model is too certain; a handful of
  right ones does not show that it is too uncertain. It costs something too: at five images the calibration error of logits
  that were right rises by 2 points on average, and that of logits four times too large falls by 7 (a test has the case).
- The loss of all images together has one term more, (log T)² / 2, so that a handful of right predictions does not make
  T tiny. It weighs as much as a single image or two, and is negligible from about fifty on.
- Cross-validation in FOLDS parts decides: the temperature is kept if temperatures that are fitted on the other parts
  lower the loss of each part on average; otherwise it is 1.
- What a run starts from may be a calibrated classifier of the same images. Its probabilities then count as START_COUNTS more
  images among the labels, so that a handful of validation images does not undo what is known. Many outweigh them.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

NUM_BINS = 15
_LIMITS = (-3.0, 3.0)  # log temperature: from a twentieth to twenty
_GOLDEN = (5**0.5 - 1) / 2
FEWEST = 5  # images below which no temperature is fitted
SHARPENS_FROM = 15  # images from which on a temperature may be below 1
FOLDS = 5
START_COUNTS = 10  # images that the probabilities of what a run started from count as


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


class Calibration(NamedTuple):
    """A temperature and how it was found.

    Attributes:
        temperature: What the logits are divided by; 1 changes nothing.
        words: How it was found, or why it is 1.
    """

    temperature: float = 1.0
    words: str = ""


def calibrate(
    logits: NDArray[np.float64], labels: NDArray[np.int64], start: NDArray[np.float64] | None = None
) -> Calibration:
    """Find the temperature of an export by its validation images, or 1 if they do not support another one.

    Args:
        logits: Logits (N, C).
        labels: True classes (N,).
        start: Probabilities (N, C) of the classifier that the run started from, calibrated; None if there is none.
    """
    number = len(labels)
    if number < FEWEST:
        return Calibration(1.0, f"not calibrated: {number} validation images, at least {FEWEST} are needed")
    least = 0.0 if number >= SHARPENS_FROM else 1.0
    targets = np.eye(logits.shape[1])[labels]
    if start is not None:
        targets = (number * targets + START_COUNTS * start) / (number + START_COUNTS)
    part = np.arange(number) % FOLDS  # samples are often sorted by class, so a part takes every fifth
    after = np.empty(number)
    for k in range(FOLDS):
        temperature = max(least, fit_temperature(logits[part != k], targets[part != k], prior=1.0))
        after[part == k] = losses(logits[part == k] / temperature, labels[part == k])
    before = losses(logits, labels).mean()
    compared = f"loss {before:.3f} before and {after.mean():.3f} after, cross-validated on {number} validation images"
    fitted = max(least, fit_temperature(logits, targets, prior=1.0))
    if fitted == 1 or not after.mean() < before:
        return Calibration(1.0, f"not calibrated, since a temperature would not help: {compared}")
    return Calibration(fitted, f"temperature {fitted:.3f}: {compared}")


def losses(logits: NDArray[np.float64], targets: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cross-entropy (N,), in nats, of logits (N, C) with true classes (N,) or probabilities (N, C)."""
    shifted = logits - logits.max(1, keepdims=True)
    known = shifted[np.arange(len(targets)), targets] if targets.ndim == 1 else (targets * shifted).sum(1)
    found: NDArray[np.float64] = np.log(np.exp(shifted).sum(1)) - known
    return found


def fit_temperature(logits: NDArray[np.float64], targets: NDArray[Any], *, prior: float = 0.0) -> float:
    """Find the temperature T that minimises the summed loss of logits / T plus prior (log T)² / 2, to about 1e-6.

    The loss is convex in 1 / T, so without the prior it has one minimum in log T, and golden-section search finds it.

    Args:
        logits: Logits (N, C).
        targets: True classes (N,) or probabilities (N, C).
        prior: Weight of the pull towards T = 1, in images.
    """

    def loss(log_temperature: float) -> float:
        own = losses(logits / np.exp(log_temperature), targets).sum()
        return float(own + prior * log_temperature**2 / 2)

    low, high = _LIMITS
    while high - low > 1e-7:
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if loss(left) <= loss(right) else (left, high)
    return float(np.exp((low + high) / 2))
