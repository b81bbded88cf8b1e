"""Split protocols against the formulas that they are named after."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.config import validate
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.imbalance import class_groups, round_count, target_counts
from pipeline.datasets.manifest import SAMPLE, Manifest
from pipeline.datasets.splits import make_split
from pipeline.errors import ConfigError, DataError


def dataset(sizes: list[int]) -> Manifest:
    """A manifest of `sizes` samples per class, keys class/number, in mixed order."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    seen = [0] * len(sizes)
    members = []
    for label in labels:
        members.append(f"n{label:04d}/n{label:04d}_{seen[label]}.JPEG".encode())
        seen[label] += 1
    samples = np.zeros(len(labels), SAMPLE)
    samples["label"] = labels
    samples["name"] = np.cumsum([0, *map(len, members)])[:-1]
    header = {"location": "", "classes": [f"n{c:04d}" for c in range(len(sizes))], "shards": []}
    return Manifest(Path("nowhere"), header, "hash", samples, np.frombuffer(b"".join(members), np.uint8))


@pytest.fixture(scope="module")
def imagenet() -> Manifest:
    """ImageNet's class sizes in small: 100 classes of 732 to 1300."""
    return dataset([1300 - (k * 37) % 569 for k in range(100)])


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.05, 0.1, 0.5])
def test_label_fractions_are_stratified_with_a_minimum(imagenet: Manifest, fraction: float):
    split = make_split(imagenet, SplitConfig(labelled=fraction, rounding="nearest"), seed=0)
    sizes = np.bincount(imagenet.labels)
    assert split.counts("labelled").tolist() == np.maximum(1, np.floor(sizes * fraction + 0.5)).astype(int).tolist()
    assert (split.counts("labelled") + split.counts("unlabelled") == sizes).all()
    random = make_split(imagenet, SplitConfig(labelled=fraction, min_labelled_per_class=0), seed=0)
    assert abs(random.counts("labelled").sum() / sizes.sum() - fraction) < 0.1 * fraction + 3e-4


@pytest.mark.parametrize("factor", [10, 100, 1000])
def test_the_exponential_profile_is_the_formula(factor: int):
    available, ranks = np.full(1000, 1300), np.arange(1000)
    targets = target_counts(available, ranks, SplitConfig(imbalance=factor))
    assert targets[0] == 1300
    assert targets[-1] == pytest.approx(1300 / factor)
    assert targets.sum() == pytest.approx({10: 508_000, 100: 280_000, 1000: 188_000}[factor], rel=0.01)


def test_the_supplements_wording_is_another_profile():
    config = SplitConfig(imbalance=1000, profile="supplement")
    targets = target_counts(np.full(1000, 1000), np.arange(1000), config)
    assert (targets[:10] == 1000).all()
    assert (targets[10:900] == 100).all()
    assert (targets[900:] == 1).all()
    mild = target_counts(np.full(9, 100), np.arange(9), SplitConfig(imbalance=10, profile="supplement"))
    assert mild.tolist() == pytest.approx([100] * 3 + [50] * 3 + [10] * 3)
    with pytest.raises(ConfigError, match="describes imbalance 10, 100 and 1000, not 50"):
        validate(SplitConfig, {"imbalance": 50, "profile": "supplement"}, "split")


def test_probabilistic_rounding_keeps_the_mean():
    draws = (np.arange(1000) + 0.5) / 1000
    assert np.mean([round_count(1.28, "random", draw) for draw in draws]) == pytest.approx(1.28)
    assert {round_count(2.0, "random", draw) for draw in draws} == {2}
    assert [round_count(value, "nearest", 0.0) for value in (0.4, 0.5, 1.5, 2.4)] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("sizes", "options", "said"),
    [
        ([50, 30, 20], {"labelled": 0.1}, "0.1 of each class labelled, at least 1; seed 0"),
        ([50, 30, 25], {"labelled": 0.1}, "0.1 of each class labelled, at least 1, rounded at random; seed 0"),
        ([50, 30, 25], {"labelled": 0.1, "rounding": "nearest"}, "at least 1, rounded to the nearest; seed 0"),
        ([5, 8, 3], {"labelled": 0.1}, "0.1 of each class labelled, at least 1; seed 0"),
        ([25, 35, 45], {"labelled": 1e-9, "min_labelled_per_class": 4}, "4 of each class labelled; seed 0"),
        ([25, 35, 45], {"labelled": 1.0}, "all labels used; seed 0"),
        ([40, 40, 40], {"labelled": 0.5, "imbalance": 10}, "rounded at random; seed 0"),
    ],
)
def test_a_protocol_says_rounded_only_where_a_count_was(sizes: list[int], options: dict[str, object], said: str):
    """A share below the least number of labels decides nothing, so its rounding is not told either."""
    assert make_split(dataset(sizes), SplitConfig(**options), seed=0).protocol.endswith(said)


def test_class_orders_say_which_classes_are_head(imagenet: Manifest):
    sizes = np.bincount(imagenet.labels)
    by_frequency = make_split(imagenet, SplitConfig(imbalance=100, class_order="frequency"), seed=0)
    assert by_frequency.header["class_ranks"] == np.argsort(np.argsort(-sizes, kind="stable")).tolist()
    one = make_split(imagenet, SplitConfig(imbalance=100, class_order="random"), seed=1)
    two = make_split(imagenet, SplitConfig(imbalance=100, class_order="random"), seed=2)
    assert sorted(one.header["class_ranks"]) == list(range(100))
    assert one.header["class_ranks"] != two.header["class_ranks"]


