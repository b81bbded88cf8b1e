"""Which validation is the best, and for how long none was better."""

import math

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


@given(st.integers(0, 100), st.integers(0, 100), st.floats(0.01, 10))
def test_a_trained_start_stays_only_if_all_later_states_are_less_accurate(start: int, later: int, loss: float) -> None:
    """Among later states the best one counts, however little better it is."""
    selection = Selection()
    assert selection.see(0, {"val/top1": start, "val/nll": 0.1}, CRITERIA)
    took = selection.see(1, {"val/top1": later, "val/nll": loss}, CRITERIA)
    assert took == (later >= start)
    if took:
        assert not selection.see(2, {"val/top1": later, "val/nll": loss}, CRITERIA)
        assert selection.see(3, {"val/top1": later, "val/nll": loss / 2}, CRITERIA)
        assert selection.see(4, {"val/top1": later + 1e-3, "val/nll": 2 * loss}, CRITERIA)
        assert not selection.see(5, {"val/top1": later, "val/nll": loss / 4}, CRITERIA)


def test_where_a_loss_comes_first_a_start_gives_way_to_one_as_small() -> None:
    selection = Selection()
    selection.see(0, {"val/loss": 0.5}, {"val/loss": -1})
    assert not selection.see(1, {"val/loss": 0.5001}, {"val/loss": -1})
    assert selection.see(2, {"val/loss": 0.5}, {"val/loss": -1})
    assert not selection.see(3, {"val/loss": 0.5}, {"val/loss": -1})


def test_it_survives_its_json() -> None:
    selection = Selection()
    selection.see(5, {"val/loss": 0.25}, {"val/loss": -1})
    assert not selection.see(10, {"val/loss": 0.5}, {"val/loss": -1})
    again = Selection.model_validate_json(selection.model_dump_json())
    assert again.see(15, {"val/loss": 0.125}, {"val/loss": -1})
    assert (again.step, again.seen, again.waited) == (15, 3, 0)
