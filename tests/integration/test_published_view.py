"""A converted ARM sees images as ARM's own evaluation shows them, in evaluate, in predict and from Python."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pipeline
from pipeline.datasets.opening import open_dataset
from pipeline.exports.convert import convert
from pipeline.exports.export import load_export
from tests import warm
from tests.unit.exports import released

CLASSES = tuple("abcde")
SIDE, WHOLE = 32, 37  # the view, and 8/7 of it
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    state = released.filled(released.arm_fine_tuned(dim=32, depth=2, tokens=65, classes=5, patch=4))
    state["head.weight"] *= 8  # so that a view that is a little off gives other probabilities
    torch.save(released.checkpoint(state), folder / "arm.pth")
    convert(folder / "arm.pth", folder / "export", classes=CLASSES)
    return folder / "export"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images twice as wide as high, a folder for each class."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir()
        for k in range(2):
            small = generator.integers(0, 255, (5, 9, 3), dtype=np.uint8)
            Image.fromarray(small).resize((100, 50), Image.Resampling.BICUBIC).save(folder / name / f"{k}.png")
    return folder


def by_hand(export: Path, photos: Path, *, squash: bool) -> np.ndarray:
    """Probabilities from PIL's resize and crop, and the normalisation of the card."""
    model, _ = load_export(export)
    rows = []
    for path in sorted(photos.glob("*/*.png")):
        image = Image.open(path)
        size = (WHOLE, WHOLE) if squash else (2 * WHOLE, WHOLE)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - SIDE) / 2), round((size[1] - SIDE) / 2)
        pixels = np.asarray(image.crop((left, top, left + SIDE, top + SIDE))) / 255
        rows.append(torch.from_numpy((pixels - MEAN) / STD).permute(2, 0, 1).float())
    with torch.no_grad():
        return model(torch.stack(rows)).softmax(-1).numpy()


def test_evaluate_predict_and_python_see_the_published_view(export: Path, photos: Path, tmp_path: Path) -> None:
    want, other = (by_hand(export, photos, squash=squash) for squash in (True, False))
    assert np.abs(want - other).max() > 0.2  # the usual view would be noticed
    files = sorted(photos.glob("*/*.png"))

    done = warm.run([sys.executable, "-m", "pipeline.evaluate", str(export), str(photos), "--out", str(tmp_path / "e")])
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "e" / "predictions-student.npz") as saved:
        # The samples of a folder lie in an order of their own.
        names = [str(path.relative_to(photos).with_suffix("")) for path in files]
        manifest = open_dataset(photos)
        seen = want[[names.index(manifest.key(int(row))) for row in saved["sample_indices"]]]
        np.testing.assert_array_equal(saved["predicted"], seen.argmax(1))
        assert np.abs(saved["confidence"] - seen.max(1)).max() < 0.03
        assert np.abs(np.exp(-saved["loss"]) - seen[np.arange(len(seen)), saved["labels"]]).max() < 0.03

    table = tmp_path / "found.csv"
    done = warm.run([sys.executable, "-m", "pipeline.predict", str(export), str(photos), "--csv", str(table)])
    assert done.returncode == 0, done.stderr
    predicted = np.zeros_like(want)
    with table.open() as lines:
        for row, found in enumerate(csv.DictReader(lines)):
            for rank in ("", "_2", "_3", "_4", "_5"):
                predicted[row, CLASSES.index(found[f"class{rank}"])] = float(found[f"probability{rank}"])

    python = np.zeros_like(want)
    for row, found in enumerate(pipeline.load(export).predict(files)):
        for name, probability in zip(found.names, found.probabilities, strict=True):
            python[row, CLASSES.index(name)] = probability

    for got in (predicted, python):
        assert np.abs(got - want).max() < 0.03
