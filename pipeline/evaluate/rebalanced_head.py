"""Balance a trained classifier's head and leave its backbone as it is (Kang et al. 2020): cRT and tau-normalisation.

A model's logits are the sum over its classifier layers of a share times the layer's output. One layer has the share 1;
EfficientViM fuses several. So the head is one linear map of the layers' scaled inputs, laid side by side.
Shapes: n images, F features of all layers together, C classes.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_ITERATIONS = 500
TAUS = tuple(i / 10 for i in range(21))  # tried in this order where tau is chosen on a validation set


class LinearHead(NamedTuple):
    """The map from features (n, F) to logits: weight (C, F) and bias (C,), in float64."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Return logits (n, C)."""
        return F.linear(features.double(), self.weight, self.bias)


@torch.no_grad()
def shares_of(model: nn.Module, layers: Mapping[str, nn.Linear], images: Tensor) -> dict[str, float]:
    """Measure the share of each classifier layer in the logits: one layer gives ones, the others zeros.

    Args:
        model: The classifier, in eval mode.
        layers: Its classifier layers by name.
        images: One image or more, (n, 3, H, W).
    """
    shares = {}
    for name in layers:
        handles = [layer.register_forward_hook(_constant(float(other == name))) for other, layer in layers.items()]
        try:
            shares[name] = float(model(images[:1]).mean())
        finally:
            for handle in handles:
                handle.remove()
    return shares


def _constant(value: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def constant(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.full_like(output, value)

    return constant


def read_head(layers: Mapping[str, nn.Linear], shares: Mapping[str, float]) -> LinearHead:
    """Return the head as one linear map of the layers' scaled inputs, in the order of `layers`."""
    biases = [shares[name] * layer.bias.detach().double() for name, layer in layers.items() if layer.bias is not None]
    weight = torch.cat([layer.weight.detach().double() for layer in layers.values()], dim=1)
    return LinearHead(weight, torch.stack(biases).sum(0) if biases else weight.new_zeros(len(weight)))


@torch.no_grad()
def write_head(head: LinearHead, layers: Mapping[str, nn.Linear], shares: Mapping[str, float]) -> None:
    """Put a head into the layers; each gets an equal bias, which the shares add up to the head's."""
    widths = [layer.in_features for layer in layers.values()]
    bias = head.bias / sum(shares.values())
    for layer, weight in zip(layers.values(), head.weight.split(widths, dim=1), strict=True):
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)


def tau_normalised(head: LinearHead, tau: float) -> LinearHead:
    """Divide each class's weights by their norm to the power of tau, and drop the bias (Kang et al., section 4.3).

    tau 0 leaves the weights, 1 gives all classes the same norm. Ours: all weights are then scaled alike, so that their mean norm
    stays and confidences remain comparable; this changes no prediction.
    """
    norms = head.weight.norm(dim=1, keepdim=True).clamp(min=1e-12)
    scaled = head.weight / norms**tau
    return LinearHead(scaled * norms.mean() / scaled.norm(dim=1).mean(), torch.zeros_like(head.bias))


def retrained(features: Tensor, labels: Tensor, num_classes: int, *, weight_decay: float) -> LinearHead:
    """Train a new head on fixed features with balanced classes (cRT, Kang et al., section 4.1).

    The paper samples classes evenly and takes a few epochs of SGD from a random start. Ours minimises what this sampling
    expects, the mean over the classes of their mean cross-entropy, plus weight_decay / 2 |W|^2 on features that are
    standardised with the same class weights. The problem is convex, so there is neither a seed nor a learning rate.

    Args:
        features: (n, F).
        labels: (n,) classes; a class without images gets no evidence.
        num_classes: C.
        weight_decay: Strength of the penalty.
    """
    counts = torch.bincount(labels, minlength=num_classes).double()
    each = (1 / counts.clamp(min=1))[labels] / (counts > 0).sum()  # sums to 1
    values = features.double()
    centre = each @ values
    scale = (each @ (values - centre).square()).sqrt().clamp(min=1e-6)
    values = (values - centre) / scale
    weight = values.new_zeros(num_classes, values.shape[1]).requires_grad_()
    bias = values.new_zeros(num_classes).requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        solver.zero_grad()
        losses = F.cross_entropy(F.linear(values, weight, bias), labels, reduction="none")
        loss = (each * losses).sum() + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    found = weight.detach() / scale
    return LinearHead(found, bias.detach() - found @ centre)


def best_tau(head: LinearHead, features: Tensor, labels: Tensor) -> float:
    """Return the smallest of TAUS with the highest balanced accuracy on a validation set."""
    return max(TAUS, key=lambda tau: (round(balanced_accuracy(tau_normalised(head, tau), features, labels), 9), -tau))


def balanced_accuracy(head: LinearHead, features: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes of `labels` of the percentage of their images that the head classifies correctly."""
    right = (head.logits(features).argmax(1) == labels).double()
    counts = torch.bincount(labels).double()
    per_class = torch.bincount(labels, weights=right) / counts.clamp(min=1)
    return 100.0 * float(per_class.sum() / (counts > 0).sum())
