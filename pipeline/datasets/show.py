"""Descriptions of a dataset or a split: counts, histogram, imbalance, and a contact sheet."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline import seeds
from pipeline.datasets.lettering import fitted, font
from pipeline.datasets.manifest import Manifest, read_image
from pipeline.images import decode

_ROWS = 20  # rows of the histogram; more classes share rows
MARGIN, LETTERS = 160, 13  # pixels for the names of the classes, and the height of their letters


def describe(manifest: Manifest, sample_indices: NDArray[np.int64], title: str) -> Iterator[str]:
    """Yield lines of text about some samples: their number, size, imbalance and histogram of classes.

    Args:
        manifest: The dataset.
        sample_indices: (N,) the samples.
        title: What the first line calls them.
    """
    labels = manifest.labels[sample_indices]
    counts = np.bincount(labels[labels >= 0], minlength=len(manifest.classes))
    size = int(manifest.rows(sample_indices)["length"].astype(np.int64).sum())
    yield f"{title}: {len(sample_indices):,} samples, {size / 1e6:,.1f} MB of images, {len(counts)} classes"
    if not len(counts):
        return
    least, most = int(counts.min()), int(counts.max())
    factor = f"{most / least:.3g}" if least else f"unbounded, {int((counts == 0).sum())} classes are empty"
    yield f"per class {least} to {most}, median {int(np.median(counts))}; imbalance {factor}"
    order = np.argsort(-counts, kind="stable")
    for group in np.array_split(order, min(_ROWS, len(order))):
        mean = counts[group].mean()
        name = manifest.classes[group[0]] + (f" and {len(group) - 1} more" if len(group) > 1 else "")
        yield f"{name[:28]:28} {mean:>9.6g} {'#' * round(40 * mean / max(1, most))}"


def contact_sheet(
    manifest: Manifest,
    sample_indices: NDArray[np.int64],
    path: Path,
    *,
    per_class: int = 8,
    classes: int = 20,
    side: int = 96,
) -> None:
    """Write a PNG with a row of randomly chosen images for each class, the most frequent class first.

    Args:
        manifest: The dataset; its shards are local.
        sample_indices: (N,) the samples to choose from.
        path: The PNG.
        per_class: Images in a row.
        classes: Rows; of more classes, a selection from the most to the least frequent is shown.
        side: Side of an image in pixels.

    Raises:
        DataError: The shards are remote, or an image cannot be read.
    """
    labels = manifest.labels[sample_indices]
    known, counts = np.unique(labels, return_counts=True)
    chosen = known[np.argsort(-counts, kind="stable")]
    rows = chosen[np.unique(np.linspace(0, len(chosen) - 1, min(classes, len(chosen))).round().astype(int))]
    sheet = Image.new("RGB", (MARGIN + per_class * side, len(rows) * side), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(rows.tolist()):
        members = sample_indices[labels == label]
        name = manifest.classes[label] if label >= 0 else "no label"
        text = f"{fitted(name, LETTERS, MARGIN - 8)}\n{len(members):,}"
        draw.text((4, row * side + 4), text, fill="black", font=font(LETTERS))
        for column, k in enumerate(seeds.permutation(len(members), label)[:per_class]):
            picture = Image.fromarray(decode(read_image(manifest, int(members[k]))))
            picture.thumbnail((side - 4, side - 4))
            if max(picture.size) < side // 2:  # small images are enlarged so that their pixels are visible
                factor = (side - 4) // max(picture.size)
                size = (picture.width * factor, picture.height * factor)
                picture = picture.resize(size, Image.Resampling.NEAREST)
            sheet.paste(picture, (MARGIN + column * side + 2, row * side + 2))
    sheet.save(path, "PNG")
