"""How good a model's features are, told by labels that no gradient of its training sees: a linear probe, and neighbours.

Features are what one submodule is given while the model runs as it always does (a classifier's `head`, the pretrainer's
`to_decoder`): no second forward pass to keep in step, and nothing special under ZeRO-3.

Shapes: n samples, F features, C classes.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluate.config import ProbeConfig
from pipeline.evaluate.predictions import LabelledBatch, gather

QUERIES_AT_ONCE = 1024  # a table of cosines of this many rows at a time
MAX_ITERATIONS = 200


class Features(NamedTuple):
    """One row a sample, in the order of the samples' indices, alike on all ranks."""

    values: Tensor  # (n, F), fp32
    labels: Tensor  # (n,)


def features_of(
    model: nn.Module, reader: nn.Module, batches: Iterable[LabelledBatch], device: torch.device
) -> Features:
    """What `reader`, a submodule of `model`, is given for each sample, the mean over its tokens if it has any.

    `batches` are this rank's share, as many on every rank; each real sample (index >= 0) counts once (collective).
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
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # compiled code runs past hooks
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


def probe(bank: Features, queries: Features, config: ProbeConfig) -> dict[str, float]:
    """Percent of `queries` that a linear probe and the neighbours in `bank` call by their label.

    Both see each feature less its mean, over its spread, in the bank: the features of a pretrainer of pixels share one
    large direction, in which all cosines are near 1 (the usual neighbours' test leaves them as they are).
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
    """Votes (n, C): each of the k samples nearest by cosine votes exp(cosine / temperature) for its class (Wu et al. 2018)."""
    known = F.normalize(bank.values)
    ballots = F.one_hot(bank.labels, classes).to(known)
    votes = []
    for part in F.normalize(queries).split(QUERIES_AT_ONCE):
        cosines, nearest = (part @ known.T).topk(min(neighbours, len(known)))
        votes.append((torch.exp((cosines - 1) / temperature)[:, :, None] * ballots[nearest]).sum(1))
    return torch.cat(votes)


def linear_probe(bank: Features, queries: Tensor, classes: int, *, weight_decay: float) -> Tensor:
    """Logits (n, C) of the multinomial logistic regression that minimises mean cross-entropy + weight_decay / 2 |W|².

    Convex and solved by L-BFGS from zero: no seed, no learning rate.
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
