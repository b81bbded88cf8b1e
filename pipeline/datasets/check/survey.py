"""What is worth knowing about datasets before a training: sentences with examples, the gravest first."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.check.duplicates import connected_groups, equal_groups, similar_pairs
from pipeline.datasets.check.finding import Example, Finding, Group, Level, are, images, printable
from pipeline.datasets.check.labels import class_findings, label_findings
from pipeline.datasets.check.measure import CONSTANT_RANGE, measure
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.splits import Split
from pipeline.decoding import DEFAULT, Decoding

_DARK = 8  # levels of 255; a constant image below is called black
_FAINT_RANGE = 32  # levels between the darkest and the brightest pixel; 12 bits in a file of 16 leave 15
_MAX_GROUPS = 12  # the most groups kept of a finding, each with its first _MAX_EXAMPLES images
_MAX_EXAMPLES = 4


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset with its measures.

    Attributes:
        title: What texts call it: its folder.
        manifest: The dataset.
        measures: (num_samples,) of type `measure.MEASURES`.
    """

    title: str
    manifest: Manifest
    measures: NDArray[np.void]

    @property
    def readable(self) -> NDArray[np.bool_]:
        """(num_samples,) whether an image decodes."""
        return self.measures["width"] > 0


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything that a check found.

    Attributes:
        datasets: The training set first, then the test sets.
        split: The split of the training set, or None.
        findings: The gravest first.
    """

    datasets: list[Dataset]
    split: Split | None
    findings: list[Finding]

    def finding(self, name: str) -> Finding | None:
        """Return the first finding of a name, or None."""
        return next((finding for finding in self.findings if finding.name == name), None)


def survey(
    manifests: Sequence[Manifest], split: Split | None = None, processes: int = 1, decoding: Decoding = DEFAULT
) -> Survey:
    """Look at every image and label.

    Args:
        manifests: The training set first, then the test sets.
        split: A split of the training set.
        processes: How many processes read images.
        decoding: The limit on pixels.

    Raises:
        DataError: The shards of a dataset are remote, or cannot be read.
    """
    datasets = [
        Dataset(title=printable(str(m)), manifest=m, measures=measure(m, processes, decoding)) for m in manifests
    ]
    everything = _Everything(datasets)
    found = [
        *_duplicates(everything, split),
        *_alike(everything),
        *label_findings(manifests[0], split),
        *class_findings(manifests),
        *(finding for place, dataset in enumerate(datasets) for finding in _odd_images(place, dataset)),
    ]
    order: list[Level] = ["grave", "warning", "note"]
    return Survey(datasets=datasets, split=split, findings=sorted(found, key=lambda f: order.index(f.level)))


class _Everything:
    """The images of all datasets end to end."""

    def __init__(self, datasets: list[Dataset]) -> None:
        self.datasets = datasets
        self.measures = np.concatenate([d.measures for d in datasets])
        self.starts = np.cumsum([0, *(len(d.measures) for d in datasets)])
        self.dataset = np.repeat(np.arange(len(datasets)), np.diff(self.starts))
        # Each image has the name of its class, an empty one without a label.
        self.names = np.concatenate([_class_names(d.manifest) for d in datasets])
        known = {name: number for number, name in enumerate(dict.fromkeys(self.names.tolist()))} | {"": -1}
        self.classes = np.array([known[name] for name in self.names.tolist()])  # number of each name; -1: no label

    def example(self, place: int) -> Example:
        dataset = int(self.dataset[place])
        return Example(dataset, place - int(self.starts[dataset]), str(self.names[place]))

    def groups(self, groups: Iterable[NDArray[np.int64]], test: int = 0) -> list[Group]:
        """Return the first groups; those that a test set shares show one training image and then its test images."""
        found = []
        for group in itertools.islice(groups, _MAX_GROUPS):
            order = np.r_[group[:1], group[self.dataset[group] == test], group] if test else group
            shown = list(dict.fromkeys(order.tolist()))[:_MAX_EXAMPLES]
            found.append(Group([self.example(place) for place in shown], len(group) - len(shown)))
        return found

    def conflicts(self, group: NDArray[np.int64]) -> bool:
        """Whether the labelled images of a group have different classes."""
        classes = self.classes[group]
        return len(np.unique(classes[classes >= 0])) > 1


def _class_names(manifest: Manifest) -> NDArray[np.object_]:
    names = np.array([*(name or "(empty name)" for name in manifest.classes), ""], object)
    if not manifest.classes:
        return np.full(manifest.num_samples, "", object)
    return names[manifest.labels]  # -1 is the last one


def _duplicates(everything: _Everything, split: Split | None) -> Iterator[Finding]:
    """Find the same image in several places, whether its bytes are the same or only its pixels."""
    groups = equal_groups(everything.measures["pixels"])
    members = [everything.dataset[group] for group in groups]
    for place, dataset in enumerate(everything.datasets):
        if place and (shared := [g for g, of in zip(groups, members, strict=True) if of[0] == 0 and place in of]):
            count = sum(int((everything.dataset[group] == place).sum()) for group in shared)
            yield Finding(
                name="test-in-training",
                level="grave",
                title="Test images in the training set",
                text=f"{images(count)} of {dataset.title} {are(count)} in {everything.datasets[0].title} too, pixel for"
                " pixel. Every score on this test set is too good. Remove"
                f" {'them' if count > 1 else 'it'} from the training set, or from the test set.",
                count=count,
                groups=everything.groups(shared, place),
            )
    for place, dataset in enumerate(everything.datasets):
        inside = [g[of == place] for g, of in zip(groups, members, strict=True) if (of == place).sum() > 1]
        if inside:
            surplus = sum(len(group) - 1 for group in inside)
            other = sum(len(np.unique(everything.measures["bytes"][group])) > 1 for group in inside)
            yield Finding(
                name="duplicates",
                level="warning",
                title=f"Duplicates in {dataset.title}",
                text=f"{images(len(inside))} {are(len(inside))} there more than once, with {surplus} needless"
                f" {'copies' if surplus > 1 else 'copy'}"
                + (f"; {other} of them with equal pixels in different files." if other else "."),
                count=surplus,
                groups=everything.groups(inside),
            )
    if conflicting := [group for group in groups if everything.conflicts(group)]:
        yield Finding(
            name="label-conflicts",
            level="warning",
            title="One image, different labels",
            text=f"{images(len(conflicting))} {are(len(conflicting))} there several times with labels that differ."
            " At most one of the labels is right.",
            count=len(conflicting),
            groups=everything.groups(conflicting),
        )
    if split is not None:
        yield from _validation_leaks(everything, groups, split)


def _validation_leaks(everything: _Everything, groups: list[NDArray[np.int64]], split: Split) -> Iterator[Finding]:
    used = np.zeros(len(everything.measures), np.int8)  # 1: for training, 2: for validation
    used[np.r_[split.subset("labelled"), split.subset("unlabelled")]] = 1
    used[split.subset("validation")] = 2
    shared = [group[used[group] > 0] for group in groups if {1, 2} <= set(used[group].tolist())]
    if shared:
        count = sum(int((used[group] == 2).sum()) for group in shared)
        yield Finding(
            name="validation-in-training",
            level="warning",
            title="Validation images among the images to train on",
            text=f"{images(count)} of the validation subset {are(count)} labelled or unlabelled images too. Validation scores"
            " are too good.",
            count=count,
            groups=everything.groups(shared),
        )


def _alike(everything: _Everything) -> Iterator[Finding]:
    """Find images that look alike but differ in their pixels. Of exact copies in a dataset only the first is compared."""
    measures, bounds = everything.measures, everything.starts
    first = [
        start + np.unique(measures["pixels"][start:stop], return_index=True)[1]
        for start, stop in itertools.pairwise(bounds)
    ]
    chosen = np.sort(np.concatenate(first))
    chosen = chosen[(measures["width"][chosen] > 0) & (measures["range"][chosen] > CONSTANT_RANGE)]
    places, complete = similar_pairs(measures["look"][chosen], measures["colour"][chosen])
    least = "" if complete else "at least "
    pairs = chosen[places]
    pairs = pairs[measures["pixels"][pairs[:, 0]] != measures["pixels"][pairs[:, 1]]]
    sides = everything.dataset[pairs]
    for place, dataset in enumerate(everything.datasets):
        if place and len(shared := pairs[(sides[:, 0] == 0) & (sides[:, 1] == place)]):
            count = len(np.unique(shared[:, 1]))
            yield Finding(
                name="test-like-training",
                level="warning",
                title="Test images that look like training images",
                text=f"{least}{images(count)} of {dataset.title} {'look' if count > 1 else 'looks'} like an image of"
                f" {everything.datasets[0].title}: resized, compressed again, or taken a moment later. Look at them.",
                count=count,
                groups=everything.groups(shared, place),
            )
    for place, dataset in enumerate(everything.datasets):
        if len(inside := pairs[(sides == place).all(axis=1)]):
            groups = connected_groups(inside, len(measures))
            count = sum(len(group) for group in groups)
            yield Finding(
                name="alike",
                level="note",
                title=f"Images that look alike in {dataset.title}",
                text=f"{least}{images(count)} form {len(groups)} group{'s' if len(groups) > 1 else ''} that look alike.",
                count=count,
                groups=everything.groups(groups),
            )
    left, right = everything.classes[pairs].T
    if len(conflicting := pairs[(left != right) & (left >= 0) & (right >= 0)]):
        yield Finding(
            name="alike-label-conflicts",
            level="warning",
            title="Images that look alike, different labels",
            text=f"{least}{len(conflicting)} pair{'s of images look' if len(conflicting) > 1 else ' of images looks'} alike, but"
            " their labels"
            " differ. Look at them: one label may be wrong.",
            count=len(conflicting),
            groups=everything.groups(conflicting),
        )


def _odd_images(place: int, dataset: Dataset) -> Iterator[Finding]:
    measures, readable = dataset.measures, dataset.readable
    constant = readable & (measures["range"] <= CONSTANT_RANGE)
    black = constant & (measures["colour"].max(axis=1) < _DARK)
    if number := int((~readable).sum()):
        yield Finding(
            name="unreadable",
            level="warning",
            title=f"Images that do not decode in {dataset.title}",
            text=f"{images(number)} cannot be decoded; `python -m pipeline.data verify {dataset.title}` says why.",
            count=number,
            groups=_single(place, dataset, np.flatnonzero(~readable)),
        )
    if number := int(constant.sum()):
        yield Finding(
            name="constant",
            level="warning",
            title=f"Images of one colour in {dataset.title}",
            text=f"{images(number)} {'show' if number > 1 else 'shows'} one colour only; {int(black.sum())} of them"
            f" {are(int(black.sum()))} black.",
            count=number,
            groups=_single(place, dataset, np.flatnonzero(constant)),
        )
    faint = readable & ~constant & (measures["range"] < _FAINT_RANGE)
    if number := int(faint.sum()):
        yield Finding(
            name="faint",
            level="warning",
            title=f"Images of little contrast in {dataset.title}",
            text=f"{images(number)} {'have' if number > 1 else 'has'} fewer than {_FAINT_RANGE} of 256 levels between the darkest"
            " and the brightest pixel. If files of 16 bits hold 10 or 12, multiply their values by 64 or 16.",
            count=number,
            groups=_single(place, dataset, np.flatnonzero(faint)),
        )
    if not readable.any():
        return
    known = np.flatnonzero(readable)
    area = measures["width"][known].astype(np.int64) * measures["height"][known]
    ratio = measures["width"][known] / measures["height"][known]
    extremes = [
        (word, int(known[place]))
        for word, place in (
            ("smallest", area.argmin()),
            ("largest", area.argmax()),
            ("narrowest", ratio.argmin()),
            ("widest", ratio.argmax()),
        )
    ]
    words = [f"{word} {measures['width'][k]} x {measures['height'][k]}" for word, k in extremes]
    number = len(np.unique(measures[["width", "height"]][known]))
    one = f"all images have {measures['width'][known[0]]} x {measures['height'][known[0]]} pixels."
    yield Finding(
        name="sizes",
        level="note",
        title=f"Sizes in {dataset.title}",
        text=one if number == 1 else f"{number} different sizes: {', '.join(words)} pixels.",
        count=number,
        groups=[Group([Example(place, k, word)]) for (_, k), word in zip(extremes, words, strict=True)]
        if number > 1
        else [],
    )


def _single(place: int, dataset: Dataset, sample_indices: NDArray[np.int64]) -> list[Group]:
    names = _class_names(dataset.manifest)
    return [Group([Example(place, k, str(names[k]))]) for k in sample_indices[:_MAX_GROUPS].tolist()]
