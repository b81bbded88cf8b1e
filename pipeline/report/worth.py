"""Compute for a report whether the stages were worth it: gains paired over the test images, and baselines on the spot.

The baselines take seconds: large sets are capped at `MAX_LEARNT` and `MAX_TESTED` images, which the report says. They learn
from the same labels as the stages. Gains over a baseline are paired on the images that both saw.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean

import numpy as np

from pipeline.datasets.manifest import Manifest
from pipeline.errors import DataError, PipelineError
from pipeline.evaluate.baselines import (
    Baseline,
    Samples,
    evenly,
    export_features,
    fit_baseline,
    pixels_of,
    side_for,
)
from pipeline.evaluate.bootstrap import paired
from pipeline.evaluate.learners import LEARNERS, MAX_FOR_SVM, MAX_UNLABELLED
from pipeline.evaluate.metrics import summary
from pipeline.evaluate.predictions import Predictions
from pipeline.exports.card import CARD
from pipeline.report.images_of import ImagesOf, images_of
from pipeline.report.results import ROWS, Result, evaluated_rows
from pipeline.report.verdict import Gain, Simple, Worth

logger = logging.getLogger(__name__)

MAX_LEARNT, MAX_TESTED = 5_000, 4_000  # images that a baseline learns from, and is tested on
MAX_PRODUCTS = 10**8  # images x features x classes up to which a baseline is tuned
MAX_EXPERIMENTS = 5  # seeds for which baselines are computed
COMPUTED = ("logistic", "neighbour", "svm", "spreading")

Read = Callable[[Manifest, np.ndarray], Samples]


def measure(results: Sequence[Result]) -> Worth:
    """Compute the baselines and the gains of experiments of one design.

    Args:
        results: The experiments; those without an evaluation are left out.
    """
    evaluated = [result for result in results if result.models][:MAX_EXPERIMENTS]
    if not evaluated:
        return Worth([], [], [], "no stage has been evaluated yet")
    notes: list[str] = []
    try:
        fitted = [_baselines(result, notes) for result in evaluated]
    except (PipelineError, RuntimeError, OSError) as error:
        logger.warning("the report has no baselines: %s", error)
        return compare(evaluated, [{} for _ in evaluated], missing=str(error))
    return compare(evaluated, fitted, notes=list(dict.fromkeys(notes)))


def compare(
    results: Sequence[Result],
    fitted: Sequence[Mapping[str, Baseline]],
    *,
    notes: Sequence[str] = (),
    missing: str = "",
) -> Worth:
    """Compute the gains of experiments of one design over one another and over baselines.

    Args:
        results: Experiments with an evaluation.
        fitted: For each of them, title -> baseline; only what all of them have counts.
        notes: What was capped.
        missing: Why there are no baselines.
    """
    classes = len(next(iter(results[0].models.values()))["per_class"])
    titles = [title for title in fitted[0] if all(title in found for found in fitted)]
    baselines = [_simple(title, [found[title] for found in fitted], classes) for title in titles]
    baselines.sort(key=lambda baseline: -baseline.top1)
    return Worth(_gains(results, fitted, baselines, classes), baselines, notes, missing)


def exported_row(result: Result) -> str | None:
    """Return the row of the table whose model the last stage exports; None if nothing was evaluated."""
    rows = evaluated_rows([result])
    semi = result.stages.get("semi")
    if semi is not None and any(ROWS[row][0] == "semi" for row in rows):
        wanted = f"stage 3, {semi.config.get('export', 'teacher')}"
        return wanted if wanted in rows else rows[-1]
    return rows[-1] if rows else None


def _gains(
    results: Sequence[Result], fitted: Sequence[Mapping[str, Baseline]], baselines: Sequence[Simple], classes: int
) -> list[Gain]:
    """Return the gains stage by stage, as far as the predictions are there."""
    exported = exported_row(results[-1])
    stored = {row: [_stored(result, row) for result in results] for row in ROWS}
    found: list[Gain | None] = []
    pixels, features = (f"{LEARNERS['logistic'].title} on {source}" for source in ("pixels", "stage 1's features"))
    if all(features in each for each in fitted):
        before, after = ([each[title].predictions for each in fitted] for title in (pixels, features))
        found.append(_gain("stage 1's features over pixels", features, pixels, before, after, classes))
    rivals = [each[baselines[0].title].predictions for each in fitted] if baselines else []
    if rivals and exported != "stage 2":
        title = baselines[0].title
        found.append(_gain(f"stage 2 over {title}", "stage 2", title, rivals, stored["stage 2"], classes))
    if exported and ROWS[exported][0] == "semi":
        found.append(
            _gain(f"{exported}, over stage 2", "stage 3", "stage 2", stored["stage 2"], stored[exported], classes)
        )
    if rivals and exported:
        title = baselines[0].title
        name = f"exported model over {title}"
        found.append(_gain(name, f"the exported model ({exported})", title, rivals, stored[exported], classes))
    return [gain for gain in found if gain is not None]


def _gain(
    name: str,
    subject: str,
    over: str,
    first: Sequence[Predictions | None],
    second: Sequence[Predictions | None],
    classes: int,
) -> Gain | None:
    """Compare two models over the experiments that have both, on the test images that both have seen."""
    pairs = [_on_the_same(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    pairs = [pair for pair in pairs if len(pair[0].labels)]
    if not pairs:
        return None
    found = paired([a for a, _ in pairs], [b for _, b in pairs], classes, {})["top1"]
    return Gain(name, subject, over, found.value, found.low, found.high)


def _on_the_same(a: Predictions, b: Predictions) -> tuple[Predictions, Predictions]:
    both = np.intersect1d(a.sample_indices, b.sample_indices)
    return _only(a, both), _only(b, both)


def _only(predictions: Predictions, sample_indices: np.ndarray) -> Predictions:
    kept = np.isin(predictions.sample_indices, sample_indices)
    return Predictions(**{name: getattr(predictions, name)[kept] for name in Predictions.__dataclass_fields__})


def _stored(result: Result, row: str) -> Predictions | None:
    stage, model = ROWS[row]
    path = result.experiment / stage / f"predictions-{model}.npz"
    if row not in result.models or not path.is_file():
        return None
    try:
        return Predictions.load(path, len(result.models[row]["per_class"]))
    except DataError as error:
        logger.warning("the report compares without these predictions: %s", error)
        return None


def _simple(title: str, found: Sequence[Baseline], classes: int) -> Simple:
    scores = [summary(each.predictions, classes, {}) for each in found]
    return Simple(
        title,
        fmean(score["top1"] for score in scores),
        fmean(score["ece"] for score in scores) if found[0].calibrated else None,
        f"{found[0].setting}; tuned on {found[0].tuned_on}",
        sum(each.seconds for each in found),
        None if None in (values := [each.validated for each in found]) else fmean(v for v in values if v is not None),
    )


def _baselines(result: Result, notes: list[str]) -> dict[str, Baseline]:
    """Fit the baselines of one experiment: on pixels, and on stage 1's features if its export is there."""
    images = images_of(result)
    if images.train.remote or images.test[0].remote:
        raise DataError("some shards are behind a URL, so no baselines were computed; copy the shards here for them")
    side = side_for(images.train, images.labelled, images.decoding)
    sources: dict[str, Read] = {"pixels": partial(pixels_of, side=side, decoding=images.decoding)}
    pretrained = result.experiment / "arm" / "export"
    if (pretrained / CARD).is_file():
        sources["stage 1's features"] = partial(export_features, pretrained)
    found = {}
    for source, read in sources.items():
        for learner, baseline in _fit(images, read, notes).items():
            found[f"{LEARNERS[learner].title} on {source}"] = baseline
    return found


