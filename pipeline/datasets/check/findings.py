"""What is worth knowing about datasets before a training: sentences with examples, the gravest first."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.check.duplicates import connected_groups, equal_groups, similar_pairs
from pipeline.datasets.check.measure import CONSTANT_RANGE, measure
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.splits import Split

FEW_LABELS = 5
_DARK = 8  # levels of 255; a constant image below is called black
_MAX_GROUPS = 12  # examples of a finding that are kept
_MAX_NAMES = 8  # classes that a sentence names

Level = Literal["grave", "warning", "note"]


class Example(NamedTuple):
    """An image of a finding: the place of its dataset in the list of datasets, its sample index, and what to say of it."""

    dataset: int
    sample_index: int
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that was found.

    Attributes:
        name: A short name in lower case with hyphens; it does not change between versions of the text.
        level: `grave` if results would be wrong, `warning` if something probably should be changed, `note` otherwise.
        title: Heading.
        text: Whole sentences.
        count: How many images or classes it concerns.
        groups: Examples; the images of a group belong together.
    """

    name: str
    level: Level
    title: str
    text: str
    count: int
    groups: list[list[Example]] = field(default_factory=list)


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


def survey(manifests: Sequence[Manifest], split: Split | None = None, processes: int = 1) -> Survey:
    """Look at every image and label.

    Args:
        manifests: The training set first, then the test sets.
        split: A split of the training set.
        processes: How many processes read images.

    Raises:
        DataError: The shards of a dataset are remote, or cannot be read.
    """
    datasets = [Dataset(title=printable(str(m.folder)), manifest=m, measures=measure(m, processes)) for m in manifests]
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
        self.names = np.concatenate([_class_names(d.manifest) for d in datasets])  # of classes; empty: no label

    def example(self, place: int) -> Example:
        dataset = int(self.dataset[place])
        return Example(dataset, place - int(self.starts[dataset]), str(self.names[place]))

    def examples(self, groups: Iterable[NDArray[np.int64]]) -> list[list[Example]]:
        return [
            [self.example(int(place)) for place in group] for _, group in zip(range(_MAX_GROUPS), groups, strict=False)
        ]

    def conflicts(self, group: NDArray[np.int64]) -> bool:
        """Whether the labelled images of a group have different classes."""
        return len(set(self.names[group].tolist()) - {""}) > 1


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
                text=f"{_images(count)} of {dataset.title} {_are(count)} in {everything.datasets[0].title} too, pixel for"
                " pixel. Every score on this test set is too good. Remove them from the training set, or from the test set.",
                count=count,
                groups=everything.examples(shared),
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
                text=f"{_images(len(inside))} {_are(len(inside))} there more than once, with {surplus} needless"
                f" {'copies' if surplus > 1 else 'copy'}"
                + (f"; {other} of them with equal pixels in different files." if other else "."),
                count=surplus,
                groups=everything.examples(inside),
            )
    if conflicting := [group for group in groups if everything.conflicts(group)]:
        yield Finding(
            name="label-conflicts",
            level="warning",
            title="One image, different labels",
            text=f"{_images(len(conflicting))} {_are(len(conflicting))} there several times with labels that differ."
            " At most one of the labels is right.",
            count=len(conflicting),
            groups=everything.examples(conflicting),
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
            text=f"{_images(count)} of the validation subset {_are(count)} labelled or unlabelled images too. Validation scores"
            " are too good.",
            count=count,
            groups=everything.examples(shared),
        )


def _alike(everything: _Everything) -> Iterator[Finding]:
    """Find images that look alike but differ in their pixels. Of exact copies in a dataset only the first is compared."""
    measures, bounds = everything.measures, everything.starts
    first = [
        start + np.unique(measures["pixels"][start:stop], return_index=True)[1] for start, stop in pairwise(bounds)
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
                text=f"{least}{_images(count)} of {dataset.title} {'look' if count > 1 else 'looks'} like an image of"
                f" {everything.datasets[0].title}: resized, compressed again, or taken a moment later. Look at them.",
                count=count,
                groups=everything.examples(shared),
            )
    for place, dataset in enumerate(everything.datasets):
        if len(inside := pairs[(sides == place).all(axis=1)]):
            groups = connected_groups(inside, len(measures))
            count = sum(len(group) for group in groups)
            yield Finding(
                name="alike",
                level="note",
                title=f"Images that look alike in {dataset.title}",
                text=f"{least}{_images(count)} form {len(groups)} group{'s' if len(groups) > 1 else ''} that look alike.",
                count=count,
                groups=everything.examples(groups),
            )
    if len(conflicting := pairs[[everything.conflicts(pair) for pair in pairs]] if len(pairs) else pairs):
        yield Finding(
            name="alike-label-conflicts",
            level="warning",
            title="Images that look alike, different labels",
            text=f"{least}{len(conflicting)} pair{'s' if len(conflicting) > 1 else ''} of images look alike, but their labels"
            " differ. Look at them: one label may be wrong.",
            count=len(conflicting),
            groups=everything.examples(conflicting),
        )


