"""How a split was made, in words; every result quotes them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.config import SplitConfig


def describe(config: SplitConfig, num_classes: int, seed: int, *, rounded: bool) -> str:
    """Return the protocol in words.

    Args:
        config: The options.
        num_classes: Classes of the dataset.
        seed: Of the split.
        rounded: Whether a count was rounded.
    """
    phrases = []
    if config.n_1:
        rest = f"M_1 {config.m_1}, gamma_u {config.gamma_u:g}" if config.m_1 else "all others unlabelled"
        phrases.append(
            f"USB's long tail over {num_classes} classes: N_1 {config.n_1}, gamma_l {config.gamma_l:g}, {rest}"
        )
        if config.validation_per_class:
            phrases.append(f"{config.validation_per_class} per class held out for validation")
        return "; ".join([*phrases, f"seed {seed}"])
    if config.pool_list:
        phrases.append(f"only the samples of {_name(config.pool_list)}")
    if config.imbalance > 1:
        scope = "labelled and unlabelled alike" if config.scope == "both" else "the labelled samples only"
        size = "the largest class" if config.relative_to == "largest" else "each class's own size"
        phrases.append(
            f"{config.profile} imbalance {config.imbalance:g} of {size} over {num_classes} classes, head to tail by "
            f"{config.class_order}, {scope}"
        )
    if config.ood_classes:
        where = "labelled nor unlabelled" if config.ood_scope == "all" else "labelled, though unlabelled,"
        phrases.append(f"the last {config.ood_classes} classes neither {where} nor in validation")
    if config.labelled_list:
        phrases.append(f"labelled as in {_name(config.labelled_list)}")
    else:
        least = config.min_labelled_per_class
        how = f", rounded {'at random' if config.rounding == 'random' else 'to the nearest'}" if rounded else ""
        share = f"{config.labelled:.4g} of each class labelled, at least {least}{how}"
        if config.labelled < 1e-6:  # a number of labels, not a share of them
            share = f"{least} of each class labelled"
        phrases.append(share if config.labelled < 1 else "all labels used")
    if config.validation_per_class:
        phrases.append(f"{config.validation_per_class} per class held out for validation")
    return "; ".join([*phrases, f"seed {seed}"])


def _name(path: str) -> str:
    """Return the name of a file, with ? for bytes that are not UTF-8."""
    return Path(path).name.encode(errors="replace").decode()


def real_and_hidden(labels: NDArray[np.int64], hidden: NDArray[np.bool_]) -> str:
    """Say how many labels are real and how many of those are hidden; nothing where every sample has a label.

    Args:
        labels: (num_samples,) the class of each sample, -1 without a label.
        hidden: (num_samples,) which of them a split makes unlabelled.
    """
    known = labels >= 0
    if known.all():
        return ""
    real, kept = int(known.sum()), int((known & hidden).sum())
    return f"; {real} labels are real, {kept} of them hidden; {len(labels) - real} samples have no label"
