"""What simple learners reach on the same labels: the numbers that a trained network has to beat.

The learners are scikit-learn's logistic regression, nearest neighbour, RBF-SVM and label spreading. They learn from pixels or
from the features of an export. Each is tuned as its users tune it: over a small grid, on held-out images if there are any,
else by cross-validation over the labelled ones. A class with a single labelled image leaves nothing to validate on, so the
first setting of the grid is used then, which is scikit-learn's own default or close to it.

Shapes: n samples, F features, C classes.
"""

import itertools
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import seeds
from pipeline.datasets.joint import with_classes
from pipeline.datasets.manifest import Manifest, read_image
from pipeline.decoding import DEFAULT, Decoding
from pipeline.errors import ConfigError
from pipeline.evaluate.features import features_of, linear_head
from pipeline.evaluate.learners import LEARNERS, Labels, Learner, Values
from pipeline.evaluate.predictions import Predictions
from pipeline.evaluation_view import EvaluationView
from pipeline.exports.export import load_export
from pipeline.images import decode
from pipeline.models.arm import ARM
from pipeline.streaming.loader import evaluation_batches
from pipeline.streaming.transforms import eval_views

MAX_SIDE = 32  # pixels on a side of the images that learners of pixels see
MAX_FOLDS = 5
WHOLE_IMAGE = EvaluationView(crop=1.0)
BATCH = 256


class Samples(NamedTuple):
    """Samples as rows of numbers.

    Attributes:
        sample_indices: Rows of the manifest (n,).
        values: Pixels or features (n, F).
        labels: Classes (n,); -1 where unknown.
    """

    sample_indices: NDArray[np.int64]
    values: Values
    labels: Labels


class Baseline(NamedTuple):
    """A fitted baseline and what it predicts.

    Attributes:
        name: A key of `LEARNERS`.
        predictions: Of the queries.
        calibrated: Whether the confidences are probabilities; an SVM and a neighbour have none.
        setting: The chosen setting, in words.
        tuned_on: What it was chosen on, in words.
        seconds: Time for tuning, fitting and predicting.
        validated: Accuracy in percent on the held-out images that it was tuned on, a mean over their classes; None without them.
    """

    name: str
    predictions: Predictions
    calibrated: bool
    setting: str
    tuned_on: str
    seconds: float
    validated: float | None = None


def pixels_of(
    manifest: Manifest, sample_indices: NDArray[np.int64], *, side: int = MAX_SIDE, decoding: Decoding = DEFAULT
) -> Samples:
    """Read images as rows of pixels in [0, 1].

    Args:
        manifest: The dataset.
        sample_indices: The samples.
        side: Pixels on a side, after the shorter side is resized to it and the centre is cut out.
        decoding: How encoded images are decoded.

    Returns:
        The samples, sorted by sample index, with F = 3 * side * side.
    """
    views = eval_views((side, side), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), view=WHOLE_IMAGE, decoding=decoding)
    ordered = np.sort(sample_indices)
    rows = [
        batch.images[batch.indices >= 0].flatten(1).numpy().copy()
        for batch in evaluation_batches(manifest, ordered, batch_size=BATCH, rank=0, world_size=1, views=views)
    ]
    values = np.concatenate(rows) if rows else np.empty((0, 3 * side * side), np.float32)
    return Samples(ordered, values, manifest.labels[ordered])


def is_grey(values: Values) -> bool:
    """Whether the three channels of all images (n, 3 P) are equal."""
    first, *others = np.split(values, 3, axis=1)
    return all((first == other).all() for other in others)


def export_features(folder: Path, manifest: Manifest, sample_indices: NDArray[np.int64]) -> Samples:
    """Compute the features of an export: what its head reads, or for a pretrainer what its decoder reads, averaged.

    Args:
        folder: The export.
        manifest: The dataset.
        sample_indices: The samples.

    Raises:
        ConfigError: The model has no single linear head.
    """
    model, card = load_export(folder)
    reader = model.to_decoder if isinstance(model, ARM) else linear_head(model)
    if reader is None:
        raise ConfigError(f"{folder} holds {card.model.name}, which has no single linear head to read features from")
    look = card.preprocessing
    if card.kind == "classifier":
        manifest = with_classes(manifest, card.classes)
    views = eval_views(card.model.image_size, mean=look.mean, std=look.std, view=look.view, decoding=look.decoding)
    ordered = np.sort(sample_indices)
    batches = evaluation_batches(manifest, ordered, batch_size=BATCH, rank=0, world_size=1, views=views)
    found = features_of(model, reader, batches, torch.device("cpu"))
    return Samples(ordered, found.values.numpy(), manifest.labels[ordered])


def side_for(manifest: Manifest, sample_indices: NDArray[np.int64], decoding: Decoding = DEFAULT) -> int:
    """Return the side that suits the images: their own shorter side, at most `MAX_SIDE` and at least 8."""
    chosen = sample_indices[np.linspace(0, len(sample_indices) - 1, min(9, len(sample_indices))).astype(int)]
    sides = [min(decode(read_image(manifest, int(k)), decoding).shape[:2]) for k in chosen]
    return int(np.clip(np.median(sides), 8, MAX_SIDE))