def label_findings(manifest: Manifest, split: Split | None) -> Iterator[Finding]:
    """Find classes of a training set with few labels or none, and say what validation took. No image is read."""
    if not manifest.classes:
        yield Finding(
            name="no-classes",
            level="note",
            title="No classes",
            text=f"{manifest.folder} has no labels at all.",
            count=0,
        )
        return
    labels = manifest.labels[split.subset("labelled")] if split is not None else manifest.labels
    counts = np.bincount(labels[labels >= 0], minlength=len(manifest.classes))
    for name, title, which in (
        ("class-without-label", "Classes without any label", counts == 0),
        ("few-labels", f"Classes with fewer than {FEW_LABELS} labels", (counts > 0) & (counts < FEW_LABELS)),
    ):
        if number := int(which.sum()):
            what = "no labelled image" if name == "class-without-label" else f"fewer than {FEW_LABELS} labelled images"
            yield Finding(
                name=name,
                level="warning",
                title=title,
                text=f"{number} of {len(counts)} classes {'have' if number > 1 else 'has'} {what} to train on:"
                f" {_listed([f'{shortened(manifest.classes[c])} ({counts[c]})' for c in np.flatnonzero(which)])}.",
                count=number,
            )
    if split is not None and len(held_out := split.subset("validation")):
        known = int((manifest.labels[held_out] >= 0).sum())
        share = known / max(1, known + int(counts.sum()))
        yield Finding(
            name="validation-labels",
            level="warning" if share > 0.5 else "note",
            title="Labels spent on validation",
            text=f"{known} of {known + int(counts.sum())} labels are held out for validation ({share:.0%});"
            f" {int(counts.sum())} are left to train on.",
            count=known,
        )


def class_findings(manifests: Sequence[Manifest]) -> Iterator[Finding]:
    """Compare the classes of test sets with those of the training set. No image is read."""
    classes = set(manifests[0].classes)
    for test in manifests[1:]:
        if foreign := sorted(set(test.classes) - classes):
            yield Finding(
                name="foreign-classes",
                level="warning",
                title="Classes that the training set lacks",
                text=f"{test.folder} has {len(foreign)} classes that {manifests[0].folder} lacks:"
                f" {_listed([shortened(name) for name in foreign])}.",
                count=len(foreign),
            )
        present = {test.classes[label] for label in np.unique(test.labels) if 0 <= label < len(test.classes)}
        if present and (missing := [name for name in manifests[0].classes if name not in present]):
            yield Finding(
                name="untested-classes",
                level="warning",
                title="Classes without a test image",
                text=f"{test.folder} has no image of {len(missing)} of {len(classes)} classes:"
                f" {_listed([shortened(name) for name in missing])}.",
                count=len(missing),
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
            text=f"{_images(number)} cannot be decoded; `python -m pipeline.data verify {dataset.title}` says why.",
            count=number,
            groups=[
                [Example(place, int(k), dataset.manifest.key(int(k)))] for k in np.flatnonzero(~readable)[:_MAX_GROUPS]
            ],
        )
    if number := int(constant.sum()):
        yield Finding(
            name="constant",
            level="warning",
            title=f"Images of one colour in {dataset.title}",
            text=f"{_images(number)} {'show' if number > 1 else 'shows'} one colour only; {int(black.sum())} of them"
            f" {_are(int(black.sum()))} black.",
            count=number,
            groups=[
                [Example(place, int(k), dataset.manifest.key(int(k)))] for k in np.flatnonzero(constant)[:_MAX_GROUPS]
            ],
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
        groups=[[Example(place, k, word)] for (_, k), word in zip(extremes, words, strict=True)] if number > 1 else [],
    )


def _images(count: int) -> str:
    return f"{count} image{'s' if count != 1 else ''}"


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")


def shortened(name: str, length: int = 40) -> str:
    """Return a name that fits a line and can be printed."""
    name = printable(name)
    return name if len(name) <= length else f"{name[: length - 3]}..."


def printable(text: str) -> str:
    """Return a text with ? for what a terminal or UTF-8 cannot show."""
    return "".join(c if c.isprintable() else "?" for c in text)
