"""Pseudo-labels: from a teacher's logits to what the student learns, with remedies for long tails.

A pseudo-label is the argmax of the softmax; it is accepted from a confidence on (FixMatch, Sohn et al. 2020). Three remedies
are off by default: distribution alignment (ReMixMatch, Berthelot et al. 2020), class-balanced thresholds (FlexMatch, Zhang
et al. 2021) and logit adjustment (Menon et al. 2021, in stages/semi.py). Shapes: B images, C classes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.ssl.config import PseudoLabelRule

# The running means weigh their first HORIZON steps equally; later they forget with this horizon.
HORIZON = 100


class PseudoLabels(NamedTuple):
    """The pseudo-labels of a batch.

    Args:
        targets: (B, C) probabilities; one-hot if labels are hard.
        labels: (B,) the most probable class.
        confidence: (B,) its probability.
        accepted: (B,) 1 where the pseudo-label is accepted, else 0.
    """

    targets: Tensor
    labels: Tensor
    confidence: Tensor
    accepted: Tensor


class PseudoLabeller:
    """Turns logits into pseudo-labels. Its running means are taken over all ranks' images of the previous steps.

    `label` reads the means and adds to the sums of this step; `update` is called once per step (collective). So the labels
    of a step depend neither on the world size nor on how a batch is cut into micro-batches.

    Args:
        prior: (C,) the classes' shares of the labelled samples, the aim of the alignment `labelled`.
        rule: The rule of the pseudo-labels.
    """

    def __init__(self, prior: Tensor, rule: PseudoLabelRule) -> None:
        self.rule = rule
        classes = len(prior)
        uniform = torch.full_like(prior, 1 / classes)
        self.aim = prior if rule.alignment == "labelled" else uniform
        self.mean_probability = uniform.clone()  # running mean of the teacher's predictions
        self.confident = uniform.clone()  # shares of the classes among confident predictions
        self.seen = torch.zeros(2, dtype=torch.float64, device=prior.device)  # steps in each of the two means
        self._sums = torch.zeros(2, classes, dtype=torch.float64, device=prior.device)

    def label(self, logits: Tensor, *, watch: bool = True) -> PseudoLabels:
        """Turn logits (B, C) into pseudo-labels.

        Args:
            logits: The outputs of the labelling network.
            watch: Whether the running means see them.
        """
        raw = torch.softmax(logits.float() / self.rule.temperature, dim=-1)
        probabilities = raw
        if self.rule.alignment != "none":
            probabilities = raw * (self.aim / self.mean_probability.clamp(min=1e-6)).float()
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        confidence, labels = probabilities.max(-1)
        accepted = (confidence >= self.class_thresholds().float()[labels]).float()
        if watch:
            confident = (confidence >= self.rule.threshold).double()
            self._sums[0] += raw.double().sum(0)
            self._sums[1].index_add_(0, labels, confident)
        hard = torch.zeros_like(probabilities).scatter_(1, labels[:, None], 1.0)
        return PseudoLabels(hard if self.rule.kind == "hard" else probabilities, labels, confidence, accepted)

    def class_thresholds(self) -> Tensor:
        """Return the threshold of each class, (C,); it is lower for classes that are rarer among confident predictions.

        With b a class's share over that of the most frequent class, the threshold is scaled by FlexMatch's convex map
        b / (2 - b). Deviation: FlexMatch counts over the whole unlabelled set, this over the recent steps.
        """
        if self.rule.thresholds == "fixed":
            return torch.full_like(self.confident, self.rule.threshold)
        share = self.confident / self.confident.max().clamp(min=1e-6)
        return self.rule.threshold * share / (2 - share)

    def class_entropy(self) -> Tensor:
        """Return the entropy of the mean prediction over log C: 1 if all classes have equal shares, 0 if one has all."""
        p = self.mean_probability
        return -(p * p.clamp(min=1e-12).log()).sum() / torch.log(torch.tensor(float(len(p)), device=p.device))

    def update(self) -> None:
        """Let the running means see this step (collective); the first step has weight 1, the second 1/2, down to 1/HORIZON."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        totals = self._sums.sum(1)
        # A step without a confident prediction says nothing about the classes and is not counted; otherwise the uniform
        # start would outlast the first predictions. There is no branch, since it would wait for a GPU.
        told = (totals > 0).to(self.seen.dtype)
        self.seen += told
        weights = told / self.seen.clamp(min=1, max=HORIZON)
        shares = self._sums / totals.clamp(min=1e-30)[:, None]
        for mean, share, weight in zip((self.mean_probability, self.confident), shares, weights, strict=True):
            mean.lerp_(share.to(mean.dtype), weight.to(mean.dtype))
        self._sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, equal on all ranks."""
        means = {"mean_probability": self.mean_probability.tolist(), "confident": self.confident.tolist()}
        return {**means, "seen": self.seen.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.mean_probability.copy_(torch.tensor(state["mean_probability"], dtype=self.mean_probability.dtype))
        self.confident.copy_(torch.tensor(state["confident"], dtype=self.confident.dtype))
        self.seen.copy_(torch.tensor(state["seen"], dtype=self.seen.dtype))
        self._sums.zero_()
