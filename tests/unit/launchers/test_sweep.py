"""Sweeps: what is typed becomes axes, and a journal that is opened again goes on as if it had never been closed."""

import math
from pathlib import Path

import pytest

from launchers.sweep.space import Axis, read_axes
from pipeline.errors import ConfigError

pytest.importorskip("optuna", reason="pip install 'visionmamba-pipeline[sweep]'")

from launchers.sweep.study import Study, Trial

AXES = [Axis("optim.lr", low=1e-4, high=1e-1, log=True), Axis("loop.steps", low=10, high=90), Axis("kind", ("a", "b"))]


def test_lists_and_ranges_are_read() -> None:
    words = ["a=1,2", "b={x: 1, y: 2},null", "c=1..5", "semi:d=1..5.0", "e.f=1e-4..1:log", "g=[1,2],[3,4]"]
    lists, mappings, whole, real, log, pairs = read_axes(words)
    assert lists.choices == ("1", "2")
    assert mappings.choices == ("{x: 1, y: 2}", "null")
    assert pairs.choices == ("[1,2]", "[3,4]")
    assert (whole.whole, whole.low, whole.high) == (True, 1, 5)
    assert (real.key, real.whole, real.ends()) == ("semi:d", False, ("1.0", "5.0"))
    assert (log.log, log.low, log.high) == (True, 1e-4, 1.0)


@pytest.mark.parametrize("word", ["a", "a=", "=1,2", "a=1", "a=1,1", "a=1,", "a=2..1", "a=1..1", "a=x..2", "a=1..nan",
                                  "a=0..1:log", "a=1..2:exp"])  # fmt: skip
def test_what_is_no_axis_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="--over"):
        read_axes([word])
    with pytest.raises(ConfigError, match="--over a is given twice"):
        read_axes(["a=1,2", "a=3..4"])


def opened(folder: Path, sampler: str = "tpe", axes: list[Axis] = AXES) -> Study:
    return Study(folder / "journal.log", axes, sampler=sampler, seed=3, minimise=True)


def taken(study: Study) -> Trial:
    """Ask for a trial and tell its distance from a rate of 1e-2."""
    trial = study.ask()
    assert trial is not None
    study.tell(trial.number, abs(math.log10(float(trial.values["optim.lr"])) + 2))
    return trial


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sweep_that_is_opened_again_asks_for_the_same_trials(tmp_path: Path, sampler: str) -> None:
    (tmp_path / "cut").mkdir()
    study = opened(tmp_path, sampler)
    straight = [taken(study) for _ in range(14)]
    cut = [taken(opened(tmp_path / "cut", sampler)) for _ in range(14)]
    assert [t.values for t in cut] == [t.values for t in straight]
    assert len({t.values["optim.lr"] for t in straight}) == 14
    assert opened(tmp_path / "cut", sampler).trials() == study.trials()
    best = study.best()
    assert best is not None
    assert best.score == min(t.score for t in study.trials() if t.score is not None)


def test_an_open_trial_stays_open_and_a_failed_one_has_no_score(tmp_path: Path) -> None:
    study = opened(tmp_path)
    first, second = study.ask(), study.ask()
    assert first is not None
    assert second is not None
    study.tell(first.number, None)
    found = opened(tmp_path).trials()
    assert [(t.number, t.state, t.score) for t in found] == [(0, "failed", None), (1, "open", None)]
    assert found[1].values == second.values
    assert found[1].overrides[0].startswith("optim.lr=")
    assert study.best() is None


def test_a_grid_has_every_point_once_in_order(tmp_path: Path) -> None:
    axes = [Axis("a", ("1", "2")), Axis("b", ("x", "y", "z"))]
    points = []
    while (trial := opened(tmp_path, "grid", axes).ask()) is not None:
        points.append("".join(trial.values.values()))
    assert points == ["1x", "1y", "1z", "2x", "2y", "2z"]
