"""How often each sample appears in an epoch, on average."""

import numpy as np
from numpy.typing import NDArray

from pipeline.streaming.config import LoaderConfig

Weights = NDArray[np.float64]
Classes = NDArray[np.int64]


def sample_weights(labels: Classes, config: LoaderConfig) -> tuple[Weights | None, Classes | None]:
    """Return how often each sample appears, by `config.sampling`.

    Args:
        labels: (N,) class of each sample.
        config: Says the rule and, for repeat_factor, its threshold.

    Returns:
        (N,) mean appearances per epoch, and (N,) the classes within which appearances are kept even. Both are None
        where each sample appears once.
    """
    rule = {"uniform": None, "class_balanced": _class_balanced, "repeat_factor": _repeat_factor}[config.sampling]
    if rule is None or not len(labels):
        return None, None
    return rule(labels, config), labels


def _class_balanced(labels: Classes, config: LoaderConfig) -> Weights:
    """Give every class that occurs the same share of an epoch of unchanged length."""
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / len(classes) / counts)[inverse]


def _repeat_factor(labels: Classes, config: LoaderConfig) -> Weights:
    """Repeat rare classes as LVIS does (Gupta et al. 2019): max(1, sqrt(t / f)) at frequency f; the epoch grows."""
    _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.maximum(1.0, np.sqrt(config.repeat_threshold * len(labels) / counts))[inverse]
