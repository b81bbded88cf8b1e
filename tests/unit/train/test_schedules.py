"""The learning rate is a function of the step."""

import pytest

from pipeline.train.schedules import warmup_cosine


def test_it_rises_linearly_to_the_peak_and_falls_by_half_a_cosine() -> None:
    lr_at = warmup_cosine(peak=1.0, final=0.1, warmup=4, total=104)
    assert [lr_at(s) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert lr_at(54) == pytest.approx(0.55)
    assert lr_at(104) == pytest.approx(0.1)
    assert lr_at(10_000) == pytest.approx(0.1)


def test_the_very_first_step_moves() -> None:
    assert warmup_cosine(1.0, 0.0, 40, 100)(0) > 0
