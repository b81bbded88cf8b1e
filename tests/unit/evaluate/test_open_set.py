"""Classes that were never trained on, evaluated apart, on a confusion table counted by hand."""

import numpy as np

from pipeline.datasets.imbalance import class_groups
from pipeline.evaluate.open_set import open_set, with_outside


def test_unseen_classes_are_evaluated_apart_and_the_groups_they_are_predicted_as_are_counted() -> None:
    seen = np.array([0, 2, 3])
    groups = with_outside(class_groups(np.array([9, 5, 1])), seen, 5)
    assert {name: c.tolist() for name, c in groups.items()} == {
        "head": [0],
        "medium": [2],
        "tail": [3],
        "ood": [1, 4],
    }
    table = np.diag([8, 0, 6, 1, 0])
    table[1, [0, 2]] = 7, 2  # unseen classes: 12 images in all, of which 10 are predicted as head
    table[4, 0] = 3
    table[3, 0] = 5
    assert open_set(table, groups) == {
        "top1_seen": 75.0,
        "balanced_seen": 100 * (1 + 1 + 1 / 6) / 3,
        "ood_samples": 12,
        "ood_called_head": 100 * 10 / 12,
        "ood_called_medium": 100 * 2 / 12,
        "ood_called_tail": 0.0,
    }


def test_nothing_is_reported_if_every_class_was_seen() -> None:
    groups = with_outside(class_groups(np.array([3, 2, 1])), np.arange(3), 3)
    assert "ood" not in groups
    assert open_set(np.eye(3, dtype=np.int64), groups) == {}
