"""Whether flips are harmless: on scanned digits, on shapes that a mirror keeps, and on a pair that it exchanges.

Whether colours tell the classes: on signs that have colours of their own, and on letters in any colour.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from sklearn.datasets import load_digits

from launchers.recipe.neighbours import FEWEST, FEWEST_COLOURS, FlipTest, choose_flips, compare_colours, compare_flips

RNG = np.random.default_rng(0)
BEGINNING = RNG.bit_generator.state


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """A test draws the same numbers, whichever tests ran before it."""
    RNG.bit_generator.state = BEGINNING


def pictures(shapes: list[np.ndarray], number: int) -> tuple[list[np.ndarray], np.ndarray]:
    """`number` noisy, shifted copies of each shape (16, 16)."""
    found, labels = [], []
    for label, shape in enumerate(shapes):
        for _ in range(number):
            moved = np.roll(shape, RNG.integers(-1, 2, 2), (0, 1)) * 200 + RNG.normal(20, 10, shape.shape)
            found.append(np.repeat(moved.clip(0, 255).astype(np.uint8)[..., None], 3, 2))
            labels.append(label)
    return found, np.array(labels)


def letter(rows: slice, columns: slice, stem: int) -> np.ndarray:
    """A stem with a bowl: b, d, p or q."""
    shape = np.zeros((16, 16))
    shape[2:14, stem] = shape[2:14, stem + 1] = 1
    shape[rows, columns] = 1
    return shape


def symmetric() -> list[np.ndarray]:
    """A bar, a ring and a dot, which a mirror keeps."""
    bar, ring, dot = np.zeros((3, 16, 16))
    bar[:, 7:9] = 1
    ring[4:12, 4:12] = 1
    ring[6:10, 6:10] = 0
    dot[6:10, 6:10] = 1
    return [bar, ring, dot]


def test_digits_must_not_be_mirrored() -> None:
    digits = load_digits()
    images = [np.repeat((16 * d).clip(0, 255).astype(np.uint8)[..., None], 3, 2) for d in digits.images[:400]]
    found = compare_flips(images, digits.target[:400])
    assert found.harmless is False
    assert "flips are harmful" in found.why


def test_b_and_d_must_not_be_mirrored_though_every_mirrored_image_looks_like_one_of_the_set() -> None:
    b, d = letter(slice(8, 14), slice(5, 10), 3), letter(slice(8, 14), slice(6, 11), 11)
    assert compare_flips(*pictures([b, d], 40)).harmless is False


def test_symmetric_shapes_may_be_mirrored() -> None:
    assert compare_flips(*pictures(symmetric(), 30)).harmless is True


def test_a_loss_that_so_few_images_do_not_establish_leaves_the_decision_to_the_kind_of_images() -> None:
    b, d = letter(slice(8, 14), slice(5, 10), 3), letter(slice(8, 14), slice(6, 11), 11)

    def compared(times: int) -> FlipTest:
        """Mirrored, an eighth of the images shows another class."""
        same, same_labels = pictures(symmetric(), 14 * times)
        signs, sign_labels = pictures([b, d], 3 * times)
        return compare_flips(same + signs, np.concatenate([same_labels, sign_labels + 3]))

    few = compared(1)
    assert few.harmless is None
    assert "do not establish it" in few.why
    assert choose_flips("test", few, drawn=True).harmless is False
    assert compared(6).harmless is False


def test_few_images_or_neighbours_that_know_nothing_decide_nothing() -> None:
    images, labels = pictures([np.eye(16), np.eye(16)[::-1]], FEWEST // 2 - 1)
    assert compare_flips(images, labels).harmless is None
    noise = [RNG.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(200)]
    found = compare_flips(noise, RNG.integers(0, 4, 200))
    assert found.harmless is None
    assert "too few to tell" in found.why


@pytest.mark.parametrize(("asked", "drawn", "used"), [
    ("yes", True, True), ("no", False, False), ("test", True, False), ("test", False, True)
])  # fmt: skip
def test_what_the_person_says_comes_first_then_the_test_then_the_kind(asked: str, drawn: bool, used: bool) -> None:
    undecided = compare_flips([], np.array([], int))
    found = choose_flips(asked, undecided, drawn)
    assert found.harmless is used
    if asked == "test":
        assert "--flips yes or no decides otherwise" in found.why


def coloured(letters: list[np.ndarray], colours: np.ndarray) -> list[np.ndarray]:
    """Shapes of noise in colours (n, 3), on white."""
    ink = [np.clip(shape[..., :1] / 255.0, 0, 1) for shape in letters]
    return [(255 * (1 - a) + colour * a).astype(np.uint8) for a, colour in zip(ink, colours, strict=True)]


def test_signs_with_colours_of_their_own_keep_them() -> None:
    shapes, labels = pictures([letter(slice(8, 14), slice(5, 10), 3)] * 3, 20)
    own = np.array([[220, 30, 30], [30, 160, 40], [40, 60, 210]])[labels] + RNG.integers(-20, 20, (60, 3))
    found = compare_colours(coloured(shapes, own), labels)
    assert found.telling
    assert "of 60 images 100 % find their class among the others by their colours alone" in found.why
    assert "33 % by chance" not in found.why  # 32: an image is not its own neighbour
    assert "32 % by chance" in found.why


def test_letters_in_any_colour_change_theirs() -> None:
    b, d = letter(slice(8, 14), slice(5, 10), 3), letter(slice(8, 14), slice(6, 11), 11)
    shapes, labels = pictures([b, d], 60)
    found = compare_colours(coloured(shapes, RNG.integers(0, 256, (120, 3))), labels)
    assert not found.telling


def test_colours_that_find_much_less_than_the_pixels_do_not_tell_the_classes() -> None:
    """Signs whose shapes find nearly all, and whose colours find a class a little more often than by chance."""
    shapes = [np.roll(letter(slice(8, 14), slice(5, 10), 3), 2 * k, 1) for k in range(8)]
    drawn, labels = pictures(shapes, 40)
    own = np.array([[220, 30, 30], [30, 160, 40]])[labels // 4] + RNG.integers(-20, 20, (320, 3))
    found = compare_colours(coloured(drawn, own), labels)
    assert not found.telling


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        ([], "0 labelled images are too few"),
        ([0, 1], "2 labelled images are too few"),
        ([2] * FEWEST_COLOURS, "there is one class"),
        (range(FEWEST_COLOURS), "no class has two labelled images"),
    ],
)
def test_colours_of_too_few_images_or_of_one_class_tell_nothing(labels: Sequence[int], why: str) -> None:
    images = [np.full((8, 8, 3), 10 * k, np.uint8) for k in range(len(labels))]
    found = compare_colours(images, np.array(labels, int))
    assert not found.telling
    assert why in found.why
