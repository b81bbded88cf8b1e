"""Evaluate features by labels that no gradient of their training sees: a linear probe, and nearest neighbours.

Features are the input of one submodule (a classifier's `head`, the pretrainer's `to_decoder`) while the model runs as it
always does. So there is no second forward function to keep equal, and nothing special under ZeRO-3.

Shapes: n samples, F features, C classes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluate.config import LinearProbeConfig
from pipeline.evaluate.predictions import LabelledBatch, gather

QUERIES_AT_ONCE = 1024  # rows of the table of cosines that are in memory at a time
MAX_ITERATIONS = 200


class Features(NamedTuple):
    """One row per sample, sorted by sample index, equal on all ranks.

    Attributes:
        values: Features (n, F), fp32.
        labels: Classes (n,).
    """

    values: Tensor
    labels: Tensor


def features_of(
    model: nn.Module, reader: nn.Module, batches: Iterable[LabelledBatch], device: torch.device
) -> Features:
    """Collect the input of a submodule for each sample (collective).

    Args:
        model: The whole model; it is left in the mode it had.
        reader: A submodule of `model`. If its input has tokens, the feature is their mean.
        batches: This rank's share, as many batches on every rank; padding (index below 0) is left out.
        device: Where the model is.
    """
    given: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.append(inputs[0].float())

    rows, labels, indices = [], [], []
    was_training = model.training
    model.eval()
    handle = reader.register_forward_pre_hook(note)
    try:
        for batch in batches:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code skips hooks
                model(batch.images.to(device))
            x = given.pop()
            rows.append(x if x.dim() == 2 else x.mean(1))
            labels.append(batch.labels.to(device))
            indices.append(batch.indices.to(device))
    finally:
        handle.remove()
        model.train(was_training)
    order = gather(torch.cat(indices))
    real = order.argsort()[int((order < 0).sum()) :]
    return Features(gather(torch.cat(rows))[real], gather(torch.cat(labels))[real])


def linear_head(model: nn.Module) -> nn.Linear | None:
    """Return the one linear layer that computes a classifier's logits, of ours or of timm; None if there is none."""
    modules = dict(model.named_modules())
    heads = (modules.get(name) for name in ("head", "model.head", "model.head.fc", "model.fc", "model.classifier"))
    return next((head for head in heads if isinstance(head, nn.Linear)), None)


def evaluate_features(bank: Features, queries: Features, config: LinearProbeConfig) -> dict[str, float]:
    """Return the percentage of `queries` that a linear probe and the nearest neighbours in `bank` classify correctly.

    Both standardise each feature by its mean and standard deviation in the bank. The features of a model that was
    pretrained on pixels share one large direction, in which all cosines are near 1. The usual neighbour test does not
    standardise.
    """
    classes = int(torch.cat([bank.labels, queries.labels]).max()) + 1
    spread, centre = torch.std_mean(bank.values, dim=0, correction=0)
    scale = 1 / spread.clamp(min=1e-6)
    bank, values = bank._replace(values=(bank.values - centre) * scale), (queries.values - centre) * scale
    scores = {
        "linear": linear_probe(bank, values, classes, weight_decay=config.weight_decay),
        "knn": nearest_neighbours(bank, values, classes, neighbours=config.neighbours, temperature=config.temperature),
    }
    return {name: 100.0 * float((s.argmax(1) == queries.labels).float().mean()) for name, s in scores.items()}


def nearest_neighbours(bank: Features, queries: Tensor, classes: int, *, neighbours: int, temperature: float) -> Tensor:
    """Let the k nearest samples by cosine vote for their classes, each with exp(cosine / temperature) (Wu et al. 2018).

    Args:
        bank: Labelled samples.
        queries: Features (n, F).
        classes: Number of classes C.
        neighbours: k; fewer if the bank is smaller.
        temperature: Temperature of the votes.

    Returns:
        Votes (n, C).
    """
    known = F.normalize(bank.values)
    ballots = F.one_hot(bank.labels, classes).to(known)
    votes = []
    for rows in F.normalize(queries).split(QUERIES_AT_ONCE):
        cosines, nearest = (rows @ known.T).topk(min(neighbours, len(known)))
        votes.append((torch.exp((cosines - 1) / temperature)[:, :, None] * ballots[nearest]).sum(1))
    return torch.cat(votes)


def linear_probe(bank: Features, queries: Tensor, classes: int, *, weight_decay: float) -> Tensor:
    """Fit a multinomial logistic regression that minimises mean cross-entropy + weight_decay / 2 |W|².

    The problem is convex and solved by L-BFGS from zero, so there is no seed and no learning rate.

    Returns:
        Logits (n, C) of the queries (n, F).
    """
    weight = bank.values.new_zeros(classes, bank.values.shape[1]).requires_grad_()
    bias = bank.values.new_zeros(classes).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def objective() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(bank.values, weight, bias), bank.labels)
        loss = loss + weight_decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return F.linear(queries, weight, bias).detach()
