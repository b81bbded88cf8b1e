"""Temperatures: against scipy's minimiser, and the rules for few validation images."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

from pipeline.evaluate.calibration import (
    FEWEST,
    SHARPENS_FROM,
    calibrate,
    expected_calibration_error,
    fit_temperature,
    losses,
    reliability,
)


def drawn(number: int, temperature: float, seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose calibrated temperature is `temperature`: labels are drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((number, classes))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.array([rng.choice(classes, p=row) for row in p])
    return logits * temperature, labels


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def test_losses_are_sklearns_and_those_of_probabilities_torchs() -> None:
    logits, labels = drawn(50, 3.0)
    targets = softmax(drawn(50, 1.0, seed=1)[0])
    torchs = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets), reduction="none")
    np.testing.assert_allclose(losses(logits, targets), torchs.numpy(), rtol=1e-10)
    assert losses(logits, labels).mean() == pytest.approx(log_loss(labels, softmax(logits), labels=range(4)))


@pytest.mark.parametrize("prior", [0.0, 1.0, 25.0])
def test_the_temperature_is_scipys_minimum(prior: float) -> None:
    logits, labels = drawn(200, 3.0)

    def objective(log_t: float) -> float:
        scaled = softmax(logits / np.exp(log_t))[np.arange(200), labels]
        return float(-np.log(scaled).sum() + prior * log_t**2 / 2)

    expected = np.exp(minimize_scalar(objective, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x)
    assert fit_temperature(logits, labels, prior=prior) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_calibration_finds_the_temperature_and_lowers_the_error_on_other_images(temperature: float) -> None:
    found = calibrate(*drawn(400, temperature))
    assert found.temperature == pytest.approx(temperature, rel=0.15)
    logits, labels = drawn(4000, temperature, seed=1)
    before, after = (
        expected_calibration_error(reliability(p.max(1), p.argmax(1) == labels))
        for p in (softmax(logits), softmax(logits / found.temperature))
    )
    assert after < 3 < before


def test_below_the_fewest_images_nothing_is_fitted_and_the_words_say_so() -> None:
    found = calibrate(*drawn(FEWEST - 1, 5.0))
    assert found.temperature == 1.0
    assert f"{FEWEST - 1} validation images, at least {FEWEST} are needed" in found.words


def test_a_temperature_that_would_not_help_is_not_taken() -> None:
    """Calibrated logits and few images: cross-validation rejects what the same images would accept."""
    rejected = [calibrate(*drawn(30, 1.0, seed=seed)) for seed in range(20)]
    assert sum(c.temperature == 1.0 for c in rejected) >= 8
    assert any("would not help" in c.words for c in rejected)


def test_a_handful_of_right_predictions_does_not_make_a_model_certain() -> None:
    """Without the pull towards 1 the temperature of ten right answers is the least that is searched, a twentieth."""
    logits = np.zeros((10, 3))
    logits[:, 0] = 2.0
    labels = np.zeros(10, int)
    assert fit_temperature(logits, labels) == pytest.approx(np.exp(-3), rel=1e-3)
    assert calibrate(logits, labels).temperature == 1
    twice = np.concatenate([logits, logits]), np.zeros(20, int)
    assert 0.2 < calibrate(*twice).temperature < 1


@pytest.mark.parametrize("number", [FEWEST, SHARPENS_FROM - 1])
def test_few_images_correct_what_is_too_certain_and_cost_little_elsewhere(number: int) -> None:
    """Means over 40 draws of the calibration error on 4,000 other images, for logits that are four times too large, and right."""
    change = {}
    for truth in (4.0, 1.0):
        logits, labels = drawn(4000, truth, seed=99)

        def error(temperature: float, logits: np.ndarray = logits, labels: np.ndarray = labels) -> float:
            p = softmax(logits / temperature)
            return expected_calibration_error(reliability(p.max(1), p.argmax(1) == labels))

        found = [calibrate(*drawn(number, truth, seed)).temperature for seed in range(40)]
        assert min(found) >= 1
        change[truth] = np.mean([error(t) for t in found]) - error(1.0)
    assert change[4.0] < -6, change
    assert change[1.0] < 3, change


def test_a_classifier_to_start_from_counts_as_ten_images() -> None:
    """With a handful of images the doubt of the start makes a certain model less certain; many images outweigh it."""
    logits, labels = drawn(12, 4.0, seed=3)
    doubt = np.full((12, 4), 0.25)
    alone, doubted = calibrate(logits, labels).temperature, calibrate(logits, labels, doubt).temperature
    assert doubted > 1.3 * alone
    logits, labels = drawn(4000, 4.0)
    doubted = calibrate(logits, labels, np.full((4000, 4), 0.25)).temperature
    assert doubted == pytest.approx(calibrate(logits, labels).temperature, rel=0.02)


def test_a_calibrated_start_makes_few_images_say_more() -> None:
    """Mean calibration error on 4,000 other images over 40 draws of ten: the start is the calibrated model of other logits."""
    others, truth = drawn(4000, 4.0, seed=99)
    errors = []
    for with_start in (False, True):
        found = []
        for seed in range(40):
            logits, labels = drawn(10, 4.0, seed)
            p = softmax(others / calibrate(logits, labels, softmax(logits / 4) if with_start else None).temperature)
            found.append(expected_calibration_error(reliability(p.max(1), p.argmax(1) == truth)))
        errors.append(np.mean(found))
    assert errors[1] < 0.9 * errors[0]


def test_few_images_help_on_average_on_many_others() -> None:
    """Twenty images of an overconfident model: the loss on others falls in nearly all draws."""
    others = drawn(2000, 4.0, seed=99)
    before = losses(*others).mean()
    after = [losses(others[0] / calibrate(*drawn(20, 4.0, seed)).temperature, others[1]).mean() for seed in range(20)]
    assert np.mean(after) < before
    assert sum(a < before for a in after) >= 18
