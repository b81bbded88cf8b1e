"""How often a sample appears in an epoch, on average."""

import numpy as np
from numpy.typing import NDArray

from pipeline.streaming.config import LoaderConfig

Weights = NDArray[np.float64]
Classes = NDArray[np.int64]


def sample_weights(labels: Classes, config: LoaderConfig) -> tuple[Weights | None, Classes | None]:
    """Mean appearances per epoch and the classes to keep even among; None where each sample appears once."""
    rule = {"uniform": None, "class_balanced": _class_balanced, "repeat_factor": _repeat_factor}[config.sampling]
    if rule is None or not len(labels):
        return None, None
    return rule(labels, config), labels


def _class_balanced(labels: Classes, config: LoaderConfig) -> Weights:
    """Every class that occurs has the same share of an epoch of unchanged length."""
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / len(classes) / counts)[inverse]


def _repeat_factor(labels: Classes, config: LoaderConfig) -> Weights:
    """LVIS (Gupta et al. 2019): max(1, sqrt(t / f)) for a class of frequency f; the epoch grows accordingly."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.maximum(1.0, np.sqrt(config.repeat_threshold * len(labels) / counts))[inverse]