def _fit(images: ImagesOf, read: Read, notes: list[str]) -> dict[str, Baseline]:
    held_out, chosen = images.validation
    test, tested = images.test
    learnt = evenly(images.labelled, images.train.labels[images.labelled], MAX_LEARNT)
    queries = evenly(tested, test.labels[tested], MAX_TESTED)
    for kept, whole, words in ((learnt, images.labelled, "learn from"), (queries, tested, "are tested on")):
        if len(kept) < len(whole):
            notes.append(
                f"The baselines {words} {len(kept):,} of {len(whole):,} images, chosen evenly over the classes."
            )
    labelled = read(images.train, learnt)
    validation = read(held_out, evenly(chosen, held_out.labels[chosen], MAX_TESTED)) if len(chosen) else None
    classes = len(images.train.classes)
    tune = labelled.values.size * classes <= MAX_PRODUCTS
    asked = read(test, queries)
    few = evenly(images.unlabelled, np.zeros(len(images.unlabelled), np.int64), MAX_UNLABELLED)
    unlabelled = read(images.train, few) if len(few) else None
    fit = partial(fit_baseline, held_out=validation, unlabelled=unlabelled, tune=tune)
    names = [name for name in COMPUTED if name != "svm" or len(learnt) <= MAX_FOR_SVM]
    return {name: fit(name, labelled, asked, classes) for name in names}
