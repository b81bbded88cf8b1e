"""The linear probe and the neighbours equal scikit-learn and cases by hand, and count each sample once on any ranks."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from pipeline.evaluate.config import LinearProbeConfig
from pipeline.evaluate.features import Features, evaluate_features, features_of, linear_probe, nearest_neighbours
from tests.unit.evaluate.test_metrics import batch


def samples(n: int, seed: int, features: int = 6, classes: int = 3) -> Features:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, n)
    values = random.normal(size=(n, features)) + 2 * np.eye(classes, features)[labels]
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(labels))


@pytest.mark.parametrize("weight_decay", [1e-3, 1e-1])
def test_the_linear_probe_equals_scikit_learns_regression(weight_decay: float) -> None:
    bank, queries = samples(90, 0), samples(40, 1)
    ours = torch.softmax(linear_probe(bank, queries.values, 3, weight_decay=weight_decay), 1)
    theirs = LogisticRegression(C=1 / (weight_decay * 90), tol=1e-8, max_iter=2000).fit(bank.values, bank.labels)
    np.testing.assert_allclose(ours, theirs.predict_proba(queries.values), atol=2e-3)


def test_the_neighbours_equal_scikit_learns_weighted_by_cosine() -> None:
    bank, queries = samples(90, 0), samples(40, 1)
    votes = nearest_neighbours(bank, queries.values, 3, neighbours=7, temperature=0.5)
    theirs = KNeighborsClassifier(
        7, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / 0.5)
    )
    theirs.fit(bank.values, bank.labels)
    np.testing.assert_allclose(votes / votes.sum(1, keepdim=True), theirs.predict_proba(queries.values), atol=1e-5)


def test_more_neighbours_than_samples_use_all_of_them() -> None:
    bank = samples(5, 0)
    assert nearest_neighbours(bank, bank.values, 3, neighbours=20, temperature=0.1).shape == (5, 3)


def test_the_linear_probe_and_the_neighbours_ignore_the_scale_and_the_origin_of_a_feature() -> None:
    bank, queries, config = samples(90, 0), samples(200, 1), LinearProbeConfig(neighbours=9)
    scale, shift = torch.tensor([1e-3, 1, 10, 1, 500, 1]), torch.tensor([100.0, 0, -3, 0, 7, 0])
    moved = [x._replace(values=x.values * scale + shift) for x in (bank, queries)]
    found = evaluate_features(bank, queries, config)
    assert found["linear"] > 60
    assert found["knn"] > 55
    assert evaluate_features(*moved, config) == pytest.approx(found, abs=1.0)


def test_features_are_the_input_of_a_submodule_once_per_sample_in_the_order_of_sample_indices() -> None:
    """Padding is left out, tokens are averaged, and the model is left in its mode."""
    head = nn.Linear(4, 2)
    model = nn.Sequential(nn.Flatten(2), head).train()  # (B, 3, 1, 1) -> tokens (B, 3, 1)
    head.forward = lambda x: x  # type: ignore[method-assign]  # its output does not matter
    batches = [batch([5, 3], [1, 0], [7, 2]), batch([8, 0], [1, -1], [4, -1])]
    found = features_of(model, head, batches, torch.device("cpu"))
    assert found.values.tolist() == [[3.0], [8.0], [5.0]]
    assert found.labels.tolist() == [0, 1, 1]
    assert model.training
    assert not head._forward_pre_hooks
