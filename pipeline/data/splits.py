"""Which samples are labelled, unlabelled, held out: a file with a hash, the protocol in words, and its manifest.

The file is one line of JSON and one letter per manifest position, so that any tool can count or compare splits.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config import choose
from pipeline.data import seeds
from pipeline.data.config import SplitConfig
from pipeline.data.imbalance import class_ranks, round_randomly, target_counts
from pipeline.data.manifest import Manifest
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
        """Sorted manifest positions of "labelled", "unlabelled", "validation" or "unused"."""
        return np.flatnonzero(self.letters == choose("part of a split", name, LETTERS))

    def counts(self, name: str) -> NDArray[np.int64]:
        """(num_classes,) samples of each class in a part, by the manifest's labels."""
        labels = self._labels[self.part(name)]
        return np.bincount(labels[labels >= 0], minlength=self.header["num_classes"])


def make_split(manifest: Manifest, config: SplitConfig, seed: int) -> Split:
    """Validation first, then the imbalance, then the label fraction; each class on its own random stream."""
    labels, num_classes = manifest.labels, len(manifest.classes)
    if (labels < 0).any() or num_classes < 2:
        raise DataError(f"{manifest.folder} has samples without a label, or a single class: nothing to split by class")
    pools = []
    letters = np.full(manifest.num_samples, LETTERS["unused"])
    for c in range(num_classes):
        members = np.flatnonzero(labels == c)
        members = members[seeds.permutation(len(members), seed, c, _SHUFFLE)]
        held_out, pool = np.split(members, [config.validation_per_class])
        if len(held_out) < config.validation_per_class or not len(pool):
            raise ConfigError(
                f"validation_per_class = {config.validation_per_class} leaves nothing to train on in class "
                f"{manifest.classes[c]!r}, which has {len(members)} samples; lower it"
            )
        letters[held_out] = LETTERS["validation"]
        pools.append(pool)
    available = np.array([len(pool) for pool in pools])
    ranks = class_ranks(available, config.class_order, seed)
    targets = target_counts(available, ranks, config.imbalance)
    for c, pool in enumerate(pools):
        rng = seeds.uniforms(2, seed, c, _ROUND)
        kept = min(len(pool), max(1, round_randomly(targets[c], rng[0])))
        known = min(kept, max(config.min_labelled_per_class, round_randomly(config.labelled * kept, rng[1])))
        letters[pool[:known]] = LETTERS["labelled"]
        letters[pool[known:kept]] = LETTERS["unlabelled"]
    header = {
        "version": VERSION,
        "manifest": manifest.hash,
        "num_classes": num_classes,
        "protocol": describe(config, num_classes, seed),
        "config": config.model_dump(mode="json"),
        "seed": seed,
        "class_ranks": ranks.tolist(),
    }
    return Split(header, letters, labels)


def describe(config: SplitConfig, num_classes: int, seed: int) -> str:
    """The protocol as a sentence."""
    parts = []
    if config.imbalance > 1:
        parts.append(
            f"exponential imbalance {config.imbalance:g} over {num_classes} classes, head to tail by "
            f"{config.class_order}, labelled and unlabelled alike"
        )
    least = config.min_labelled_per_class
    parts.append(f"{config.labelled:.4g} of each class labelled, at least {least}, rounded at random")
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
