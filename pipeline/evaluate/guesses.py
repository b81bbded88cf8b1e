"""First labels for unlabelled images: those of a simple learner on pixels.

With one label per class a network from random weights learns little, and less than a nearest neighbour or label spreading
(Zhou et al. 2004) does on some images. Its later pseudo-labels cannot be better than what it has learnt. So a simple learner
may label the unlabelled images once, before the training. This is ours; docs/recipe.md has what it brings.
"""

import logging
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.manifest import Manifest
from pipeline.decoding import DEFAULT, Decoding
from pipeline.evaluate.baselines import Samples, evenly, fit_baseline, pixels_of, side_for
from pipeline.evaluate.chance import standard_error
from pipeline.evaluate.learners import LEARNERS

logger = logging.getLogger(__name__)

# In the order in which a later one must be better by a standard error, since few validation images say little.
CANDIDATES = ("spreading", "neighbour", "logistic", "svm")
MAX_SPREAD = 2_000  # unlabelled images over which labels spread; the others get the label of their neighbours
MAX_FOR_SVM = 1_000  # labelled images up to which an RBF-SVM takes seconds


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
    known, asked = (pixels_of(manifest, samples, side=side, decoding=decoding) for samples in (labelled, unlabelled))
    validation = pixels_of(*held_out, side=side, decoding=decoding)
    spread = evenly(unlabelled, np.zeros(len(unlabelled), np.int64), MAX_SPREAD)
    more = asked._replace(sample_indices=spread, values=asked.values[np.searchsorted(asked.sample_indices, spread)])
    # Both are predicted at once. Labels of the unlabelled samples are hidden: 0 only fills a table that nobody reads.
    number = len(validation.labels)
    queries = Samples(
        sample_indices=np.arange(number + len(asked.labels)),
        values=np.concatenate([validation.values, asked.values]),
        labels=np.concatenate([validation.labels, np.zeros_like(asked.labels)]),
    )
    names = [learner] if learner != "best" else list(CANDIDATES if number else CANDIDATES[:1])
    if len(labelled) > MAX_FOR_SVM and len(names) > 1:
        names.remove("svm")
    chosen, guessed, right = "", np.empty(0, np.int64), 0.0
    for name in names:
        # Default settings: with one label per class there is nothing to tune on, and a grid takes minutes.
        fitted = fit_baseline(name, known, queries, len(manifest.classes), unlabelled=more, tune=False)
        predicted = fitted.predictions.predicted
        accuracy = 100 * float((predicted[:number] == validation.labels).mean()) if number else 0.0
        if not chosen or accuracy > right + standard_error(right, number):
            chosen, guessed, right = name, predicted[number:], accuracy
    labels = np.full(len(manifest.labels), -1, np.int64)
    labels[asked.sample_indices] = guessed
    seen = f"{right:.1f} % of {number} validation images right" if number else "there are no validation images"
    words = f"{LEARNERS[chosen].title} on pixels guesses the labels of {len(guessed)} images ({seen})"
    logger.info("%s", words)
    return Guesses(labels, chosen, words)
