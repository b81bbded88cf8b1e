"""What a recipe knows of a dataset: numbers, sizes, colours, labels. A sample of the images is decoded."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.manifest import Manifest, read_image
from pipeline.errors import DataError
from pipeline.images import Pixels, UnreadableImage, decode
from stages.spec import StageData

MOST = 400  # images that are decoded, spread evenly over the dataset
NEAR = 16  # levels of 255 within which a border pixel counts as the ground


@dataclass(frozen=True, kw_only=True)
class Look:
    """Facts about the training images of a chain.

    Attributes:
        images: All images.
        labelled: Labelled images that are trained on, by class (C,).
        unlabelled: Images whose labels are absent or hidden.
        validation: Images that are held out.
        height: Median height in pixels.
        width: Median width in pixels.
        grey: Share of the images whose three channels are equal.
        drawn: Share of the images with a border of one colour: scans, glyphs, icons.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel, in [0, 1].
    """

    images: int
    labelled: tuple[int, ...]
    unlabelled: int
    validation: int
    height: int
    width: int
    grey: float
    drawn: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def side(self) -> int:
        """The shorter side, in pixels."""
        return min(self.height, self.width)

    @property
    def labels(self) -> int:
        """Labelled images that are trained on."""
        return sum(self.labelled)

    @property
    def imbalance(self) -> float:
        """Labelled images of the largest class over those of the smallest that has any."""
        present = [count for count in self.labelled if count]
        return max(present) / min(present) if present else 1.0

    @property
    def is_grey(self) -> bool:
        """Whether nearly all images are grey."""
        return self.grey >= 0.95

    @property
    def is_drawn(self) -> bool:
        """Whether most images are drawn or scanned on a ground, and no photographs."""
        return self.drawn >= 0.6


def look_at(data: StageData) -> Look:
    """Look at the data of a stage.

    Raises:
        DataError: No image has a label, or none of the sampled images can be read.
    """
    manifest, subsets = data.manifest, data.subsets
    if not len(subsets.labelled):
        raise DataError(
            f"no image of {manifest} has a label to train on, but stages 2 and 3 need some: label a few images of each class"
        )
    pictures = sampled(manifest, np.arange(manifest.num_samples), MOST)
    if not pictures:
        raise DataError(
            f"none of the images of {manifest} that were tried can be read; run `pipeline.data check` on it"
        )
    counts = np.bincount(manifest.labels[subsets.labelled], minlength=len(manifest.classes))
    sums, squares = np.zeros(3), np.zeros(3)
    for p in pictures:  # every image counts alike, however large
        share = p.reshape(-1, 3) / 255
        sums, squares = sums + share.mean(0), squares + np.square(share).mean(0)
    mean = sums / len(pictures)
    std = np.sqrt(np.maximum(squares / len(pictures) - mean**2, 0))
    red, green, blue = (round(float(v), 3) for v in mean)
    return Look(
        images=manifest.num_samples,
        labelled=tuple(counts.tolist()),
        unlabelled=len(subsets.unlabelled),
        validation=len(data.held_out.sample_indices),
        height=int(np.median([p.shape[0] for p in pictures])),
        width=int(np.median([p.shape[1] for p in pictures])),
        grey=float(np.mean([(p[..., 0] == p[..., 1]).all() and (p[..., 1] == p[..., 2]).all() for p in pictures])),
        drawn=float(np.mean([has_ground(p) for p in pictures])),
        mean=(red, green, blue),
        std=tuple(max(0.05, round(float(v), 3)) for v in std),  # type: ignore[arg-type] # three values
    )


def sampled(manifest: Manifest, sample_indices: NDArray[np.int64], most: int) -> list[Pixels]:
    """Decode at most `most` of the samples, spread evenly; those that cannot be read are left out."""
    chosen = sample_indices[np.linspace(0, len(sample_indices) - 1, min(most, len(sample_indices))).astype(int)]
    pictures = []
    for k in chosen:
        try:
            pictures.append(decode(read_image(manifest, int(k))))
        except UnreadableImage:
            continue
    return pictures


def has_ground(picture: Pixels) -> bool:
    """Whether at least 70 % of an image's outermost pixels have nearly one colour, their median."""
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]).astype(int)
    near = np.abs(border - np.median(border, axis=0)).max(1) <= NEAR
    return bool(near.mean() >= 0.7)
