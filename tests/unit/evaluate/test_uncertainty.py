"""Images to label next: the uncertain ones, one of each kind, and equal ones last."""

import numpy as np

from pipeline.evaluate.uncertainty import choose_uncertain, uncertainty


def test_uncertainty_is_one_minus_the_margin() -> None:
    shares = np.array([[0.5, 0.5, 0.0], [0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(uncertainty(np.log(shares + 1e-300)), [1.0, 0.5, 0.0], atol=1e-12)


def test_of_copies_one_is_chosen_first_and_sure_images_are_not() -> None:
    """Three clusters of ten equal images: two that the model is unsure of, one that it is sure of."""
    features = np.repeat(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 10, axis=0)
    unsure = np.repeat([0.9, 0.8, 0.0], 10)
    chosen = choose_uncertain(unsure, features, 4, candidates=5)
    assert chosen[0] == 0
    assert chosen[1] // 10 == 1
    assert (chosen < 20).all()
    assert len(set(chosen)) == 4


def test_of_points_on_a_line_the_farthest_are_chosen_by_hand() -> None:
    features = np.array([[0.0], [1.0], [2.0], [10.0]])
    chosen = choose_uncertain(np.array([1.0, 0.9, 0.9, 0.5]), features, 4)
    # From 0: distances 1, 2, 10 times 0.9, 0.9, 0.5 give 0.9, 1.8, 5; then 0.9 and 1.8; units do not matter.
    assert chosen.tolist() == [0, 3, 2, 1]
    assert choose_uncertain(np.array([1.0, 0.9, 0.9, 0.5]), 1000 * features, 4).tolist() == [0, 3, 2, 1]


def test_an_empty_pool_and_a_small_one_give_what_there_is() -> None:
    assert choose_uncertain(np.empty(0), np.empty((0, 3)), 5).tolist() == []
    assert sorted(choose_uncertain(np.array([0.1, 0.2]), np.eye(2), 5).tolist()) == [0, 1]