def evenly(sample_indices: NDArray[np.int64], labels: Labels, most: int, seed: int = 0) -> NDArray[np.int64]:
    """Choose at most `most` samples, as many of each class as of the others where they last.

    Args:
        sample_indices: The samples (n,).
        labels: Their classes (n,).
        most: The largest number of samples.
        seed: Seed of the choice inside each class.

    Returns:
        The chosen sample indices, sorted.
    """
    if len(sample_indices) <= most:
        return np.sort(sample_indices)
    order = np.asarray(seeds.permutation(len(sample_indices), seed), np.int64)
    nth = np.empty(len(order), np.int64)  # how many samples of its class come before a sample, in random order
    for c in np.unique(labels):
        own = order[labels[order] == c]
        nth[own] = np.arange(len(own))
    first = np.lexsort((np.argsort(order), nth))[:most]
    return np.sort(sample_indices[first])


def fit_baseline(
    name: str,
    labelled: Samples,
    queries: Samples,
    num_classes: int,
    *,
    held_out: Samples | None = None,
    unlabelled: Samples | None = None,
    tune: bool = True,
) -> Baseline:
    """Tune a baseline, fit it to the labelled samples and let it predict.

    Args:
        name: A key of `LEARNERS`.
        labelled: Samples to learn from.
        queries: Samples to predict.
        num_classes: Number of classes C.
        held_out: Validation samples to tune on; None or empty = cross-validation over `labelled`.
        unlabelled: Samples without labels, which label spreading uses too.
        tune: Whether to tune; False = the first setting of the grid.

    Raises:
        ConfigError: Fewer than two classes are labelled.
    """
    began = time.monotonic()
    learner = LEARNERS[name]
    classes = np.unique(labelled.labels)
    if len(classes) < 2:
        raise ConfigError(f"a baseline needs labels of two classes at least, and there are {len(classes)}; label more")
    grid = [dict(zip(learner.grid, values, strict=True)) for values in itertools.product(*learner.grid.values())]
    counts = np.bincount(labelled.labels)[classes]
    if counts.max() <= 1.5 * counts.min():  # class weights change next to nothing then
        grid = [setting for setting in grid if setting.get("class_weight") is None]
    more = unlabelled.values if unlabelled is not None else labelled.values[:0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about iterations that end early; the grid compares what they reach
        chosen, tuned_on, validated = grid[0], "nothing, to save time", None
        if tune:
            chosen, tuned_on, validated = _tune(learner, grid, labelled, held_out, more)
        scores = learner.fit(chosen, labelled.values, labelled.labels, more)(queries.values)
    words = ", ".join(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}"
                      for key, value in chosen.items() if value is not None)  # fmt: skip
    predictions = _predictions(scores, classes, num_classes, queries, learner.probabilities)
    seconds = time.monotonic() - began
    return Baseline(name, predictions, learner.probabilities, words, tuned_on, seconds, validated)


def _tune(
    learner: Learner, grid: list[dict[str, Any]], labelled: Samples, held_out: Samples | None, more: Values
) -> tuple[dict[str, Any], str, float | None]:
    """Return the setting with the best mean accuracy over the classes, the first of those that are equal.

    Beside it stand what it was tuned on, and its accuracy there in percent if those are held-out images.
    """
    folds = int(min(MAX_FOLDS, np.bincount(labelled.labels)[np.unique(labelled.labels)].min()))
    if held_out is not None and len(held_out.labels):
        rounds = [(labelled.values, labelled.labels, held_out.values, held_out.labels)]
        words = f"{len(held_out.labels)} validation images"
    elif folds > 1:
        nth = np.empty(len(labelled.labels), np.int64)
        for c in np.unique(labelled.labels):
            own = np.flatnonzero(labelled.labels == c)
            nth[own] = np.asarray(seeds.permutation(len(own), int(c)), np.int64) % folds
        parts = [(nth != k, nth == k) for k in range(folds)]
        rounds = [(labelled.values[a], labelled.labels[a], labelled.values[b], labelled.labels[b]) for a, b in parts]
        words = f"the labelled images by {folds}-fold cross-validation"
    else:
        return grid[0], "nothing: a class has one labelled image", None
    if len(grid) == 1:
        return grid[0], "nothing: there is one setting", None
    scores = [
        np.mean([_balanced(learner.fit(setting, x, y, more)(queries), np.unique(y), truth)
                 for x, y, queries, truth in rounds])
        for setting in grid
    ]  # fmt: skip
    held = held_out is not None and len(held_out.labels) > 0
    return grid[int(np.argmax(scores))], words, 100 * float(max(scores)) if held else None


def _balanced(scores: NDArray[np.float64], classes: Labels, truth: Labels) -> float:
    right = classes[scores.argmax(1)] == truth
    return float(np.mean([right[truth == c].mean() for c in np.unique(truth)]))


def _predictions(
    scores: NDArray[np.float64], classes: Labels, num_classes: int, queries: Samples, probabilities: bool
) -> Predictions:
    """Give scores of the labelled classes the form of a network's predictions; a class without labels scores lowest."""
    whole = np.full((len(scores), num_classes), -np.inf)
    whole[:, classes] = np.log(np.maximum(scores, 1e-12)) if probabilities else scores
    shifted = np.exp(whole - whole.max(1, keepdims=True))
    shares = shifted / shifted.sum(1, keepdims=True)
    own = whole[np.arange(len(whole)), queries.labels]
    return Predictions(
        sample_indices=queries.sample_indices,
        labels=queries.labels,
        predicted=whole.argmax(1),
        label_rank=(whole > own[:, None]).sum(1),
        confidence=shares.max(1),
        loss=-np.log(np.maximum(shares[np.arange(len(whole)), queries.labels], 1e-12)),
    )
