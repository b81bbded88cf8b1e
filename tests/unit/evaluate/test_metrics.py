"""Accuracy and calibration from a table of predictions, computed by hand."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from torch import nn

from pipeline.evaluate.bootstrap import DRAWS, intervals, paired
from pipeline.evaluate.calibration import expected_calibration_error, fit_temperature, reliability
from pipeline.evaluate.metrics import mean_loss, per_class_accuracy, report, summary, write_per_class
from pipeline.evaluate.predictions import Predictions, collect_logits, predict
from pipeline.streaming.batch import Batch

CPU = torch.device("cpu")


class Same(nn.Module):
    """Predicts the class that the first pixel of an image (3, 1, 1) names, with a logit of 2 over zeros."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2.0 * nn.functional.one_hot(images[:, 0, 0, 0].long(), 3)


def batch(classes: list[int], labels: list[int], indices: list[int]) -> Batch:
    images = torch.tensor(classes, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 1, 1)
    return Batch(images=images, labels=torch.tensor(labels), indices=torch.tensor(indices), virtual_readers=1)


def predictions_of(labels: list[int], predicted: list[int], confidence: list[float] | None = None) -> Predictions:
    n = len(labels)
    return Predictions(
        sample_indices=np.arange(n),
        labels=np.array(labels),
        predicted=np.array(predicted),
        label_rank=np.array(labels) - np.array(predicted) != 0,
        confidence=np.array(confidence or [0.5] * n),
        loss=np.zeros(n),
    )


# 8 of 10 of class 0, 3 of 4 of class 1, none of class 2.
FOURTEEN = predictions_of([0] * 10 + [1] * 4, [0] * 8 + [1] * 2 + [0] + [1] * 3)
GROUPS = {"head": np.array([0]), "tail": np.array([1, 2])}


def test_every_sample_is_predicted_once_in_the_order_of_sample_indices_without_padding() -> None:
    batches = [batch([0, 1, 1], [0, 0, 1], [2, 1, 0]), batch([2, 0, 0], [2, -1, -1], [3, -1, -1])]
    found = predict(Same(), batches, CPU)
    assert found.sample_indices.tolist() == [0, 1, 2, 3]
    assert found.confusion(3).tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]
    right = np.exp(2) / (np.exp(2) + 2)
    assert found.confidence == pytest.approx(right)
    assert found.loss == pytest.approx([-np.log(right), -np.log(1 / (np.exp(2) + 2)), -np.log(right), -np.log(right)])
    assert found.label_rank.tolist() == [0, 1, 0, 0]


def test_a_temperature_divides_the_logits() -> None:
    cool = predict(Same(), [batch([0], [0], [0])], CPU, temperature=2.0)
    assert cool.confidence == pytest.approx(np.e / (np.e + 2))


def test_predictions_survive_their_file(tmp_path: Path) -> None:
    FOURTEEN.save(tmp_path / "a.npz")
    again = Predictions.load(tmp_path / "a.npz", 2)
    assert np.array_equal(again.predicted, FOURTEEN.predicted)
    assert np.array_equal(again.labels, FOURTEEN.labels)


def test_collected_logits_are_in_order_and_without_padding() -> None:
    labels, logits = collect_logits(Same(), [batch([0, 1, 1], [0, 2, -1], [1, 0, -1])], CPU)
    assert labels.tolist() == [2, 0]
    assert logits.tolist() == [[0, 2, 0], [2, 0, 0]]


def test_mean_loss_goes_by_samples_not_by_batches() -> None:
    batches = [batch([0, 1, 2], [0, 0, 0], [0, 1, 2]), batch([9, 0, 0], [0, -1, -1], [3, -1, -1])]
    found = mean_loss(nn.Identity(), batches, lambda p, x: x[:, 0, 0, 0], CPU)
    assert found == pytest.approx((0 + 1 + 2 + 9) / 4)


def test_top1_goes_by_samples_and_balanced_and_groups_by_classes() -> None:
    found = summary(FOURTEEN, 3, GROUPS)
    assert found["top1"] == pytest.approx(100 * 11 / 14)
    assert found["balanced"] == pytest.approx((80 + 75) / 2)
    assert found["head"] == pytest.approx(80)
    assert found["tail"] == pytest.approx(75)


def test_a_class_without_samples_has_no_accuracy_and_a_group_without_samples_is_left_out() -> None:
    assert np.isnan(per_class_accuracy(FOURTEEN.confusion(3))[2])
    found = report(FOURTEEN, {"head": np.array([0, 1]), "tail": np.array([2])}, ("a", "b", "c"))
    assert found["samples"] == 14
    assert found["per_class"]["c"] is None
    assert "tail" not in found
    assert "tail" not in found["intervals"]


