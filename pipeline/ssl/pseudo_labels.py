"""Pseudo-labels: from a labelling network's logits to what the student learns, with remedies for long tails.

A pseudo-label is the argmax of the softmax. How far it counts is decided by one of the rules in `acceptance.py`. Distribution
alignment is that of ReMixMatch (Berthelot et al. 2020), or SoftMatch's, which aligns only the confidence. Logit adjustment
(Menon et al. 2021) is in stages/semi.py. Shapes: B images, C classes.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.ssl.acceptance import RULES
from pipeline.ssl.config import PseudoLabelRule
from pipeline.ssl.running_means import RunningMeans


class PseudoLabels(NamedTuple):
    """The pseudo-labels of a batch.

    Args:
        targets: (B, C) probabilities; one-hot if labels are hard.
        labels: (B,) the most probable class.
        confidence: (B,) its probability, after the alignment if there is one.
        accepted: (B,) weight from 0 to 1 with which it counts; only SoftMatch has weights between.
    """

    targets: Tensor
    labels: Tensor
    confidence: Tensor
    accepted: Tensor


class PseudoLabeller:
    """Turns logits into pseudo-labels.

    `label` reads the running means and adds to the sums of this step; `update` is called once per step (collective). So the
    labels of a step depend neither on the world size nor on how a batch is cut into micro-batches.

    Args:
        prior: (C,) the classes' shares of the labelled samples, the aim of the alignment `labelled`.
        rule: The rule of the pseudo-labels.
    """

    def __init__(self, prior: Tensor, rule: PseudoLabelRule) -> None:
        self.rule = rule
        self.means = RunningMeans(len(prior), prior.device, rule.momentum)
        self.aim = prior if rule.alignment == "labelled" else torch.full_like(prior, 1 / len(prior))

    def label(self, logits: Tensor, *, watch: bool = True) -> PseudoLabels:
        """Turn logits (B, C) into pseudo-labels.

        Args:
            logits: The outputs of the labelling network.
            watch: Whether the running means see them.
        """
        rule, raw = self.rule, torch.softmax(logits.float() / self.rule.temperature, dim=-1)
        aligned = raw
        if rule.alignment != "none":
            aligned = raw * (self.aim / self.means.probability.clamp(min=1e-6)).float()
            aligned = aligned / aligned.sum(-1, keepdim=True)
        confidence, labels = aligned.max(-1)
        probabilities = aligned
        if rule.aligned == "confidence":
            probabilities, labels = raw, raw.argmax(-1)
        accepted = RULES[rule.thresholds](self.means, rule, confidence, labels)
        if watch:
            self.means.watch(raw, labels, confidence, confidence >= rule.threshold)
        hard = torch.zeros_like(probabilities).scatter_(1, labels[:, None], 1.0)
        return PseudoLabels(hard if rule.kind == "hard" else probabilities, labels, confidence, accepted)

    def class_entropy(self) -> Tensor:
        """Return the entropy of the mean prediction over log C: 1 if all classes have equal shares, 0 if one has all."""
        p = self.means.probability
        return -(p * p.clamp(min=1e-12).log()).sum() / math.log(len(p))

    def update(self) -> None:
        """Let the running means see this step (collective)."""
        self.means.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, equal on all ranks."""
        return self.means.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.means.load_state_dict(state)
