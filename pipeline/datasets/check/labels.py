"""Findings about labels and classes, for which no image is read."""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.datasets.check.finding import Finding, listed, printable, shortened
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.splits import Split

FEW_LABELS = 5


def label_findings(manifest: Manifest, split: Split | None) -> Iterator[Finding]:
    """Find classes of a training set with few labels or none, and say what validation took."""
    if not manifest.classes:
        yield Finding(
            name="no-classes",
            level="note",
            title="No classes",
            text=f"{printable(str(manifest))} has no labels at all.",
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
            names = [
                shortened(manifest.classes[c]) + (f" ({counts[c]})" if counts[c] else "") for c in np.flatnonzero(which)
            ]
            what = "no labelled image" if name == "class-without-label" else f"fewer than {FEW_LABELS} labelled images"
            yield Finding(
                name=name,
                level="warning",
                title=title,
                text=f"{number} of {len(counts)} classes {'have' if number > 1 else 'has'} {what} to train on: {listed(names)}.",
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
    """Compare the classes of test sets with those of the training set."""
    classes = set(manifests[0].classes)
    for test in manifests[1:]:
        if foreign := sorted(set(test.classes) - classes):
            yield Finding(
                name="foreign-classes",
                level="warning",
                title="Classes that the training set lacks",
                text=f"{printable(str(test.folder))} has {len(foreign)} classes that {printable(str(manifests[0].folder))} lacks:"
                f" {listed([shortened(name) for name in foreign])}.",
                count=len(foreign),
            )
        present = {test.classes[label] for label in np.unique(test.labels) if 0 <= label < len(test.classes)}
        if present and (missing := [name for name in manifests[0].classes if name not in present]):
            yield Finding(
                name="untested-classes",
                level="warning",
                title="Classes without a test image",
                text=f"{printable(str(test.folder))} has no image of {len(missing)} of {len(classes)} classes:"
                f" {listed([shortened(name) for name in missing])}.",
                count=len(missing),
            )
