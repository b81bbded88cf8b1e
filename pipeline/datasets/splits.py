"""Which samples are labelled, unlabelled, held out: a file with a hash, the protocol in words, and its manifest.

The file is one line of JSON and one letter per manifest sample_index, so that any tool can count or compare splits.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import seeds
from pipeline.config import choose
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.imbalance import class_ranks, round_count, target_counts
from pipeline.datasets.lists import read_list
from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, DataError

VERSION = 1
LETTERS = {"labelled": b"L", "unlabelled": b"U", "validation": b"V", "unused": b"-"}
_SHUFFLE, _ROUND = 11, 12  # streams of random numbers


class Split:
    """Disjoint parts of one manifest's samples."""

    def __init__(self, header: dict[str, Any], letters: NDArray[np.bytes_], labels: NDArray[np.int64]) -> None:
        self.header, self.letters, self._labels = header, letters, labels

    @property
    def protocol(self) -> str:
        """How the split was made, in words; every result quotes it."""
        return self.header["protocol"]

    @functools.cached_property
    def content(self) -> bytes:
        """The file, byte for byte."""
        return json.dumps(self.header).encode() + b"\n" + self.letters.tobytes() + b"\n"

    @functools.cached_property
    def hash(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def part(self, name: str) -> NDArray[np.int64]:
        """Sorted manifest sample_indices of "labelled", "unlabelled", "validation" or "unused"."""
        return np.flatnonzero(self.letters == choose("part of a split", name, LETTERS))

    def counts(self, name: str) -> NDArray[np.int64]:
        """(num_classes,) samples of each class in a part, by the manifest's labels."""
        labels = self._labels[self.part(name)]
        return np.bincount(labels[labels >= 0], minlength=self.header["num_classes"])


def make_split(manifest: Manifest, config: SplitConfig, seed: int) -> Split:
    """Validation first, then the imbalance, then the label fraction; each class on its own random streams."""
    labels, num_classes = manifest.labels, len(manifest.classes)
    if (labels < 0).any() or num_classes < 2:
        raise DataError(f"{manifest.folder} has samples without a label, or a single class: nothing to split by class")
    pool, pool_hash = _listed(config.pool_list, manifest, default=True)
    listed, listed_hash = _listed(config.labelled_list, manifest, default=False)
    sizes = np.bincount(labels[pool], minlength=num_classes)
    ranks = class_ranks(sizes, config.class_order, seed)
    outside = ranks >= num_classes - config.ood_classes
    letters = np.full(manifest.num_samples, LETTERS["unused"])
    members = [_shuffled_members(c, labels, pool, listed, seed) for c in range(num_classes)]
    for c in np.flatnonzero(~outside).tolist():
        held_out, members[c] = _hold_out(members[c], listed, config, manifest.classes[c])
        letters[held_out] = LETTERS["validation"]
    targets = target_counts(np.array([len(m) for m in members]), ranks, config)
    for c in range(num_classes):
        draws = seeds.uniforms(2, seed, c, _ROUND)
        kept = min(len(members[c]), max(1, round_count(targets[c], config.rounding, draws[0])))
        if outside[c]:
            known, kept = 0, 0 if config.ood_scope == "all" else kept
        elif config.labelled_list:
            known = int(listed[members[c]].sum())
        else:
            wanted = round_count(config.labelled * kept, config.rounding, draws[1])
            known = min(kept, max(config.min_labelled_per_class, wanted))
        letters[members[c][:known]] = LETTERS["labelled"]
        letters[members[c][known:kept]] = LETTERS["unlabelled"]
    if config.scope == "labelled":
        barred = outside[labels] & (config.ood_scope == "all")
        letters[(letters == LETTERS["unused"]) & ~barred] = LETTERS["unlabelled"]
    header = {
        "version": VERSION,
        "manifest": manifest.hash,
        "num_classes": num_classes,
        "protocol": describe(config, num_classes, seed),
        "config": config.model_dump(mode="json") | {"pool_list": pool_hash, "labelled_list": listed_hash},
        "seed": seed,
        "class_ranks": ranks.tolist(),
        "ood_classes": np.flatnonzero(outside).tolist(),
    }
    return Split(header, letters, labels)


def _listed(path: str, manifest: Manifest, default: bool) -> tuple[NDArray[np.bool_], str]:
    """(num_samples,) whether a sample is in the list, and the list's sha256; all `default` without a list."""
    mask = np.full(manifest.num_samples, default)
    if not path:
        return mask, ""
    sample_indices, digest = read_list(Path(path), manifest)
    mask[:] = False
    mask[sample_indices] = True
    return mask, digest


def _shuffled_members(
    c: int, labels: NDArray[np.int64], pool: NDArray[np.bool_], listed: NDArray[np.bool_], seed: int
) -> NDArray[np.int64]:
    """The sample_indices of class `c` in random order, those of a published list in front."""
    members = np.flatnonzero((labels == c) & pool)
    members = members[seeds.permutation(len(members), seed, c, _SHUFFLE)]
    return members[np.argsort(~listed[members], kind="stable")]


def _hold_out(
    members: NDArray[np.int64], listed: NDArray[np.bool_], config: SplitConfig, name: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Validation samples, never listed ones, and the rest."""
    free = members[~listed[members]]
    held_out = free[: config.validation_per_class]
    rest = members[~np.isin(members, held_out)]
    if len(held_out) < config.validation_per_class or (len(held_out) and not len(rest)):
        raise ConfigError(
            f"validation_per_class = {config.validation_per_class} leaves nothing to train on in class {name!r}, "
            f"which has {len(free)} samples to choose from; lower it"
        )
    return held_out, rest


def describe(config: SplitConfig, num_classes: int, seed: int) -> str:
    """The protocol as a sentence."""
    parts = []
    if config.pool_list:
        parts.append(f"only the samples of {Path(config.pool_list).name}")
    if config.imbalance > 1:
        scope = "labelled and unlabelled alike" if config.scope == "both" else "the labelled part only"
        size = "the largest class" if config.relative_to == "largest" else "each class's own size"
        parts.append(
            f"{config.profile} imbalance {config.imbalance:g} of {size} over {num_classes} classes, head to tail by "
            f"{config.class_order}, {scope}"
        )
    if config.ood_classes:
        where = "labelled nor unlabelled" if config.ood_scope == "all" else "labelled, though unlabelled,"
        parts.append(f"the last {config.ood_classes} classes neither {where} nor in validation")
    if config.labelled_list:
        parts.append(f"labelled as in {Path(config.labelled_list).name}")
    else:
        least = config.min_labelled_per_class
        how = "at random" if config.rounding == "random" else "to the nearest"
        parts.append(f"{config.labelled:.4g} of each class labelled, at least {least}, rounded {how}")
    if config.validation_per_class:
        parts.append(f"{config.validation_per_class} per class held out for validation")
    return "; ".join([*parts, f"seed {seed}"])


def write_split(split: Split, path: Path) -> None:
    """Write all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(split.content)
    partial.replace(path)


def read_split(path: Path, manifest: Manifest) -> Split:
    """DataError if the file is missing, damaged, or was made for another dataset."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"split {path} does not exist; make it with `python -m pipeline.data split`")
    first, _, rest = path.read_bytes().partition(b"\n")
    try:
        header = json.loads(first)
        made_for, version = header["manifest"], header["version"]
        text = header["protocol"], header["num_classes"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"split {path} is damaged ({type(error).__name__}: {error}); make it again") from None
    if version != VERSION or made_for != manifest.hash:
        raise DataError(
            f"split {path} was made for another dataset (manifest {str(made_for)[:12]}, {manifest.folder} has "
            f"{manifest.hash[:12]}); make a split of this one"
        )
    letters = np.frombuffer(rest.removesuffix(b"\n"), "S1")
    known = np.isin(letters, list(LETTERS.values())).all()
    if len(letters) != manifest.num_samples or not known or text[1] != len(manifest.classes):
        raise DataError(f"split {path} is damaged: {len(letters)} letters for {manifest.num_samples} samples")
    return Split(header, letters, manifest.labels)
