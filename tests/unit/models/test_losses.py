"""Distillation against torch and by hand."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.losses import distillation_loss


def test_hard_distillation_is_cross_entropy_with_the_teachers_choice() -> None:
    student, teacher = torch.randn(5, 4), torch.randn(5, 4)
    expected = F.cross_entropy(student, teacher.argmax(1))
    assert distillation_loss(student, teacher, kind="hard", temperature=3.0) == expected


def test_soft_distillation_is_the_divergence_of_the_softened_predictions() -> None:
    student, teacher = torch.randn(5, 4, dtype=torch.float64).float(), torch.randn(5, 4)
    p, q = torch.softmax(teacher / 2, 1), torch.softmax(student / 2, 1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, kind="soft", temperature=2.0), expected)
    assert distillation_loss(teacher, teacher, kind="soft", temperature=2.0).item() == pytest.approx(0, abs=1e-6)
