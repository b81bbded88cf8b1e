"""From a teacher's answers to what the student learns: pseudo-labels, which of them count, and long-tail remedies.

FixMatch (Sohn et al. 2020): the softmax's argmax counts from a confidence on. Remedies that users expect, each off by
default: distribution alignment (ReMixMatch, Berthelot et al. 2020), class-balanced thresholds (FlexMatch, Zhang et al.
2021), logit adjustment (Menon et al. 2021). B images, C classes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.ssl.config import PseudoLabelRule

# The running means weigh their first steps alike, and from this many on forget at this horizon.
HORIZON = 100


class PseudoLabels(NamedTuple):
    targets: Tensor  # (B, C) probabilities: one-hot where labels are hard
    labels: Tensor  # (B,) the most probable class
    confidence: Tensor  # (B,) its probability
    accepted: Tensor  # (B,) 1 where it counts, else 0


class PseudoLabeller:
    """Turns logits into pseudo-labels; its running means answer to all ranks' images of the steps before.

    `label` only reads them and adds to the sums of this step; `update` is called once a step (collective). So a step's
    labels depend neither on the world size nor on how a batch is cut into micro-batches.
    """

    def __init__(self, prior: Tensor, rule: PseudoLabelRule) -> None:
        """`prior` (C,): the classes' shares of the labelled samples, the aim of alignment `labelled`."""
        self.rule = rule
        classes = len(prior)
        uniform = torch.full_like(prior, 1 / classes)
        self.aim = prior if rule.alignment == "labelled" else uniform
        self.mean_probability = uniform.clone()  # of the teacher's answers
        self.confident = uniform.clone()  # share of confident answers that name each class
        self.seen = torch.zeros(2, dtype=torch.float64, device=prior.device)  # steps in each of the two means
        self._sums = torch.zeros(2, classes, dtype=torch.float64, device=prior.device)

    def label(self, logits: Tensor, *, watch: bool = True) -> PseudoLabels:
        """Logits (B, C) to pseudo-labels. `watch`: let them count in the running means."""
        answers = torch.softmax(logits.float() / self.rule.temperature, dim=-1)
        probabilities = answers
        if self.rule.alignment != "none":
            probabilities = answers * (self.aim / self.mean_probability.clamp(min=1e-6)).float()
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        confidence, labels = probabilities.max(-1)
        accepted = (confidence >= self.class_thresholds().float()[labels]).float()
        if watch:
            confident = (confidence >= self.rule.threshold).double()
            self._sums[0] += answers.double().sum(0)
            self._sums[1].index_add_(0, labels, confident)
        hard = torch.zeros_like(probabilities).scatter_(1, labels[:, None], 1.0)
        return PseudoLabels(hard if self.rule.kind == "hard" else probabilities, labels, confidence, accepted)

    def class_thresholds(self) -> Tensor:
        """(C,) threshold of each class: rarer among confident answers, lower (FlexMatch's convex map b / (2 - b)).

        Deviation: FlexMatch counts over the whole unlabelled set, this over the recent steps.
        """
        if self.rule.thresholds == "fixed":
            return torch.full_like(self.confident, self.rule.threshold)
        share = self.confident / self.confident.max().clamp(min=1e-6)
        return self.rule.threshold * share / (2 - share)

    def class_entropy(self) -> Tensor:
        """Entropy of the mean answer over log C: 1 if all classes are named alike, 0 if a single one is."""
        p = self.mean_probability
        return -(p * p.clamp(min=1e-12).log()).sum() / torch.log(torch.tensor(float(len(p)), device=p.device))

    def update(self) -> None:
        """Let the running means see this step (collective): the first has weight 1, the second 1/2, to 1/HORIZON."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
        totals = self._sums.sum(1)
        # A step without a confident answer says nothing of their classes: it is not counted, or the uniform start would
        # outlast the first answers. No branch, which would wait for a GPU.
        told = (totals > 0).to(self.seen.dtype)
        self.seen += told
        weights = told / self.seen.clamp(min=1, max=HORIZON)
        shares = self._sums / totals.clamp(min=1e-30)[:, None]
        for mean, share, weight in zip((self.mean_probability, self.confident), shares, weights, strict=True):
            mean.lerp_(share.to(mean.dtype), weight.to(mean.dtype))
        self._sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        means = {"mean_probability": self.mean_probability.tolist(), "confident": self.confident.tolist()}
        return {**means, "seen": self.seen.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean_probability.copy_(torch.tensor(state["mean_probability"], dtype=self.mean_probability.dtype))
        self.confident.copy_(torch.tensor(state["confident"], dtype=self.confident.dtype))
        self.seen.copy_(torch.tensor(state["seen"], dtype=self.seen.dtype))
        self._sums.zero_()
