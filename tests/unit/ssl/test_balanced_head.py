"""ABC: two heads in every family, and masks that balance the classes in the mean."""

import math

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.models import build_model
from pipeline.models.classifier_layers import FirstOutputs, add_balanced_head, classifier_layers, keep_balanced_head
from pipeline.ssl.balanced_head import BalancedHeadLoss
from pipeline.ssl.config import BalancedHeadConfig

PRIOR = torch.tensor([0.6, 0.3, 0.1, 0.0], dtype=torch.float64)  # a class without labels counts as the rarest
KEEP = [1 / 6, 1 / 3, 1.0, 1.0]
LOGITS = torch.tensor([[2.0, 0.5, -1.0, 0.0], [0.0, 3.0, 0.5, 0.2], [0.1, 0.2, 1.0, 0.4], [5.0, 0.0, 0.0, 0.0]])
DRAWS = 4000


def cross_entropy(row: list[float], target: list[float]) -> float:
    total = math.log(sum(math.exp(x) for x in row))
    return sum(p * (total - x) for x, p in zip(row, target, strict=True))


def test_labels_are_kept_so_that_every_class_has_the_share_of_the_rarest() -> None:
    """The mean over draws, against the literal expectation; a tail label is always kept."""
    torch.manual_seed(0)
    loss, targets = BalancedHeadLoss(PRIOR, BalancedHeadConfig()), torch.eye(4)
    want = sum(k * cross_entropy(LOGITS[i].tolist(), targets[i].tolist()) for i, k in enumerate(KEEP)) / 4
    found = sum(float(loss.labelled(LOGITS, targets)) for _ in range(DRAWS)) / DRAWS
    assert found == pytest.approx(want, rel=0.03)
    alone = float(loss.labelled(LOGITS[2:3], targets[2:3]))
    assert alone == pytest.approx(cross_entropy(LOGITS[2].tolist(), targets[2].tolist()), rel=1e-6)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_consistency_begins_with_all_confident_views_and_ends_with_the_balanced_share(kind: str) -> None:
    torch.manual_seed(0)
    loss = BalancedHeadLoss(PRIOR, BalancedHeadConfig(threshold=0.7, targets=kind))  # type: ignore[arg-type]
    strong = LOGITS.flip(0)

    def want(progress: float) -> float:
        total = 0.0
        for weak, row in zip(LOGITS.tolist(), strong.tolist(), strict=True):
            powers = [math.exp(x) for x in weak]
            soft = [power / sum(powers) for power in powers]
            guess = soft.index(max(soft))
            target = soft if kind == "soft" else [float(k == guess) for k in range(4)]
            total += (max(soft) >= 0.7) * (1 - progress * (1 - KEEP[guess])) * cross_entropy(row, target)
        return total / 4

    assert float(loss.consistency(LOGITS, strong, 0.0)) == pytest.approx(want(0.0), rel=1e-6)
    for progress in (0.5, 1.0):
        found = sum(float(loss.consistency(LOGITS, strong, progress)) for _ in range(DRAWS)) / DRAWS
        assert found == pytest.approx(want(progress), rel=0.05)


@pytest.mark.parametrize("name", ["vim_nano", "efficientvim_nano", "efficientvim_nano_dist", "timm/resnet10t"])
def test_a_second_head_changes_no_logit_of_the_first_and_is_exported_as_the_only_one(name: str) -> None:
    torch.manual_seed(0)
    model, images = build_model(name, num_classes=5, image_size=32).eval(), torch.randn(2, 3, 32, 32)
    want = model(images)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    layers = add_balanced_head(model, 5)
    both = model(images)
    assert both.shape == (2, 10)
    torch.testing.assert_close(both[:, 5:], want, rtol=1e-6, atol=1e-6)
    kept = keep_balanced_head(model.state_dict(), layers, 5)
    assert {key: value.shape for key, value in kept.items()} == shapes
    alone = build_model(name, num_classes=5, image_size=32).eval()
    alone.load_state_dict(kept)
    torch.testing.assert_close(alone(images), FirstOutputs(model, 5)(images), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(both[:, :5], want)


def test_a_head_without_a_linear_layer_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no linear layer of 7 classes"):
        classifier_layers(build_model("vim_nano", num_classes=5), 7)
