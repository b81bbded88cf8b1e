"""Cross-validation for labels that are too few to hold any out: each label is held out once, in one of several splits.

A split of all labels stays as it is, and trains the models that are kept. The splits of the folds only estimate how well such
models do: the labelled samples of each class are dealt into parts, and in each split one part is the validation subset.
"""

from pathlib import Path

import numpy as np

from pipeline import seeds
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.splits import CODES, Split
from pipeline.errors import ConfigError

FEW_LABELS = 5  # with so few labels a class, holding one out costs a fifth of what is learnt, and tells little
_DEAL = 13  # stream of random numbers


def make_folds(split: Split, manifest: Manifest, count: int, seed: int) -> list[Split]:
    """Deal the labelled samples of a split into `count` parts, and return a split for each, which holds its part out.

    A class with a single label is never held out, since no model could then know it. Parts differ by at most one sample.

    Args:
        split: A split without a validation subset.
        manifest: Its dataset.
        count: How many parts.
        seed: Of the order in which samples are dealt.

    Raises:
        ConfigError: The split has a validation subset, or there are fewer labels to deal than parts, or than two parts.
    """
    if count < 2:
        raise ConfigError(f"--folds {count}: cross-validation needs 2 parts or more")
    if len(split.subset("validation")):
        raise ConfigError("--folds holds every label out once; leave out --validation-per-class")
    part = np.full(manifest.num_samples, -1)
    labelled = split.subset("labelled")
    dealt = 0
    for c in range(len(manifest.classes)):
        members = labelled[manifest.labels[labelled] == c]
        if len(members) > 1:
            members = members[seeds.permutation(len(members), seed, c, _DEAL)]
            part[members] = (dealt + np.arange(len(members))) % count
            dealt += len(members)
    if dealt < count:
        raise ConfigError(f"--folds {count}: only {dealt} labels can be held out; give at most {dealt}")
    alone = len(labelled) - dealt
    extra = f"; {alone} classes with one label are never held out" if alone else ""
    folds = []
    for k in range(count):
        codes = split.codes.copy()
        codes[part == k] = CODES["validation"]
        protocol = f"{split.protocol}; part {k + 1} of {count} of the labels held out for cross-validation{extra}"
        folds.append(
            Split(split.header | {"protocol": protocol, "folds": [k + 1, count, seed]}, codes, manifest.labels)
        )
    return folds


def fold_path(path: Path, number: int, count: int) -> Path:
    """Return the file of a fold's split, counted from 1, beside the split of all labels."""
    return path.with_name(f"{path.stem}-fold{number}of{count}{path.suffix}")


def advice(split: Split) -> str:
    """Return a sentence where labels are few: what validation costs, or what its absence means; empty otherwise."""
    learnt, held_out = split.counts("labelled"), int(split.counts("validation").sum())
    few = int(learnt[learnt > 0].min(initial=FEW_LABELS + 1))
    if few > FEW_LABELS:
        return ""
    labels = f"{few} label{'s' if few > 1 else ''}"
    if held_out:
        return (
            f"note: a class has only {labels} left to learn, and {held_out} of {held_out + int(learnt.sum())} labels are spent on"
            " validation; --folds 5 in place of --validation-per-class lets every label be learnt"
        )
    return (
        f"note: a class has only {labels}, so none is held out for validation, and accuracy is known only with a test set;"
        " --folds 5 estimates it by cross-validation, which costs 5 more trainings of stages 2 and 3"
    )
