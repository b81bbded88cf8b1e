"""What views may change: whether images may be mirrored, and whether their colours may, as nearest neighbours tell.

Flips: a mirrored photograph of a cat shows a cat, a mirrored b is a d. The test asks each labelled image for its nearest
neighbour among the others, once as it is and once mirrored. Where a mirrored image finds its class as often as the image itself,
a flip is a new image of the class. Where it does so less often, by more than two standard errors, a flip shows something else. In
between the kind of the images decides.

Colours: those of a warning sign belong to it, those of letters on posters to the poster. The test describes each image by how
often each colour occurs in it, wherever that is. Where such neighbours find the class more often than by chance, by two standard
errors, and at least half as often as by all pixels, colours tell the classes.

Images are compared as small pictures, without training, in seconds. Labels of the validation images count too: choosing views on
them is what they are for. Both tests are ours.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.manifest import Manifest, read_image
from pipeline.images import Pixels, UnreadableImage, decode

SIDE = 16  # pixels on a side of the compared pictures
MOST = 2000  # images that are compared
FEWEST = 40  # images below which the test decides nothing
ABOVE_CHANCE = 1.5  # the neighbours must find the class this many times as often as the largest class's share
TOLERATED = 0.04  # share of the accuracy whose loss is no loss
LEVELS = 4  # shades of each channel that a description by colours tells apart
FINEST = 64  # pixels on the shorter side from which a description by colours reads some of the pixels
FEWEST_COLOURS = 12  # images below which the colours decide nothing
CERTAIN = 2  # standard errors from which a difference is established


class FlipTest(NamedTuple):
    """What the test found.

    Attributes:
        harmless: Whether flips may be used; None if it cannot tell.
        why: The reason, for people.
    """

    harmless: bool | None
    why: str


class ColourTest(NamedTuple):
    """What the test found.

    Attributes:
        telling: Whether colours alone tell the classes apart.
        why: The reason, for people.
    """

    telling: bool
    why: str


def choose_flips(asked: Literal["yes", "no", "test"], found: FlipTest, drawn: bool) -> FlipTest:
    """Decide on flips: what the person says, else the test, else no for drawn images and yes for photographs."""
    if asked != "test":
        return FlipTest(asked == "yes", f"--flips {asked}")
    if found.harmless is not None:
        return found
    kind = (
        "drawn or scanned on a ground, and signs may not be mirrored"
        if drawn
        else "like photographs, which may be mirrored"
    )
    return FlipTest(not drawn, f"{found.why}; the images look {kind}. --flips yes or no decides otherwise")


def labelled_pictures(manifest: Manifest, sample_indices: NDArray[np.int64]) -> tuple[list[Pixels], NDArray[np.int64]]:
    """Decode those of the samples that have a label, at most MOST, spread evenly.

    Returns:
        The images (n) and their classes (n,); an image that cannot be read is left out.
    """
    known = sample_indices[manifest.labels[sample_indices] >= 0]
    chosen = known[np.linspace(0, len(known) - 1, min(MOST, len(known))).astype(int)] if len(known) else known
    pictures, labels = [], []
    for k in chosen:
        try:
            pictures.append(decode(read_image(manifest, int(k))))
        except UnreadableImage:
            continue
        labels.append(int(manifest.labels[k]))
    return pictures, np.array(labels, int)


def compare_flips(pictures: list[Pixels], labels: NDArray[np.int64]) -> FlipTest:
    """Decide whether mirrored pictures find their class among the others as often as the pictures themselves.

    Args:
        pictures: The images (n).
        labels: Their classes (n,).
    """
    number = len(pictures)
    if number < FEWEST:
        return FlipTest(None, f"{number} labelled images are too few to test flips on, {FEWEST} are needed")
    straight = _small(pictures)
    right = _finds_class(straight.reshape(number, -1), straight.reshape(number, -1), labels)
    mirrored = _finds_class(straight[:, :, ::-1].reshape(number, -1), straight.reshape(number, -1), labels)
    before, after = right.mean(), mirrored.mean()
    chance = np.bincount(labels).max() / number
    if before < ABOVE_CHANCE * chance:
        return FlipTest(
            None, f"neighbours find the class of only {100 * before:.0f} % of {number} images, too few to tell"
        )
    error = np.std(right.astype(float) - mirrored, ddof=1) / np.sqrt(number)
    found = f"of {number} images {100 * before:.0f} % find their class among the others, mirrored {100 * after:.0f} %"
    if before - after <= TOLERATED * before:
        return FlipTest(True, f"{found}: flips are harmless")
    if before - after > TOLERATED * before + CERTAIN * error:
        return FlipTest(False, f"{found}: flips are harmful")
    return FlipTest(None, f"{found}: less often, but so few images do not establish it")


def compare_colours(pictures: list[Pixels], labels: NDArray[np.int64]) -> ColourTest:
    """Decide whether pictures find their class among the others by their colours alone.

    Args:
        pictures: The images (n).
        labels: Their classes (n,).
    """
    number, counts = len(pictures), np.bincount(labels)
    if number < FEWEST_COLOURS:
        return ColourTest(False, f"{number} labelled images are too few to test them on, {FEWEST_COLOURS} are needed")
    chance = float((counts * (counts - 1)).sum() / (number * (number - 1)))
    if not 0 < chance < 1:
        return ColourTest(False, "no class has two labelled images" if chance == 0 else "there is one class")
    small = _small(pictures).reshape(number, -1)
    colours = np.stack([_colours(p) for p in pictures])
    alone, whole = (_finds_class(values, values, labels).mean() for values in (colours, small))
    error = np.sqrt(chance * (1 - chance) / number)
    return ColourTest(
        bool(alone >= whole / 2 and alone > chance + CERTAIN * error),
        f"of {number} images {100 * alone:.0f} % find their class among the others by their colours alone,"
        f" {100 * whole:.0f} % by their pixels, {100 * chance:.0f} % by chance",
    )


def _small(pictures: list[Pixels]) -> NDArray[np.float64]:
    """Scale pictures to (n, SIDE, SIDE, 3)."""
    return np.stack(
        [np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BOX), np.float64) for p in pictures]
    )


def _colours(picture: Pixels) -> NDArray[np.float64]:
    """Return the roots of the shares of LEVELS^3 colours; their distances are Hellinger's."""
    step = max(1, min(picture.shape[:2]) // FINEST)  # a large picture is read at some of its pixels
    levels = picture[::step, ::step].reshape(-1, 3) // (256 // LEVELS)
    counts = np.bincount((levels[:, 0] * LEVELS + levels[:, 1]) * LEVELS + levels[:, 2], minlength=LEVELS**3)
    roots: NDArray[np.float64] = np.sqrt(counts / counts.sum())
    return roots


def _finds_class(
    queries: NDArray[np.float64], bank: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return for each query (n, F) whether its nearest neighbour in the bank, itself left out, has its class (n,)."""
    squares = np.square(bank).sum(1)
    distances = squares[None] - 2 * queries @ bank.T  # without the query's own square, which changes no order
    np.fill_diagonal(distances, np.inf)
    found: NDArray[np.bool_] = labels[distances.argmin(1)] == labels
    return found
