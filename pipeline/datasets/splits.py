"""Which samples are labelled, unlabelled or held out for validation.

A split is a JSON file of one object with one key a line: the protocol in words, its options and seed, the hash of the
manifest, `codes`, a string with one code per sample in the order of the manifest: L (labelled), U (unlabelled), V (validation)
or - (unused), and last the split's hash, which finds damage. So any tool can count and compare splits, and the file takes
one byte per sample. A split that another tool has written or changed may leave the hash out.
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
from pipeline.datasets.imbalance import class_ranks, head_counts, round_count, target_counts
from pipeline.datasets.lists import read_list
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.protocol import describe, real_and_hidden
from pipeline.errors import ConfigError, DataError
from pipeline.files import read_regular, replace_bytes

VERSION = 2
CODES = {"labelled": b"L", "unlabelled": b"U", "validation": b"V", "unused": b"-"}
_FIELDS = {"version", "manifest", "num_classes", "protocol", "config", "seed", "class_ranks", "ood_classes", "folds"}
_SHUFFLE, _ROUND = 11, 12  # streams of random numbers


class Split:
    """Disjoint subsets of the samples of one manifest.

    Args:
        header: Everything in the file except the codes.
        codes: (num_samples,) code of each sample, one of the values of `CODES`.
        labels: (num_samples,) class of each sample by the manifest.
    """

    def __init__(self, header: dict[str, Any], codes: NDArray[np.bytes_], labels: NDArray[np.int64]) -> None:
        self.header, self.codes, self._labels = header, codes, labels

    @property
    def protocol(self) -> str:
        """How the split was made, in words; every result quotes it."""
        return self.header["protocol"]

    @functools.cached_property
    def content(self) -> bytes:
        """The file, byte for byte."""
        return self._lines({"sha256": self.hash})

    @functools.cached_property
    def hash(self) -> str:
        """SHA-256 of the content without the hash itself; every result carries it."""
        return hashlib.sha256(self._lines({})).hexdigest()

    def _lines(self, seal: dict[str, str]) -> bytes:
        fields = self.header | {"codes": self.codes.tobytes().decode()} | seal
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
        return f"{{\n{lines}\n}}\n".encode()

    def subset(self, name: str) -> NDArray[np.int64]:
        """Return the sorted sample indices of "labelled", "unlabelled", "validation" or "unused"."""
        return np.flatnonzero(self.codes == choose("subset of a split", name, CODES))

    def counts(self, name: str) -> NDArray[np.int64]:
        """Return (num_classes,) how many samples of each class a subset has, by the manifest's labels."""
        labels = self._labels[self.subset(name)]
        return np.bincount(labels[labels >= 0], minlength=self.header["num_classes"])


def make_split(manifest: Manifest, config: SplitConfig, seed: int) -> Split:
    """Choose the validation samples first, then the imbalance, then the labelled ones.

    Each class draws from random streams of its own, so a class's samples do not depend on the other classes.

    A sample without a label is unlabelled, unless a pool list leaves it out.

    Raises:
        DataError: No sample has a label, or there is a single class.
        ConfigError: A class has too few samples for `config.validation_per_class`, or the labelled list names samples
            without a label.
    """
    labels, num_classes = manifest.labels, len(manifest.classes)
    has_label = labels >= 0
    if not has_label.any() or num_classes < 2:
        raise DataError(
            f"{manifest} has {int(has_label.sum())} samples with a label, of {num_classes} classes; a split chooses among the"
            " labels of two classes or more, so name a dataset with labels too. Stage 1 needs no split: leave out data.split"
        )
    pool, pool_hash = _listed(config.pool_list, manifest, default=True)
    listed, listed_hash = _listed(config.labelled_list, manifest, default=False)
    if nameless := int((listed & ~has_label).sum()):
        raise ConfigError(
            f"--labelled-list {config.labelled_list} names {nameless} samples that have no label in {manifest}; remove them"
        )
    sizes = np.bincount(labels[pool & has_label], minlength=num_classes)
    ranks = class_ranks(sizes, config.class_order, seed)
    if config.n_1:
        codes = _usb_codes(manifest, config, seed)
        return Split(_header(manifest, config, seed, codes, ranks, ranks < 0, rounded=False), codes, labels)
    outside = ranks >= num_classes - config.ood_classes
    codes = np.full(manifest.num_samples, CODES["unused"])
    members = [_shuffled_members(c, labels, pool, listed, seed) for c in range(num_classes)]
    known_classes = np.flatnonzero(~outside).tolist()
    _check_validation([members[c] for c in known_classes], listed, config, [manifest.classes[c] for c in known_classes])
    for c in known_classes:
        free = members[c][~listed[members[c]]]
        held_out = free[: config.validation_per_class]
        codes[held_out], members[c] = CODES["validation"], members[c][~np.isin(members[c], held_out)]
    targets = target_counts(np.array([len(m) for m in members]), ranks, config)
    rounded = bool((targets % 1)[~outside].any())
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
            # A share whose rounding is below the least number decides nothing.
            fraction = config.labelled * kept % 1
            rounded |= 1e-9 < fraction < 1 - 1e-9 and config.labelled * kept > config.min_labelled_per_class
        codes[members[c][:known]] = CODES["labelled"]
        codes[members[c][known:kept]] = CODES["unlabelled"]
    if config.scope == "labelled":
        barred = has_label & outside[labels] & (config.ood_scope == "all")
        codes[(codes == CODES["unused"]) & ~barred] = CODES["unlabelled"]
    codes[~has_label & pool] = CODES["unlabelled"]
    header = _header(manifest, config, seed, codes, ranks, outside, rounded=rounded)
    header["config"] |= {"pool_list": pool_hash, "labelled_list": listed_hash}
    return Split(header, codes, labels)


