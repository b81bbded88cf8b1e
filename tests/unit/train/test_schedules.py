"""The learning rate is a function of the step."""

import math

import pytest

from pipeline.train.config import OptimConfig
from pipeline.train.schedules import learning_rate, warmup_cosine


def test_it_rises_linearly_to_the_peak_and_falls_by_half_a_cosine() -> None:
    lr_at = warmup_cosine(peak=1.0, final=0.1, warmup=4, total=104)
    assert [lr_at(s) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert lr_at(54) == pytest.approx(0.55)
    assert lr_at(104) == pytest.approx(0.1)
    assert lr_at(10_000) == pytest.approx(0.1)


def test_the_very_first_step_moves() -> None:
    assert warmup_cosine(1.0, 0.0, 40, 100)(0) > 0


def test_fixmatchs_schedule_is_a_cosine_of_seven_sixteenths() -> None:
    lr_at = learning_rate(OptimConfig(lr=0.03, schedule="cosine_7_16"), 2**18)
    for step in (0, 1000, 2**17, 2**18):
        assert lr_at(step) == pytest.approx(0.03 * math.cos(7 * math.pi * step / (16 * 2**18)))
    plain = learning_rate(OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4, cooldown_steps=6), 110)
    assert [plain(s) for s in (4, 54, 104, 109)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
