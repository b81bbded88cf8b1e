import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import main
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.datasets.splits import make_split, read_split, write_split
from pipeline.errors import ConfigError, DataError

LONG_TAIL = SplitConfig(imbalance=10, labelled=0.1, validation_per_class=15)


def test_a_long_tailed_split_has_the_formulas_counts_and_disjoint_subsets(train: Manifest):
    split = make_split(train, LONG_TAIL, seed=0)
    subsets = [split.subset(name) for name in ("labelled", "unlabelled", "validation", "unused")]
    assert sorted(np.concatenate(subsets)) == list(range(train.num_samples))
    assert split.counts("validation").tolist() == [15] * 10
    kept = split.counts("labelled") + split.counts("unlabelled")
    largest = (np.bincount(train.labels) - 15).max()
    formula = np.minimum(np.bincount(train.labels) - 15, largest * 10 ** (-np.arange(10) / 9))
    assert np.abs(kept - formula).max() < 1
    assert np.abs(split.counts("labelled") - 0.1 * kept).max() <= 1
    assert split.counts("labelled").min() >= 1


def test_a_split_is_the_same_bytes_again_and_another_seed_is_another(train: Manifest, tmp_path: Path):
    write_split(make_split(train, LONG_TAIL, seed=0), tmp_path / "a")
    write_split(make_split(train, LONG_TAIL, seed=0), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = read_split(tmp_path / "a", train)
    assert again.hash == make_split(train, LONG_TAIL, seed=0).hash != make_split(train, LONG_TAIL, seed=1).hash
    assert "exponential imbalance 10" in again.protocol


def test_a_split_of_another_dataset_and_a_damaged_one_are_refused(train: Manifest, digits_folder: Path, tmp_path: Path):
    path = tmp_path / "split"
    write_split(make_split(train, LONG_TAIL, seed=0), path)
    with pytest.raises(DataError, match="made for another dataset"):
        read_split(path, read_manifest(digits_folder / "test"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match="is damaged or not a split of this version"):
        read_split(path, train)
    for codes in ("LU", "X" * train.num_samples, 7, "ü" * train.num_samples):
        path.write_text(json.dumps(json.loads(whole) | {"codes": codes}))
        with pytest.raises(DataError, match="damaged"):
            read_split(path, train)
    for version in (1, None):
        path.write_text(json.dumps(json.loads(whole) | {"version": version}))
        with pytest.raises(DataError, match=f"has version {version}, this code reads 2; delete it and make it again"):
            read_split(path, train)
    with pytest.raises(DataError, match="does not exist"):
        read_split(tmp_path / "none", train)


def test_a_split_with_any_change_of_meaning_is_refused_unless_its_hash_is_left_out(train: Manifest, tmp_path: Path):
    path = tmp_path / "split"
    split = make_split(train, LONG_TAIL, seed=0)
    write_split(split, path)
    content = json.loads(path.read_text())
    swapped = content["codes"].translate(str.maketrans("LU", "UL"))
    for change in ({"codes": swapped}, {"seed": 1}, {"protocol": "x"}, {"ood_classes": [3]}, {"config": {}}):
        path.write_text(json.dumps(content | change))
        with pytest.raises(DataError, match="was changed or damaged after it was made"):
            read_split(path, train)
        path.write_text(json.dumps({name: value for name, value in (content | change).items() if name != "sha256"}))
        assert read_split(path, train).hash != split.hash
    path.write_text(json.dumps(content | {"sha265": "x"}))
    with pytest.raises(DataError, match="unknown field 'sha265'"):
        read_split(path, train)


def test_a_split_is_json_with_one_code_a_sample_however_the_file_is_named_and_laid_out(train: Manifest, tmp_path: Path):
    split = make_split(train, LONG_TAIL, seed=0)
    path = tmp_path / "any.name"
    write_split(split, path)
    content = json.loads(path.read_text())
    assert len(content["codes"]) == train.num_samples
    assert content["codes"].count("V") == len(split.subset("validation")) == 150
    path.write_text(json.dumps(content, indent=2))
    assert read_split(path, train).hash == split.hash


def test_an_unknown_subset_lists_the_known_ones(train: Manifest):
    with pytest.raises(ConfigError, match="unknown subset of a split 'labeled'; known: labelled, unlabelled"):
        make_split(train, LONG_TAIL, seed=0).subset("labeled")


def test_the_command_makes_a_split_once(digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["split", str(digits_folder / "train"), "--out", str(tmp_path / "s"), "--imbalance", "10"]
    assert main(command) == 0
    assert "written" in capsys.readouterr().out
    assert main(command) == 0
    assert "already there" in capsys.readouterr().out
    assert main([*command, "--seed", "1"]) == 3
    assert "already holds a split by another" in capsys.readouterr().err
    assert main([*command, "--labelled", "2"]) == 2
    assert "labelled = '2'" in capsys.readouterr().err


def test_the_help_describes_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["split", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(" ".join((field.description or "?").split()) in text for field in SplitConfig.model_fields.values())


def test_a_path_that_cannot_be_written_is_a_sentence(digits_folder: Path, tmp_path: Path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["split", str(digits_folder / "train"), "--out", str(tmp_path / "file" / "split.json")]) == 5
    assert "file: there is a file where a folder is needed; give another path" in capsys.readouterr().err
    assert main(["convert", "digits", "--out", str(tmp_path / "file")]) == 5
    assert "there is a file where a folder is needed" in capsys.readouterr().err
