"""The bundled letters: pictures are a function of (seed, key), balanced, in colour, and readable."""

import io

import numpy as np
from PIL import Image

from pipeline.datasets.convert.letters import CLASSES, SIDE, letters


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_both_parts_are_balanced_and_share_no_key() -> None:
    train, test = letters(0, train_per_class=3, test_per_class=2)
    assert np.bincount(train.labels).tolist() == [3] * len(CLASSES)
    assert np.bincount(test.labels).tolist() == [2] * len(CLASSES)
    assert not set(train.keys) & set(test.keys)


def test_a_picture_is_a_function_of_seed_and_key() -> None:
    first, again, other = (letters(seed, 2, 1)[0] for seed in (0, 0, 1))
    assert first.read(5)[1] == again.read(5)[1]
    assert first.read(5)[1] != other.read(5)[1]
    assert first.read(4)[1] != first.read(5)[1]


def test_pictures_are_in_colour_and_the_letter_stands_out() -> None:
    train, _ = letters(0, 4, 1)
    for item in range(0, len(train.keys), 9):
        image = picture(train.read(item)[1])
        assert image.shape == (SIDE, SIDE, 3)
        assert np.ptp(image.astype(float) @ [0.299, 0.587, 0.114]) > 60
    assert any(np.ptp(picture(train.read(i)[1]).mean((0, 1))) > 30 for i in range(10))
