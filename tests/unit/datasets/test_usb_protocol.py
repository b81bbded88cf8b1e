"""USB's long-tail protocol: the counts and the very indices of its generator, computed here as its description says."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import validate
from pipeline.data import main
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.imbalance import head_counts
from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.splits import read_split
from pipeline.errors import ConfigError


def test_counts_are_those_of_the_published_protocols() -> None:
    """CIFAR10-LT 1500/3000 at 100 and CIFAR100-LT 150/300 at 10, and a reversed tail."""
    assert head_counts(1500, 10, 100).tolist() == [1500, 899, 539, 323, 193, 116, 69, 41, 25, 15]
    assert head_counts(3000, 10, -100).tolist()[::-1] == head_counts(3000, 10, 100).tolist()
    hundred = head_counts(150, 100, 10).tolist()
    assert (hundred[0], hundred[-1]) == (150, 15)
    assert hundred == sorted(hundred, reverse=True)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images of 4 classes whose keys count in the order of a file, in shards that are shuffled."""
    from pipeline.datasets.convert.benchmarks.pixels import Pixels, numbered
    from pipeline.datasets.convert.writer import convert

    labels = [(5 * i) % 4 for i in range(120)]
    pixels = np.random.default_rng(1).integers(0, 256, (130, 4, 4, 3), dtype=np.uint8)
    keys = numbered("train", 120) + numbered("unlabelled", 10)
    source = Pixels("made", tuple("abcd"), keys, labels + [-1] * 10, [pixels], [])
    folder = tmp_path_factory.mktemp("numbered") / "train"
    convert(source, folder, seed=5)
    return folder


@pytest.mark.parametrize(("m_1", "gamma_u"), [(8, 4), (8, -4), (0, 1)])
def test_indices_are_usbs_for_the_seed(numbered: Path, tmp_path: Path, m_1: int, gamma_u: int) -> None:
    """One legacy generator, class after class, over the indices in the order of the file."""
    words = f"--n-1 12 --gamma-l 6 --m-1 {m_1} --gamma-u={gamma_u} --seed 2".split()
    assert main(["split", str(numbered), "--out", str(tmp_path / "split.json"), *words]) == 0
    manifest = read_manifest(numbered)
    split = read_split(tmp_path / "split.json", manifest)
    target = np.array([(5 * i) % 4 for i in range(120)])
    np.random.seed(2)
    labelled: list[int] = []
    unlabelled: list[int] = []
    for c in range(4):
        idx = np.where(target == c)[0]
        np.random.shuffle(idx)
        known = [12, 6, 3, 2][c]
        more = ([8, 5, 3, 2] if gamma_u > 0 else [2, 3, 5, 8])[c] if m_1 else len(idx) - known
        labelled += idx[:known].tolist()
        unlabelled += idx[known : known + more].tolist()
    keys = {name: {manifest.key(i) for i in split.subset(name).tolist()} for name in ("labelled", "unlabelled")}
    assert keys["labelled"] == {f"train-{i:06d}" for i in labelled}
    assert keys["unlabelled"] == {f"train-{i:06d}" for i in unlabelled} | {f"unlabelled-{i:06d}" for i in range(10)}
    assert "USB's long tail over 4 classes: N_1 12, gamma_l 6" in split.protocol


def test_validation_changes_no_index_and_too_much_is_refused(
    numbered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, subsets = read_manifest(numbered), []
    for more in ("0", "3"):
        words = f"--n-1 12 --gamma-l 6 --m-1 8 --gamma-u 4 --validation-per-class {more}".split()
        assert main(["split", str(numbered), "--out", str(tmp_path / f"{more}.json"), *words]) == 0
        split = read_split(tmp_path / f"{more}.json", manifest)
        subsets.append([split.subset(name).tolist() for name in ("labelled", "unlabelled")])
        assert len(split.subset("validation")) == 4 * int(more)
    assert subsets[0] == subsets[1]
    assert main(["split", str(numbered), "--out", str(tmp_path / "x.json"), "--n-1", "40"]) == 2
    assert "class 'a' has 30 samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"m_1": 5}, "belong to USB's protocol"),
        ({"n_1": 5, "imbalance": 10}, "which has no imbalance"),
        ({"n_1": 5, "gamma_u": 0.5, "m_1": 3}, "must be 1 or more"),
        ({"n_1": 5, "gamma_u": 10}, "gamma_u needs m_1"),
    ],
)
def test_options_that_do_not_fit_are_refused(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validate(SplitConfig, values, "split")