def _header(
    manifest: Manifest,
    config: SplitConfig,
    seed: int,
    codes: NDArray[np.bytes_],
    ranks: NDArray[np.int64],
    outside: NDArray[np.bool_],
    *,
    rounded: bool,
) -> dict[str, Any]:
    num_classes, values = len(manifest.classes), config.model_dump(mode="json")
    if not config.n_1:  # splits from before there was a choice keep their hash
        values = {name: value for name, value in values.items() if name not in ("n_1", "m_1", "gamma_l", "gamma_u")}
    return {
        "version": VERSION,
        "manifest": manifest.hash,
        "num_classes": num_classes,
        "protocol": describe(config, num_classes, seed, rounded=rounded)
        + real_and_hidden(manifest.labels, codes == CODES["unlabelled"]),
        "config": values,
        "seed": seed,
        "class_ranks": ranks.tolist(),
        "ood_classes": np.flatnonzero(outside).tolist(),
    }


def _usb_codes(manifest: Manifest, config: SplitConfig, seed: int) -> NDArray[np.bytes_]:
    """Choose samples as USB does: class after class, with one NumPy generator of `seed` for all.

    A class's samples are shuffled in the order of their keys, which the converters of the benchmarks number as the files do. So
    CIFAR's and STL-10's indices are USB's own for the same seed. Samples without a label are unlabelled. Validation is ours and
    takes what is left, so it changes no index.

    Raises:
        ConfigError: A class has too few samples.
    """
    labels, num_classes = manifest.labels, len(manifest.classes)
    order = np.array(sorted(range(manifest.num_samples), key=manifest.key), np.int64)
    known = head_counts(config.n_1, num_classes, config.gamma_l)
    more = head_counts(config.m_1, num_classes, config.gamma_u)
    codes = np.full(manifest.num_samples, CODES["unused"])
    generator = np.random.RandomState(seed % 2**32)
    for c in range(num_classes):
        members = order[labels[order] == c]
        generator.shuffle(members)
        if not config.m_1:
            more[c] = len(members) - known[c] - config.validation_per_class
        first, second = known[c], known[c] + more[c]
        if more[c] < 0 or len(members) < second + config.validation_per_class:
            raise ConfigError(
                f"class {manifest.classes[c]!r} has {len(members)} samples, but n_1, m_1 and validation_per_class ask for"
                f" {known[c]} + {max(0, more[c])} + {config.validation_per_class}; lower them"
            )
        codes[members[:first]] = CODES["labelled"]
        codes[members[first:second]] = CODES["unlabelled"]
        codes[members[second : second + config.validation_per_class]] = CODES["validation"]
    codes[labels < 0] = CODES["unlabelled"]
    return codes


def _listed(path: str, manifest: Manifest, default: bool) -> tuple[NDArray[np.bool_], str]:
    """Return (num_samples,) whether a sample is in the list, and the list's SHA-256; all `default` without a list."""
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
    """Return the sample indices of class `c` in random order, those of a published list first."""
    members = np.flatnonzero((labels == c) & pool)
    members = members[seeds.permutation(len(members), seed, c, _SHUFFLE)]
    return members[np.argsort(~listed[members], kind="stable")]


