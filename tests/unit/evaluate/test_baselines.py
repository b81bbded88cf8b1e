"""Baselines do what scikit-learn does with the chosen setting, are tuned without the queries, and know classes without labels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from pipeline.data import main as data
from pipeline.datasets.manifest import read_manifest
from pipeline.errors import ConfigError
from pipeline.evaluate.baselines import Samples, evenly, fit_baseline, pixels_of, side_for
from pipeline.evaluate.learners import LEARNERS


def blobs(per_class: int, classes: int = 3, features: int = 5, seed: int = 0, spread: float = 1.0) -> Samples:
    """Gaussian clouds about fixed centres."""
    centres = 2 * np.random.default_rng(99).standard_normal((classes, features))
    labels = np.repeat(np.arange(classes), per_class)
    noise = np.random.default_rng(seed).standard_normal((len(labels), features))
    return Samples(np.arange(len(labels)), (centres[labels] + spread * noise).astype(np.float32), labels)


def accuracy(found: object) -> float:
    predictions = found.predictions  # type: ignore[attr-defined]
    return float((predictions.predicted == predictions.labels).mean())


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "majority"])
def test_every_learner_finds_clouds_that_are_apart(name: str) -> None:
    labelled, queries = blobs(4, spread=0.3), blobs(20, seed=1, spread=0.3)
    found = fit_baseline(name, labelled, queries, 3, unlabelled=blobs(30, seed=2, spread=0.3))
    assert accuracy(found) == 1.0
    assert found.tuned_on == "the labelled images by 4-fold cross-validation"
    assert (found.predictions.label_rank == 0).all()
    assert found.predictions.confidence.min() > 1 / 3


def test_logistic_regression_is_scikit_learns_with_the_chosen_setting() -> None:
    labelled, queries, held_out = blobs(10, spread=2), blobs(50, seed=1, spread=2), blobs(8, seed=2, spread=2)
    found = fit_baseline("logistic", labelled, queries, 3, held_out=held_out)
    strength = float(found.setting.split(",")[0].removeprefix("C "))
    scale = labelled.values.std(0) if "feature" in found.setting else (labelled.values - labelled.values.mean(0)).std()
    prepare = lambda x: (x - labelled.values.mean(0)) / scale  # noqa: E731
    model = LogisticRegression(C=strength, max_iter=300).fit(prepare(labelled.values), labelled.labels)
    shares = model.predict_proba(prepare(queries.values))
    np.testing.assert_allclose(found.predictions.confidence, shares.max(1), atol=1e-4)
    np.testing.assert_allclose(found.predictions.loss, -np.log(shares[np.arange(150), queries.labels]), atol=1e-3)
    assert found.tuned_on == "24 validation images"
    best = max(accuracy(fit_baseline("logistic", labelled, held_out, 3, held_out=held_out)), 0)
    grid = LEARNERS["logistic"].grid["C"]
    single = [
        np.mean(LogisticRegression(C=c, max_iter=300).fit(prepare(labelled.values), labelled.labels)
                .predict(prepare(held_out.values)) == held_out.labels)
        for c in grid
    ]  # fmt: skip
    assert best >= max(single) - 1e-9  # the classes of `held_out` are equally large


def test_label_spreading_gains_from_unlabelled_samples_where_classes_are_bands() -> None:
    rng = np.random.default_rng(0)
    along = np.linspace(0, 6, 40)
    band = np.concatenate([np.stack([along, np.full(40, side * 1.5)], 1) for side in (0, 1)])
    values = (band + 0.02 * rng.standard_normal(band.shape)).astype(np.float32)
    labels = np.repeat([0, 1], 40)
    ends = np.array([0, 79])  # one label at opposite ends of the two bands
    labelled = Samples(ends, values[ends], labels[ends])
    rest = np.setdiff1d(np.arange(80), ends)
    queries = Samples(rest, values[rest], labels[rest])
    alone = fit_baseline("spreading", labelled, queries, 2)
    helped = fit_baseline("spreading", labelled, queries, 2, unlabelled=queries)
    assert accuracy(alone) < 0.75
    assert accuracy(helped) > 0.95


def test_with_one_label_a_class_nothing_is_tuned_and_the_default_is_used() -> None:
    found = fit_baseline("svm", blobs(1), blobs(5, seed=1), 3)
    assert (found.setting, found.tuned_on) == ("C 1, gamma 1, scaled_by all", "nothing: a class has one labelled image")


def test_a_class_without_labels_is_never_predicted_and_scores_lowest() -> None:
    labelled, queries = blobs(5), blobs(5, classes=4, seed=1)
    labelled = Samples(*(part[labelled.labels != 1] for part in labelled))
    found = fit_baseline("logistic", labelled, queries, 4).predictions
    assert set(found.predicted) <= {0, 2}
    assert (found.label_rank[queries.labels == 1] >= 2).all()
    assert np.isfinite(found.loss).all()


def test_labels_of_one_class_are_refused() -> None:
    one = blobs(5)
    with pytest.raises(ConfigError, match="two classes at least, and there are 1"):
        fit_baseline("logistic", Samples(*(part[one.labels == 0] for part in one)), one, 3)


def test_evenly_takes_as_many_of_each_class_while_they_last() -> None:
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    indices = np.arange(73) * 2
    chosen = evenly(indices, labels, 23)
    assert np.bincount(labels[chosen // 2]).tolist() == [10, 3, 10]
    assert (np.diff(chosen) > 0).all()
    assert (evenly(indices, labels, 100) == indices).all()
    assert (evenly(indices, labels, 23) == chosen).all()


def test_pixels_are_the_images_own_in_the_range_0_to_1(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 3, 12, 12), dtype=np.uint8)
    for c, k in np.ndindex(2, 3):
        file = tmp_path / "images" / "ab"[c] / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[c, k]).save(file)
    assert data(["convert", "imagefolder", str(tmp_path / "images"), "--out", str(tmp_path / "shards")]) == 0
    manifest = read_manifest(tmp_path / "shards")
    everything = np.arange(6)
    side = side_for(manifest, everything)
    found = pixels_of(manifest, everything[::-1], side=side)
    assert side == 12
    assert found.sample_indices.tolist() == everything.tolist()
    for k in everything:
        c, name = found.labels[k], manifest.key(int(k))
        own = pictures[c, int(name[-1])] / 255
        np.testing.assert_allclose(found.values[k].reshape(3, 12, 12)[1], own, atol=1e-6)