def test_the_per_class_file_names_what_a_class_is_mistaken_for(tmp_path: Path) -> None:
    write_per_class(tmp_path / "c.csv", FOURTEEN, ("a", "b", "c"), (100, 10, 1))
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert rows[0] == {
        "class": "a",
        "labelled_in_training": "100",
        "samples": "10",
        "right": "8",
        "accuracy": "80.0000",
        "mistaken_for": "b",
        "times": "2",
    }
    assert rows[2]["accuracy"] == ""


class TestCalibration:
    def test_the_error_is_the_gap_of_each_bin_weighted_by_its_samples(self) -> None:
        confidence = np.array([0.95, 0.95, 0.55, 0.55])
        bins = reliability(confidence, np.array([True, True, True, False]), bins=10)
        assert [b.samples for b in bins] == [0, 0, 0, 0, 0, 2, 0, 0, 0, 2]
        assert expected_calibration_error(bins) == pytest.approx(100 * (0.5 * 0.05 + 0.5 * 0.05))

    @given(st.lists(st.tuples(st.floats(0.01, 1), st.booleans()), min_size=1, max_size=40))
    def test_bins_keep_every_sample_and_the_means(self, pairs: list[tuple[float, bool]]) -> None:
        confidence, right = (np.array(x) for x in zip(*pairs, strict=True))
        bins = reliability(confidence, right)
        assert sum(b.samples for b in bins) == len(pairs)
        assert sum(b.samples * b.confidence for b in bins) == pytest.approx(confidence.sum())
        assert sum(b.samples * b.accuracy for b in bins) == pytest.approx(right.sum())

    def test_the_temperature_is_the_one_that_scikit_learns_loss_prefers(self) -> None:
        rng = np.random.default_rng(0)
        true = rng.normal(size=(4000, 5)) * 2
        labels = np.array([rng.choice(5, p=np.exp(r) / np.exp(r).sum()) for r in true])
        t = fit_temperature(3.0 * true, labels)
        assert t == pytest.approx(3.0, rel=0.05)

        def loss(temperature: float) -> float:
            e = np.exp(3.0 * true / temperature)
            return float(log_loss(labels, e / e.sum(1, keepdims=True)))

        assert loss(t) <= min(loss(t * 1.01), loss(t / 1.01))


class TestBootstrap:
    def test_an_interval_has_the_binomials_width(self) -> None:
        found = intervals(np.array([80]), np.array([100]), {})["top1"]
        assert found.value == pytest.approx(80)
        assert (found.high - found.low) / 2 == pytest.approx(1.96 * 100 * np.sqrt(0.8 * 0.2 / 100), rel=0.12)

    def test_pairing_detects_what_two_separate_intervals_would_not(self) -> None:
        labels = [0] * 200
        first = predictions_of(labels, [0] * 100 + [1] * 100)
        second = predictions_of(labels, [0] * 110 + [1] * 90)  # ten more right, none lost
        found = paired([first], [second], 2, {})["top1"]
        assert found.value == pytest.approx(5.0)
        assert found.low > 0
        assert found.p < 2 / DRAWS * 50
        alone = intervals(np.array([110, 0]), np.array([200, 0]), {})["top1"]
        assert alone.low < 50

    def test_pairs_of_seeds_are_averaged_and_redrawn_together(self) -> None:
        labels = [0] * 100
        none, all_right = predictions_of(labels, [1] * 100), predictions_of(labels, [0] * 100)
        found = paired([none, none], [all_right, none], 2, {})["top1"]
        assert (found.value, found.low, found.high) == (50.0, 50.0, 50.0)

    def test_pairs_with_other_samples_are_redrawn_separately(self) -> None:
        """The mean of two pairs has half the variance if they are independent, and all of it if they share their samples."""
        labels = [0] * 400
        first, second = predictions_of(labels, [1] * 400), predictions_of(labels, [0, 1] * 200)
        elsewhere = [Predictions(**{**vars(a), "sample_indices": a.sample_indices + 400}) for a in (first, second)]
        together = paired([first] * 2, [second] * 2, 2, {})["top1"]
        apart = paired([first, elsewhere[0]], [second, elsewhere[1]], 2, {})["top1"]
        assert together.value == pytest.approx(50)
        assert apart.value == pytest.approx(50)
        widths = [d.high - d.low for d in (together, apart)]
        assert widths[0] == pytest.approx(2 * 1.96 * 100 * 0.5 / 20, rel=0.1)
        assert widths[1] == pytest.approx(widths[0] / 2**0.5, rel=0.1)

    def test_a_model_does_not_differ_from_itself(self) -> None:
        found = paired([FOURTEEN] * 2, [FOURTEEN] * 2, 3, GROUPS)
        assert {(d.value, d.low, d.high, d.p) for d in found.values()} == {(0.0, 0.0, 0.0, 1.0)}

    def test_other_samples_cannot_be_paired(self) -> None:
        with pytest.raises(ValueError, match="not evaluated on the same samples"):
            paired([FOURTEEN], [predictions_of([0], [0])], 3, GROUPS)
