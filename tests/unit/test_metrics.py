"""Accuracy from counts, by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.data.batch import Batch
from pipeline.evaluate.metrics import confusion, mean_loss, per_class_accuracy, report, summary

COUNTS = torch.tensor([[8, 2, 0], [1, 3, 0], [0, 0, 0]])


class Same(nn.Module):
    """Images (B, 3, 1, 1) whose first pixel is the class it answers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.one_hot(images[:, 0, 0, 0].long(), 3).float()


def batch(answers: list[int], labels: list[int], indices: list[int]) -> Batch:
    images = torch.tensor(answers, dtype=torch.float32)[:, None, None, None].expand(-1, 3, 1, 1)
    return Batch(images=images, labels=torch.tensor(labels), indices=torch.tensor(indices), lanes=1)


def test_confusion_counts_every_sample_once_and_no_padding() -> None:
    batches = [batch([0, 1, 1], [0, 0, 1], [0, 1, 2]), batch([2, 0, 0], [2, -1, -1], [3, -1, -1])]
    table = confusion(Same(), batches, 3, torch.device("cpu"))
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 1]]


def test_mean_loss_goes_by_samples_not_by_batches() -> None:
    batches = [batch([0, 1, 2], [0, 0, 0], [0, 1, 2]), batch([9, 0, 0], [0, -1, -1], [3, -1, -1])]
    identity = nn.Identity()
    assert mean_loss(identity, batches, lambda p, x: x[:, 0, 0, 0], torch.device("cpu")) == pytest.approx(
        (0 + 1 + 2 + 9) / 4
    )


def test_top1_goes_by_samples_and_balanced_and_groups_by_classes() -> None:
    found = summary(COUNTS, {"head": np.array([0]), "tail": np.array([1, 2])})
    assert found["top1"] == pytest.approx(100 * 11 / 14)
    assert found["balanced"] == pytest.approx((80 + 75) / 2)
    assert found["head"] == pytest.approx(80)
    assert found["tail"] == pytest.approx(75)


def test_a_class_without_samples_has_no_accuracy() -> None:
    assert np.isnan(per_class_accuracy(COUNTS.numpy())[2])
    assert report(COUNTS, {"head": np.array([0, 1])}, ("a", "b", "c"))["samples"] == 14
