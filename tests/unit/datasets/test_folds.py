"""Cross-validation: every label is held out once, and the split of all labels stays as it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import main
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.folds import advice, fold_path, make_folds
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.splits import make_split, read_split
from pipeline.errors import ConfigError
from studies.folds import summary
from tests.relabel import relabelled


@pytest.fixture(scope="module")
def few(train: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Digits of which class c has c + 1 labels, and all others none."""
    labels = np.full(train.num_samples, -1)
    for c in range(10):
        labels[np.flatnonzero(train.labels == c)[: c + 1]] = c
    return relabelled(train, tmp_path_factory.mktemp("few") / "train", labels)


@pytest.mark.parametrize("count", [2, 5, 54])
def test_every_label_is_held_out_once_but_for_that_of_a_class_with_one(few: Manifest, count: int) -> None:
    split = make_split(few, SplitConfig(), seed=3)
    folds = make_folds(split, few, count, seed=3)
    labelled = split.subset("labelled")
    held_out = np.concatenate([fold.subset("validation") for fold in folds])
    assert sorted(held_out.tolist()) == sorted(labelled[few.labels[labelled] != 0].tolist())  # class 0 has one label
    sizes = [len(fold.subset("validation")) for fold in folds]
    assert max(sizes) - min(sizes) <= 1
    for number, fold in enumerate(folds, 1):
        assert (fold.subset("unlabelled") == split.subset("unlabelled")).all()
        assert set(few.labels[fold.subset("labelled")]) == set(range(10))
        assert len(fold.subset("labelled")) + len(fold.subset("validation")) == len(labelled)
        assert f"part {number} of {count} of the labels held out" in fold.protocol
        assert "1 classes with one label are never held out" in fold.protocol
    assert len({fold.hash for fold in folds} | {split.hash}) == count + 1
    assert [fold.hash for fold in make_folds(split, few, count, seed=3)] == [fold.hash for fold in folds]


def test_folds_beside_a_validation_subset_or_without_labels_are_refused(few: Manifest, train: Manifest) -> None:
    held = make_split(train, SplitConfig(validation_per_class=2), seed=0)
    with pytest.raises(ConfigError, match="leave out --validation-per-class"):
        make_folds(held, train, 5, seed=0)
    with pytest.raises(ConfigError, match="needs 2 parts or more"):
        make_folds(make_split(few, SplitConfig(), seed=0), few, 1, seed=0)
    with pytest.raises(ConfigError, match="only 54 labels can be held out; give at most 54"):
        make_folds(make_split(few, SplitConfig(), seed=0), few, 55, seed=0)


def test_the_command_writes_the_split_and_its_folds_and_says_what_few_labels_mean(
    few: Manifest, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "split.json"
    assert main(["split", str(few.folder), "--out", str(out)]) == 0
    alone = out.read_bytes()
    printed = capsys.readouterr().out
    assert "a class has only 1 label, so none is held out for validation" in printed
    assert "--folds 5 estimates it by cross-validation, which costs 5 more trainings" in printed
    for state in ("written", "already there"):
        assert main(["split", str(few.folder), "--out", str(out), "--folds", "3"]) == 0
        assert capsys.readouterr().out.count(state) >= 3
    assert out.read_bytes() == alone
    folds = make_folds(read_split(out, few), few, 3, seed=0)
    assert [read_split(fold_path(out, k + 1, 3), few).hash for k in range(3)] == [fold.hash for fold in folds]


def test_advice_depends_on_what_is_left_to_learn(train: Manifest) -> None:
    assert advice(make_split(train, SplitConfig(), seed=0)) == ""
    one_left = make_split(train, SplitConfig(labelled=1e-9, validation_per_class=2), seed=0)
    assert "only 1 label left to learn, and 20 of 30 labels are spent on validation" in advice(one_left)


def test_the_folds_are_pooled_image_by_image() -> None:
    folds = [{"top1": 1.0, "confusion": [[1, 0], [0, 0]]}, {"top1": 0.5, "confusion": [[2, 1], [3, 2]]}]
    found = summary({"stage 2": folds})
    row = found["rows"]["stage 2"]
    assert row["top1"] == pytest.approx(5 / 9)  # not the mean of the folds, 0.75
    assert row["balanced"] == pytest.approx((3 / 4 + 2 / 5) / 2)
    assert row["spread"] == pytest.approx(0.5 / 2**0.5)
    assert row["images"] == 9
    assert "2 folds: each of 9 labelled images" in found["sentence"]
    json.dumps(found)
