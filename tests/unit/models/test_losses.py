"""Distillation against torch and by hand."""

import pytest
import torch
import torch.nn.functional as F

from pipeline.models.losses import class_weights, distillation_loss, one_hot, soft_cross_entropy, weigh


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


def test_class_weights_are_one_over_the_number_or_the_effective_number_of_labels() -> None:
    """Against Cui et al.'s geometric sum, literally; the limits of beta are no weights and inverse weights."""
    counts = torch.tensor([1000, 100, 7, 0])
    for beta in (0.9, 0.999):
        effective = [sum(beta**i for i in range(n)) for n in counts.tolist()]
        raw = [1 / e if e else 0.0 for e in effective]
        want = torch.tensor([3 * w / sum(raw) for w in raw])
        torch.testing.assert_close(class_weights(counts, "effective", beta), want)
    inverse = [1 / 1000, 1 / 100, 1 / 7]
    want = torch.tensor([3 * w / sum(inverse) for w in inverse] + [0.0])
    torch.testing.assert_close(class_weights(counts, "inverse", 0.5), want)
    torch.testing.assert_close(class_weights(counts, "effective", 1 - 1e-12), want, rtol=1e-6, atol=0)
    assert class_weights(counts, "effective", 0.0).tolist() == [1, 1, 1, 0]


def test_weighted_losses_are_torchs_without_its_division_by_the_batchs_weights() -> None:
    logits, labels, weights = torch.randn(6, 3), torch.tensor([0, 2, 1, 0, 0, 2]), torch.tensor([0.2, 0.8, 2.0])
    targets = one_hot(labels, 3)
    found = weigh(soft_cross_entropy(logits, targets), targets, weights)
    torch.testing.assert_close(found, F.cross_entropy(logits, labels, weight=weights, reduction="none"))
    mixed = 0.25 * targets + 0.75 * targets.flip(0)
    each = soft_cross_entropy(logits, mixed)
    torch.testing.assert_close(
        weigh(each, mixed, weights), each * (0.25 * weights[labels] + 0.75 * weights[labels.flip(0)])
    )
    assert weigh(each, mixed, None) is each
