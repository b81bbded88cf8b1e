"""First labels for unlabelled images: those of a simple learner on pixels.

With one label per class a network from random weights learns little, and less than a nearest neighbour or label spreading
(Zhou et al. 2004) does on some images. Its later pseudo-labels cannot be better than what it has learnt. So a simple learner
may label the unlabelled images once, before the training. This is ours; docs/recipe.md has what it brings.
"""

import hashlib
import itertools
import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.manifest import Manifest
from pipeline.decoding import DEFAULT, Decoding
from pipeline.evaluate.baselines import Samples, evenly, fit_baseline, is_grey, pixels_of, side_for
from pipeline.evaluate.chance import standard_error
from pipeline.evaluate.learners import LEARNERS, MAX_FOR_SVM, MAX_UNLABELLED, Values
from pipeline.files import open_regular, replacing

logger = logging.getLogger(__name__)

# In the order in which a later one must be better by a standard error, since few validation images say little.
CANDIDATES = ("spreading", "neighbour", "logistic", "svm")


class Guesses(NamedTuple):
    """Guessed labels.

    Attributes:
        labels: (n,) for all samples of the manifest; -1 where nothing was guessed.
        learner: Key of `LEARNERS`.
        words: Which learner guessed, and how well, as a sentence.
    """

    labels: NDArray[np.int64]
    learner: str
    words: str


def kept_guesses(
    folder: Path,
    manifest: Manifest,
    labelled: NDArray[np.int64],
    unlabelled: NDArray[np.int64],
    held_out: tuple[Manifest, NDArray[np.int64]],
    learner: str,
    *,
    decoding: Decoding,
) -> NDArray[np.int64]:
    """Return the labels that an earlier start of a run has guessed, or guess and keep them.

    Another processor or another number of threads may guess a few images differently, and a resumed run must learn from the same
    labels. A file of other inputs has another name; a damaged one is written anew.

    Args:
        folder: The run's folder.
        manifest: As in `guess_labels`, and so are the others.
        labelled: Samples whose labels are used.
        unlabelled: Samples to guess.
        held_out: The dataset and samples of the validation.
        learner: A key of `LEARNERS`, or `best`.
        decoding: How encoded images are decoded.
    """
    parts = (
        manifest.hash,
        held_out[0].hash,
        learner,
        repr(decoding),
        *(s.tolist() for s in (labelled, unlabelled, held_out[1])),
    )
    path = folder / f"guesses-{hashlib.sha256(repr(parts).encode()).hexdigest()[:12]}.npy"
    try:
        with open_regular(path) as file:
            found = np.load(file, allow_pickle=False)
        if found.dtype == np.int64 and found.shape == (manifest.num_samples,) and found.max() < len(manifest.classes):
            return np.maximum(found, -1)
    except (OSError, ValueError, EOFError):
        pass
    labels = guess_labels(manifest, labelled, unlabelled, held_out, learner, decoding=decoding).labels
    with replacing(path) as unfinished, unfinished.open("wb") as stream:
        np.save(stream, labels)
    return labels


def guess_labels(
    manifest: Manifest,
    labelled: NDArray[np.int64],
    unlabelled: NDArray[np.int64],
    held_out: tuple[Manifest, NDArray[np.int64]],
    learner: str = "best",
    *,
    decoding: Decoding = DEFAULT,
) -> Guesses:
    """Guess labels of unlabelled samples from their pixels.

    Args:
        manifest: The dataset.
        labelled: Samples whose labels are used.
        unlabelled: Samples to guess.
        held_out: The dataset and samples of the validation, on which learners are compared.
        learner: A key of `LEARNERS`, or `best`: label spreading, unless another is better on the held-out samples by more than a
            standard error.
        decoding: How encoded images are decoded.

    Raises:
        ConfigError: Fewer than two classes are labelled.
    """
    side = side_for(manifest, labelled, decoding)
    sets = (manifest, labelled), (manifest, unlabelled), held_out
    pixels = [pixels_of(dataset, samples, side=side, decoding=decoding) for dataset, samples in sets]
    number = len(held_out[1])
    names = [learner] if learner != "best" else list(CANDIDATES if number else CANDIDATES[:1])
    if len(labelled) > MAX_FOR_SVM and len(names) > 1:
        names.remove("svm")
    forms = [[samples._replace(values=_own_contrast(samples.values)) for samples in pixels]]
    # The mean of a grey image is only its brightness; that of a colour image may tell its class.
    if number and not all(is_grey(samples.values) for samples in pixels):
        forms.insert(0, pixels)
    chosen, guessed, right = "", np.empty(0, np.int64), 0.0
    for name, (known, asked, validation) in itertools.product(names, forms):
        predicted = _predict(name, known, asked, validation, len(manifest.classes))
        accuracy = 100 * float((predicted[:number] == validation.labels).mean()) if number else 0.0
        if not chosen or accuracy > right + standard_error(right, number):
            chosen, guessed, right = name, predicted[number:], accuracy
    labels = np.full(manifest.num_samples, -1, np.int64)
    labels[pixels[1].sample_indices] = guessed
    seen = f"{right:.1f} % of {number} validation images right" if number else "there are no validation images"
    words = f"{LEARNERS[chosen].title} on pixels guesses the labels of {len(guessed)} images ({seen})"
    logger.info("%s", words)
    return Guesses(labels, chosen, words)


def _predict(name: str, known: Samples, asked: Samples, validation: Samples, classes: int) -> NDArray[np.int64]:
    """Return the classes that a learner predicts: of the validation samples first, then of those that are asked."""
    spread = evenly(asked.sample_indices, np.zeros_like(asked.labels), MAX_UNLABELLED)
    more = asked._replace(sample_indices=spread, values=asked.values[np.searchsorted(asked.sample_indices, spread)])
    # Labels of the unlabelled samples are hidden: 0 only fills a table that nobody reads.
    queries = Samples(
        sample_indices=np.arange(len(validation.labels) + len(asked.labels)),
        values=np.concatenate([validation.values, asked.values]),
        labels=np.concatenate([validation.labels, np.zeros_like(asked.labels)]),
    )
    # Default settings: with one label per class there is nothing to tune on, and a grid takes minutes.
    return fit_baseline(name, known, queries, classes, unlabelled=more, tune=False).predictions.predicted


def _own_contrast(values: Values) -> Values:
    """Shift and scale each image (n, 3 P) by its own mean and spread: the same scene in other light looks alike."""
    centred = values - values.mean(1, keepdims=True)
    return (centred / np.maximum(centred.std(1, keepdims=True), 1e-3)).astype(np.float32)
