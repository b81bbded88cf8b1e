"""The cheap part of a check, which a chain runs before stage 1: test images in the training set, and thin classes.

The manifest has the length of every image, so only test images whose length occurs in the training set can be copies.
Those and their partners are read and hashed, unless they are so many that it would take long.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.check.finding import Example, Finding, Group, are, images, printable
from pipeline.datasets.check.labels import class_findings, label_findings
from pipeline.datasets.check.measure import digest
from pipeline.datasets.manifest import Manifest, read_image
from pipeline.datasets.splits import Split

MAX_BYTES = 500_000_000  # images of more bytes are not compared, so that the check takes seconds
MAX_IMAGES = 100_000


def quick_check(train: Manifest, tests: Sequence[Manifest], split: Split | None) -> list[Finding]:
    """Find test images among the training images by their bytes, and classes with few labels.

    Args:
        train: The training set.
        tests: The test sets.
        split: The split of the training set.

    Returns:
        What was found, the gravest first. Sets that are remote or too large to compare are passed over with a note.
    """
    found = [finding for test in tests for finding in _test_in_training(train, test)]
    wanted = ("few-labels", "class-without-label")
    return [
        *found,
        *(finding for finding in label_findings(train, split) if finding.name in wanted),
        *class_findings([train, *tests]),
    ]


def _test_in_training(train: Manifest, test: Manifest) -> Iterable[Finding]:
    train_folder, test_folder = (printable(" ".join(map(str, manifest.folders))) for manifest in (train, test))
    command = f"`python -m pipeline.data check {train_folder} {test_folder}`"
    lengths = [_lengths(manifest, np.arange(manifest.num_samples)) for manifest in (train, test)]
    candidates = [np.flatnonzero(np.isin(own, other)) for own, other in (lengths, lengths[::-1])]
    pairs = list(zip((train, test), candidates, strict=True))
    size = sum(int(_lengths(m, chosen).sum(dtype=np.int64)) for m, chosen in pairs)
    far = train.remote or test.remote
    if far or size > MAX_BYTES or sum(map(len, candidates)) > MAX_IMAGES:
        return [
            Finding(
                name="not-compared",
                level="note",
                title="Test and training images are not compared",
                text=f"the sets are {'not on this machine' if far else 'large'}; run {command} once",
                count=0,
            )
        ]
    known, asked = (_hashes(manifest, chosen) for manifest, chosen in pairs)
    shared = candidates[1][np.isin(asked, known)]
    if not len(shared):
        return []
    return [
        Finding(
            name="test-in-training",
            level="grave",
            title="Test images in the training set",
            text=f"{images(len(shared))} of {test_folder} {are(len(shared))} in {train_folder} too, for example"
            f" {test.key(int(shared[0]))!r}. Scores on this test set are too good. {command} shows them.",
            count=len(shared),
            groups=[Group([Example(1, int(k))]) for k in shared[:12]],
        )
    ]


def _lengths(manifest: Manifest, sample_indices: NDArray[np.int64]) -> NDArray[np.uint32]:
    return manifest.rows(sample_indices)["length"]


def _hashes(manifest: Manifest, sample_indices: NDArray[np.int64]) -> NDArray[np.bytes_]:
    return np.array([digest(read_image(manifest, sample_index)) for sample_index in sample_indices.tolist()], "S16")