@pytest.mark.parametrize("scope", ["all", "labelled"])
def test_the_last_classes_are_out_of_distribution(imagenet: Manifest, scope: str):
    config = SplitConfig(imbalance=1000, labelled=0.1, ood_classes=10, ood_scope=scope, validation_per_class=5)
    split = make_split(imagenet, config, seed=0)
    assert split.header["ood_classes"] == list(range(90, 100))
    assert (split.counts("labelled")[90:] == 0).all()
    assert (split.counts("labelled")[:90] >= 1).all()
    assert (split.counts("validation")[90:] == 0).all()
    assert (split.counts("unlabelled")[90:] > 0).all() == (scope == "labelled")
    assert "the last 10 classes" in split.protocol


def test_imbalance_of_the_labelled_part_only_keeps_the_rest_unlabelled(imagenet: Manifest):
    sizes = np.bincount(imagenet.labels)
    split = make_split(imagenet, SplitConfig(imbalance=10, labelled=0.1, scope="labelled"), seed=0)
    assert (split.counts("labelled") + split.counts("unlabelled") == sizes).all()
    assert split.counts("labelled")[0] > 5 * split.counts("labelled")[-1]
    own = make_split(imagenet, SplitConfig(imbalance=10, relative_to="own"), seed=0)
    assert np.abs(own.counts("labelled") - sizes * 10 ** (-np.arange(100) / 99)).max() < 1


def test_validation_is_apart_and_the_same_under_every_imbalance(imagenet: Manifest):
    plain = make_split(imagenet, SplitConfig(validation_per_class=20), seed=0)
    tailed = make_split(imagenet, SplitConfig(imbalance=100, labelled=0.01, validation_per_class=20), seed=0)
    assert plain.subset("validation").tolist() == tailed.subset("validation").tolist()
    assert not np.intersect1d(tailed.subset("validation"), tailed.subset("labelled")).size
    with pytest.raises(ConfigError, match="is too many for class 'n") as refused:
        make_split(imagenet, SplitConfig(validation_per_class=5000), seed=0)
    most = int(
        str(refused.value).rpartition(" ")[2]
    )  # the sentence names the number that works, for the smallest class
    assert most == np.bincount(imagenet.labels).min() - 1
    assert (make_split(imagenet, SplitConfig(validation_per_class=most), seed=0).counts("validation") == most).all()
    make_split(
        imagenet, SplitConfig(ood_classes=len(imagenet.classes), validation_per_class=1), seed=0
    )  # no class is left


def test_published_lists_are_taken_at_their_word(imagenet: Manifest, tmp_path: Path):
    keys = [imagenet.key(i) for i in range(imagenet.num_samples)]
    wanted = np.sort(np.random.default_rng(0).choice(len(keys), 500, replace=False))
    in_folder_order = np.argsort(np.array(keys), kind="stable")
    place = np.argsort(in_folder_order)
    forms = {
        "simclr": "\n".join(keys[i].rpartition("/")[2] + ".JPEG" for i in wanted),
        "imagenet-lt": "\n".join(f"train/{keys[i]}.JPEG {imagenet.labels[i]}" for i in wanted),
        "index": "Index\n" + "\n".join(str(place[i]) for i in wanted),
        "csv": "Index,ImageID\n" + "\n".join(f"{place[i]},{keys[i]}.JPEG" for i in wanted),
    }
    for name, text in forms.items():
        (tmp_path / name).write_text(text)
        split = make_split(imagenet, SplitConfig(labelled_list=str(tmp_path / name), validation_per_class=5), seed=0)
        assert split.subset("labelled").tolist() == wanted.tolist(), name
        assert not np.intersect1d(split.subset("validation"), wanted).size
        assert f"labelled as in {name}" in split.protocol
    pool = make_split(imagenet, SplitConfig(pool_list=str(tmp_path / "imagenet-lt"), labelled=0.5), seed=0)
    assert np.union1d(pool.subset("labelled"), pool.subset("unlabelled")).tolist() == wanted.tolist()
    wide = SplitConfig(pool_list=str(tmp_path / "imagenet-lt"), labelled=0.5, scope="labelled")
    assert not len(make_split(imagenet, wide, seed=0).subset("unused"))
    (tmp_path / "bad").write_text("n9999_1.JPEG\n" + forms["simclr"])
    with pytest.raises(DataError, match=r"1 of 501 lines name no image .* the first: 'n9999_1\.JPEG'"):
        make_split(imagenet, SplitConfig(labelled_list=str(tmp_path / "bad")), seed=0)


def test_head_medium_and_tail_by_thirds_by_count_and_by_ends():
    counts = np.array([5, 500, 150, 19, 20, 100, 101])
    thirds = class_groups(counts)
    assert [thirds[name].tolist() for name in ("head", "medium", "tail")] == [[1, 2, 6], [5], [0, 3, 4]]
    tied = class_groups(np.array([4, 4, 4, 9, 1, 1]), ranks=np.array([3, 2, 1, 0, 5, 4]))
    assert [tied[name].tolist() for name in ("head", "medium", "tail")] == [[2, 3], [0, 1], [4, 5]]
    by_count = class_groups(counts, "count")
    assert [by_count[name].tolist() for name in ("head", "medium", "tail")] == [[1, 2, 6], [4, 5], [0, 3]]
    ends = class_groups(counts, "ends", k=1)
    assert (ends["head"].tolist(), ends["tail"].tolist()) == ([1], [0])
    with pytest.raises(ConfigError, match="k = 4 classes at each end of 7"):
        class_groups(counts, "ends", k=4)
    with pytest.raises(ConfigError, match="unknown rule for class groups 'third'; known: thirds"):
        class_groups(counts, "third")
