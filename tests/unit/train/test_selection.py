"""Which validation is the best, and for how long none was better."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.train.selection import Selection

CRITERIA = {"val/top1": 1, "val/nll": -1}
NUMBERS = st.sampled_from([0.0, 10.0, 50.0, math.nan, math.inf])


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_the_best_is_the_first_of_the_largest_finite_ones(found: list[tuple[float, float]]) -> None:
    selection = Selection()
    for step, (top1, nll) in enumerate(found, start=1):
        selection.see(step, {"val/top1": top1, "val/nll": nll, "val/ece": 3.0}, CRITERIA)
    finite = [(top1, -nll, -step) for step, (top1, nll) in enumerate(found, start=1) if math.isfinite(top1 + nll)]
    if not finite:
        assert (selection.step, selection.best, selection.waited) == (0, {}, len(found))
        return
    top1, loss, step = max(finite)
    assert (selection.step, selection.best) == (-step, {"val/top1": top1, "val/nll": -loss})
    assert selection.waited == len(found) + step


@given(st.integers(0, 200), st.integers(1, 200), st.integers(0, 200))
def test_a_trained_start_stays_only_if_all_later_states_are_worse_by_a_standard_error(
    right: int, images: int, fewer: int
) -> None:
    """Among later states the best one counts, however little better it is."""
    start, later = (100 * max(0, min(count, images)) / images for count in (right, min(right, images) - fewer))
    selection = Selection()
    assert selection.see(0, {"val/top1": start, "val/nll": 1.0}, CRITERIA, images)
    share = (start / 100 * images + 1) / (images + 2)  # Agresti and Coull
    error = 100 * math.sqrt(share * (1 - share) / images)
    took = selection.see(1, {"val/top1": later, "val/nll": 9.0}, CRITERIA, images)
    if abs(later - (start - error)) > 1e-6:
        assert took == (later > start - error)
    if took:
        assert selection.see(2, {"val/top1": later + 1e-3, "val/nll": 9.0}, CRITERIA, images)
        assert not selection.see(3, {"val/top1": later, "val/nll": 0.1}, CRITERIA, images)


@pytest.mark.parametrize(("images", "start", "later", "took"), [
    (10, 90.0, 80.0, True), (10, 100.0, 90.0, False), (300, 92.0, 91.0, True), (300, 92.0, 90.0, False), (300, 92.0, 93.0, True)
])  # fmt: skip
def test_few_images_cannot_tell_a_harm_of_one_of_them(images: int, start: float, later: float, took: bool) -> None:
    selection = Selection()
    selection.see(0, {"val/top1": start, "val/nll": 0.1}, CRITERIA, images)
    assert selection.see(1, {"val/top1": later, "val/nll": 5.0}, CRITERIA, images) == took


def test_where_a_loss_is_compared_every_better_state_is_taken() -> None:
    selection = Selection()
    selection.see(0, {"val/loss": 0.5}, {"val/loss": -1}, 10)
    assert selection.see(1, {"val/loss": 0.4999}, {"val/loss": -1}, 10)


def test_it_survives_its_json() -> None:
    selection = Selection()
    selection.see(5, {"val/loss": 0.25}, {"val/loss": -1})
    assert not selection.see(10, {"val/loss": 0.5}, {"val/loss": -1})
    again = Selection.model_validate_json(selection.model_dump_json())
    assert again.see(15, {"val/loss": 0.125}, {"val/loss": -1})
    assert (again.step, again.seen, again.waited) == (15, 3, 0)
