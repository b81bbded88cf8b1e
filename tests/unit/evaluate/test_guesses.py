"""Labels that a simple learner guesses, against scikit-learn on the same pixels."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from pipeline.data import main
from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.decoding import DEFAULT
from pipeline.errors import ConfigError
from pipeline.evaluate.guesses import CANDIDATES, guess_labels, kept_guesses


@pytest.fixture(scope="module")
def manifest(digits: Path) -> Manifest:
    return read_manifest(digits / "train")


def subsets(manifest: Manifest, each: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A few labelled samples of each class, 300 of the pool, and 60 for validation."""
    labelled = np.concatenate([np.flatnonzero(manifest.labels == c)[:each] for c in range(len(manifest.classes))])
    rest = np.setdiff1d(np.arange(manifest.num_samples), labelled)
    return labelled, rest[60:360], rest[:60]


def test_a_neighbour_guesses_as_scikit_learn_does(manifest: Manifest) -> None:
    from pipeline.evaluate.baselines import pixels_of, side_for

    labelled, pool, _ = subsets(manifest)
    found = guess_labels(manifest, labelled, pool, (manifest, labelled[:0]), "neighbour")
    side = side_for(manifest, labelled)
    known, asked = (pixels_of(manifest, samples, side=side) for samples in (labelled, pool))
    grey = [samples.values[:, : side * side] for samples in (known, asked)]
    own = [(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in grey]  # each image by its own contrast
    expected = KNeighborsClassifier(1).fit(own[0], known.labels).predict(own[1])
    assert (found.labels[pool] == expected).mean() > 0.99  # images as far from two neighbours may differ
    assert (found.labels[np.setdiff1d(np.arange(manifest.num_samples), pool)] == -1).all()


def test_hidden_labels_decide_nothing(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    labelled, pool, held_out = subsets(manifest)
    shuffled = manifest.labels.copy()
    shuffled[pool] = np.random.default_rng(0).permutation(shuffled[pool])
    found = guess_labels(manifest, labelled, pool, (manifest, held_out))
    monkeypatch.setattr(Manifest, "labels", property(lambda self: shuffled))
    other = guess_labels(manifest, labelled, pool, (manifest, held_out))
    assert (found.labels == other.labels).all()
    assert found.words == other.words


def test_spreading_guesses_unless_validation_images_speak_clearly_for_another(manifest: Manifest) -> None:
    labelled, pool, held_out = subsets(manifest)
    assert guess_labels(manifest, labelled, pool, (manifest, held_out[:0])).learner == CANDIDATES[0] == "spreading"
    right = {}
    for name in CANDIDATES:
        found = guess_labels(manifest, labelled, pool, (manifest, held_out), name)
        right[name] = float((found.labels[pool] == manifest.labels[pool]).mean())
        assert right[name] > 0.5
    chosen = guess_labels(manifest, labelled, pool, (manifest, held_out)).learner
    assert right[chosen] > max(right.values()) - 0.1


def test_colour_images_are_guessed_with_and_without_validation_images(tmp_path: Path) -> None:
    """Three colours on noise: the mean colour tells the class, and nothing else does."""
    generator = np.random.default_rng(0)
    for k in range(60):
        pixels = generator.integers(0, 120, (16, 16, 3), dtype=np.uint8)
        pixels[..., k % 3] += 100
        path = tmp_path / "images" / f"class_{k % 3}" / f"{k:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    main(["convert", "imagefolder", str(tmp_path / "images"), "--out", str(tmp_path / "data")])
    manifest = read_manifest(tmp_path / "data")
    labelled, pool, held_out = subsets(manifest, each=2)
    held_out, pool = np.split(np.setdiff1d(np.arange(60), labelled), [15])
    for held in (held_out, held_out[:0]):
        found = guess_labels(manifest, labelled, pool, (manifest, held))
        assert (found.labels[pool] == manifest.labels[pool]).mean() > 0.9


def test_a_later_start_reads_the_same_guesses_unless_they_are_damaged_or_of_other_inputs(
    manifest: Manifest, tmp_path: Path
) -> None:
    labelled, pool, held_out = subsets(manifest)

    def kept(learner: str = "neighbour") -> np.ndarray:
        return kept_guesses(tmp_path, manifest, labelled, pool, (manifest, held_out), learner, decoding=DEFAULT)

    first = kept()
    (path,) = tmp_path.iterdir()
    stored = np.where(first == 3, 4, first)  # no learner would guess so: it can only come from the file
    np.save(path, stored)
    assert (kept() == stored).all()
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-8], whole.replace(b"<i8", b"<f8"), np.random.default_rng(0).bytes(300)):
        path.write_bytes(damaged)
        assert (kept() == first).all()
    np.save(path, stored + 100)
    assert (kept() == first).all()
    kept("logistic")
    assert len(list(tmp_path.iterdir())) == 2


def test_labels_of_one_class_are_refused(manifest: Manifest) -> None:
    labelled, pool, held_out = subsets(manifest)
    with pytest.raises(ConfigError, match="labels of two classes at least"):
        guess_labels(manifest, labelled[:1], pool, (manifest, held_out))