def _check_validation(
    members: list[NDArray[np.int64]], listed: NDArray[np.bool_], config: SplitConfig, names: list[str]
) -> None:
    """Raise ConfigError if a class is too small for its validation samples, none of which is listed."""
    wanted = config.validation_per_class
    if not members or not wanted:
        return
    free = [int((~listed[own]).sum()) for own in members]
    # One sample of each class is left to train on, and all that are listed.
    most = [number if number < len(own) else number - 1 for number, own in zip(free, members, strict=True)]
    least = int(np.argmin(most))
    if wanted > most[least]:
        few = sum(number < wanted for number in most) - 1
        others = f" (and {few} more)" if few else ""
        has = f"{free[least]} sample{'' if free[least] == 1 else 's'}"
        has += " outside --labelled-list" if free[least] < len(members[least]) else ""
        remedy = f"give at most {most[least]}" if most[least] > 0 else "give 0, or add images to it"
        raise ConfigError(
            f"--validation-per-class {wanted} is too many for class {names[least]!r}{others}, which has {has}; {remedy}"
        )


def write_split(split: Split, path: Path) -> None:
    """Write the file, whole or not at all."""
    replace_bytes(path, split.content)


def read_split(path: Path, manifest: Manifest) -> Split:
    """Read a split of the dataset of `manifest`; the name of the file is free.

    Raises:
        DataError: The file is missing or damaged, or was made for another dataset.
    """
    path = Path(path)
    try:
        raw = read_regular(path)
    except FileNotFoundError:
        raise DataError(f"split {path} does not exist; make it with `python -m pipeline.data split`") from None
    except OSError as error:
        raise DataError(
            f"split {path} cannot be read ({error.strerror}); give a file of `pipeline.data split`"
        ) from None
    again = f"delete it and make it again with `python -m pipeline.data split {_arguments(manifest)} --out {path}`"
    try:
        header = json.loads(raw)
        codes, seal = header.pop("codes").encode("ascii"), header.pop("sha256", None)
        made_for, version, num_classes = header["manifest"], header["version"], header["num_classes"]
        misfit = _misfit(header)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"split {path} is damaged or not a split of this version ({type(error).__name__}: {error}); {again}"
        ) from None
    if version != VERSION:
        raise DataError(f"split {path} has version {str(version)[:20]}, this code reads {VERSION}; {again}")
    if made_for != manifest.hash:
        raise DataError(
            f"split {path} was made for another dataset (manifest {str(made_for)[:12]}, {manifest} has "
            f"{manifest.hash[:12]}); make a split of this one"
        )
    if misfit:
        raise DataError(f"split {path} is damaged: {misfit}; {again}")
    unknown = codes.translate(None, b"".join(CODES.values()))
    if len(codes) != manifest.num_samples or unknown or num_classes != len(manifest.classes):
        raise DataError(f"split {path} is damaged: {len(codes)} codes for {manifest.num_samples} samples; {again}")
    split = Split(header, np.frombuffer(codes, "S1"), manifest.labels)
    if seal not in (None, split.hash):
        raise DataError(
            f"split {path} was changed or damaged after it was made: its content does not have the hash that it states; {again}"
        )
    for name in ("labelled", "validation"):
        if wrong := int((manifest.labels[split.subset(name)] < 0).sum()):
            raise DataError(f"split {path} is damaged: {wrong} {name} samples have no label in {manifest}; {again}")
    return split


def _arguments(manifest: Manifest) -> str:
    return " ".join(map(str, manifest.folders))


def _misfit(header: dict[str, Any]) -> str:
    """Return which field of a split has another form than `make_split` gives it; empty if none has."""
    if unknown := set(header) - _FIELDS:
        return f"it has an unknown field {min(unknown)[:40]!r}"
    protocol, num_classes = header["protocol"], header["num_classes"]
    if not isinstance(protocol, str) or protocol.encode(errors="replace").decode() != protocol:  # a lone surrogate
        return "its protocol is not Unicode text"
    if type(header["seed"]) is not int or not isinstance(header["config"], dict) or type(num_classes) is not int:
        return "its seed, config or num_classes is of another type"
    ranks, outside = header["class_ranks"], header["ood_classes"]
    if not isinstance(ranks, list) or not isinstance(outside, list) or len(ranks) != num_classes:
        return "its class_ranks or ood_classes are no lists, or of another length"
    if not all(type(c) is int and 0 <= c < num_classes for c in [*ranks, *outside]):
        return "its class_ranks or ood_classes name classes that do not exist"
    folds = header.get("folds", [1, 1, 0])  # which fold of how many, and their seed
    if not isinstance(folds, list) or [type(n) for n in folds] != [int] * 3 or not 1 <= folds[0] <= folds[1]:
        return "its folds are no number of a fold, number of folds and seed"
    return ""
