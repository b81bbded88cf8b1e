"""cRT against scikit-learn, tau-normalisation by hand, and heads of several layers that are read and written back."""

import numpy as np
import pytest
import torch

from pipeline.evaluate.rebalanced_head import (
    TAUS,
    LinearHead,
    balanced_accuracy,
    best_tau,
    read_head,
    retrained,
    shares_of,
    tau_normalised,
    write_head,
)
from pipeline.models import build_model
from pipeline.models.classifier_layers import classifier_layers


def long_tail() -> tuple[torch.Tensor, torch.Tensor]:
    """Three overlapping classes of 300, 60 and 12 images with 5 features of unlike scales."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([300, 60, 12]))
    centres = torch.randn(3, 5, generator=generator)
    features = centres[labels] + 1.5 * torch.randn(len(labels), 5, generator=generator)
    return features * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + 2.0, labels


def test_a_new_head_is_scikit_learns_on_balanced_weights() -> None:
    from sklearn.linear_model import LogisticRegression

    features, labels = long_tail()
    head = retrained(features, labels, 3, weight_decay=0.01)
    each = (1 / torch.bincount(labels))[labels].double().numpy() / 3
    values = features.double().numpy()
    centre = each @ values
    scale = np.sqrt(each @ (values - centre) ** 2)
    solver = LogisticRegression(C=1 / 0.01, tol=1e-10, max_iter=5000).fit((values - centre) / scale, labels, each)
    want = solver.predict_log_proba((values - centre) / scale)
    found = head.logits(features).log_softmax(1).numpy()
    np.testing.assert_allclose(found, want, atol=2e-4)
    uniform = retrained(features[labels < 2], labels[labels < 2], 3, weight_decay=0.01)  # no image of the third class
    assert torch.isfinite(uniform.weight).all()


def test_tau_divides_by_powers_of_the_norms() -> None:
    head = LinearHead(torch.tensor([[3.0, 4.0], [0.6, 0.8]]).double(), torch.tensor([1.0, 2.0]).double())
    for tau, ratio in ((0.0, 5.0), (0.5, 5**0.5), (1.0, 1.0), (2.0, 1 / 5)):
        found = tau_normalised(head, tau)
        norms = found.weight.norm(dim=1)
        assert float(norms[0] / norms[1]) == pytest.approx(ratio)
        assert float(norms.mean()) == pytest.approx(3.0)  # the mean norm stays
        assert found.bias.tolist() == [0.0, 0.0]
        torch.testing.assert_close(found.weight / norms[:, None], head.weight / head.weight.norm(dim=1, keepdim=True))


def test_both_raise_the_balanced_accuracy_of_a_head_that_the_long_tail_has_bent() -> None:
    features, labels = long_tail()
    bent = retrained(features, labels, 3, weight_decay=0.01)
    bent = LinearHead(bent.weight * torch.tensor([[3.0], [1.0], [0.3]]), bent.bias + torch.tensor([6.0, 0.0, -6.0]))
    before = balanced_accuracy(bent, features, labels)
    tau = best_tau(bent, features, labels)
    scores = [balanced_accuracy(tau_normalised(bent, t), features, labels) for t in TAUS]
    assert scores[TAUS.index(tau)] == max(scores) > before
    assert balanced_accuracy(retrained(features, labels, 3, weight_decay=0.01), features, labels) > before


@pytest.mark.parametrize(("name", "layers"), [("vim_nano", 1), ("efficientvim_nano", 4), ("efficientvim_nano_dist", 8)])
def test_a_head_of_several_layers_is_one_linear_map(name: str, layers: int) -> None:
    torch.manual_seed(0)
    model, images = build_model(name, num_classes=5, image_size=32).eval(), torch.randn(3, 3, 32, 32)
    found = classifier_layers(model, 5)
    shares = shares_of(model, found, images)
    assert len(found) == layers
    assert sum(shares.values()) == pytest.approx(1.0)
    rows: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, inputs, share=shares[key]: rows.append(share * inputs[0]))
        for key, layer in found.items()
    ]
    with torch.no_grad():
        want = model(images)
    for handle in handles:
        handle.remove()
    head, features = read_head(found, shares), torch.cat(rows, dim=1)
    torch.testing.assert_close(head.logits(features), want.double(), rtol=1e-4, atol=1e-5)
    new = LinearHead(torch.randn_like(head.weight), torch.randn_like(head.bias))
    write_head(new, found, shares)
    with torch.no_grad():
        torch.testing.assert_close(model(images).double(), new.logits(features), rtol=1e-4, atol=1e-4)
