"""How far a pseudo-label counts: one family of rules with one signature, `RULES[name](means, rule, confidence, labels)`.

Each returns (B,) weights from 0 to 1. A threshold accepts or refuses; SoftMatch weighs. FlexMatch and FreeMatch have one
threshold per class, `class_thresholds`. All read the running means of the previous steps; the papers let a batch count in its
own threshold, which would make the labels depend on how a batch is cut into micro-batches.
Shapes: B images, C classes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pipeline.ssl.config import PseudoLabelRule
from pipeline.ssl.running_means import RunningMeans
from pipeline.train.distributed import sum_over_ranks

Rule = Callable[[RunningMeans, PseudoLabelRule, Tensor, Tensor], Tensor]


def fixed(means: RunningMeans, rule: PseudoLabelRule) -> Tensor:
    """One threshold for all classes (FixMatch, Sohn et al. 2020): (C,)."""
    return torch.full_like(means.confident, rule.threshold)


def class_balanced(means: RunningMeans, rule: PseudoLabelRule) -> Tensor:
    """Lower thresholds for classes that are rarer among confident predictions (FlexMatch, Zhang et al. 2021): (C,).

    With b a class's share over that of the most frequent class, the threshold is scaled by the convex map b / (2 - b).
    Deviation: FlexMatch counts over the whole unlabelled set, this over the recent steps.
    """
    share = means.confident / means.confident.max().clamp(min=1e-6)
    return rule.threshold * share / (2 - share)


def freematch(means: RunningMeans, rule: PseudoLabelRule) -> Tensor:
    """Self-adaptive thresholds (FreeMatch, Wang et al. 2023): (C,).

    The global threshold is the mean confidence. That of a class is the global one, times the class's mean probability
    over the largest of these means. It needs no number from the config.
    """
    return means.confidence * means.probability / means.probability.max()


THRESHOLDS: dict[str, Callable[[RunningMeans, PseudoLabelRule], Tensor]] = {
    "fixed": fixed,
    "class_balanced": class_balanced,
    "freematch": freematch,
}


def softmatch(means: RunningMeans, rule: PseudoLabelRule, confidence: Tensor, labels: Tensor) -> Tensor:
    """Weigh by a truncated Gaussian of the confidence (SoftMatch, Chen et al. 2023): (B,).

    The weight is 1 from the mean confidence mu on, and exp(-(n (c - mu))^2 / (2 sigma^2)) below it. `rule.sigmas` is n: the
    paper's equation has 1, its released code 2.
    """
    below = (confidence.double() - means.confidence).clamp(max=0) * rule.sigmas
    return torch.exp(-below.square() / (2 * means.variance.clamp(min=1e-12))).float()


def _from(name: str) -> Rule:
    def accept(means: RunningMeans, rule: PseudoLabelRule, confidence: Tensor, labels: Tensor) -> Tensor:
        return (confidence >= THRESHOLDS[name](means, rule).float()[labels]).float()

    return accept


RULES: dict[str, Rule] = {name: _from(name) for name in THRESHOLDS} | {"softmatch": softmatch}


def fairness(logits: Tensor, accepted: Tensor, means: RunningMeans) -> Tensor:
    """Self-adaptive fairness (FreeMatch): a scalar that is small where the student's predictions are diverse.

    The mean prediction of the accepted strong views is divided by the histogram of their labels, and so is the running mean
    of all predictions by its own histogram. The loss is the sum of aim x log(found), minus their cross-entropy.
    A class without a prediction counts as zero, and the logarithm begins at 1e-12, both as in the released code. The batch is
    that of all ranks together (collective), so the loss does not depend on their number. With accumulation it is one
    micro-batch of each rank: the term is not linear in the images, and no micro-batch sees the others.

    Args:
        logits: (B, C) of the strong views.
        accepted: (B,) weights of their pseudo-labels; a view counts if its weight is above 0.
        means: The running means.
    """
    counted = (accepted > 0).to(logits.dtype)
    total = (logits.softmax(-1) * counted[:, None]).sum(0)
    histogram = torch.zeros_like(total).index_add_(0, logits.argmax(-1), counted)
    sums = torch.stack([total, histogram])
    # Its gradient sums those of all ranks, which the engine's mean over the ranks turns into that of one process.
    total, histogram = _SumOverRanks.apply(sums).unbind()
    number = histogram.sum().clamp(min=1)
    mean, histogram = total / number, histogram / number
    aim = _shares(means.probability, means.predicted).to(mean.dtype)
    return (aim * torch.log(_shares(mean, histogram) + 1e-12)).sum() * histogram.sum().sign()


class _SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks."""
        total = value.clone()
        sum_over_ranks(total)
        return total

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        """Sum the gradient over all ranks."""
        return _SumOverRanks.forward(context, gradients[0])


def _shares(values: Tensor, histogram: Tensor) -> Tensor:
    """Divide by the histogram where it is not empty, and scale the sum to 1."""
    there = histogram > 0
    scaled = torch.where(there, values / torch.where(there, histogram, 1.0), 0.0)
    return scaled / scaled.sum().clamp(min=1e-12)
