"""Several datasets as one: their samples in the order given, their classes united by name."""

import itertools
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.data import main
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.joint import JointManifest, read_manifests, unite, with_classes
from pipeline.datasets.manifest import Manifest, read_image, read_manifest
from pipeline.datasets.splits import make_split, read_split
from pipeline.errors import ConfigError, DataError
from pipeline.streaming.config import AugmentConfig, LoaderConfig
from pipeline.streaming.loader import Loader, evaluation_batches
from pipeline.streaming.transforms import eval_views, train_views
from tests.relabel import relabelled

VIEWS = train_views((8, 8), AugmentConfig(), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def halves(train: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The digits cut into two datasets between two shards."""
    folder = tmp_path_factory.mktemp("halves")
    relabelled(train, folder / "a", train.labels, shards=slice(0, 2))
    relabelled(train, folder / "b", train.labels, shards=slice(2, None))
    return read_manifests([folder / "a", folder / "b"])


@pytest.fixture(scope="module")
def pool(train: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first shard of the digits without labels and without classes."""
    folder = tmp_path_factory.mktemp("pool") / "pool"
    relabelled(train, folder, np.full(train.num_samples, -1), classes=[], shards=slice(0, 1))
    return folder


def test_one_dataset_in_a_list_is_that_dataset(train: Manifest) -> None:
    alone = read_manifests([train.folder])
    assert type(alone) is Manifest
    assert (alone.hash, alone.classes, alone.num_samples) == (train.hash, train.classes, train.num_samples)


def test_a_dataset_cut_in_two_reads_as_the_whole(train: Manifest, halves: Manifest) -> None:
    indices = np.random.default_rng(0).permutation(train.num_samples)
    assert (halves.labels == train.labels).all()
    for chosen in (indices, np.sort(indices), indices[:0]):
        for field in ("offset", "length", "label"):
            assert (halves.rows(chosen)[field] == train.rows(chosen)[field]).all()
    assert (halves.shard_of(indices) == train.shard_of(indices)).all()
    for index in [0, 511, 512, *indices[:20].tolist(), train.num_samples - 1]:
        assert halves.key(index) == train.key(index)
        assert halves.rows(index)["offset"] == train.rows(index)["offset"]
        assert read_image(halves, index) == read_image(train, index)
        assert (halves.folder_of(index) / train.shards[int(train.shard_of(index))].name).is_file()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("sampling", ["uniform", "class_balanced"])
def test_the_order_of_a_dataset_cut_in_two_is_that_of_the_whole(
    train: Manifest, halves: Manifest, world_size: int, sampling: str
) -> None:
    """At every number of processes and from any step: the order is a function of the joint sample indices."""
    chosen = np.arange(0, train.num_samples, 3)
    options = {"global_batch": 16, "seed": 3, "views": VIEWS, "config": LoaderConfig(workers=0, sampling=sampling)}
    for rank in range(world_size):
        one, two = (
            Loader(manifest, chosen, rank=rank, world_size=world_size, **options).batches(20)
            for manifest in (train, halves)
        )
        for a, b in itertools.islice(zip(one, two, strict=True), 15):
            assert a.indices.tolist() == b.indices.tolist()
            assert torch.equal(a.images, b.images)
            assert a.labels.tolist() == b.labels.tolist()


def test_every_sample_of_all_datasets_appears_once_an_epoch(train: Manifest, pool: Path) -> None:
    both = read_manifests([train.folder, pool])
    views = eval_views((8, 8), mean=(0.5,) * 3, std=(0.5,) * 3)
    batches = evaluation_batches(both, np.arange(both.num_samples), batch_size=100, rank=0, world_size=1, views=views)
    seen = torch.cat([batch.indices for batch in batches])
    assert sorted(seen[seen >= 0].tolist()) == list(range(train.num_samples + 256))


def test_classes_are_united_by_name_and_an_unlabelled_dataset_adds_none(
    train: Manifest, pool: Path, tmp_path: Path
) -> None:
    names = ["nine", "0", "ten", *train.classes[3:]]
    other = relabelled(train, tmp_path / "other", train.labels, classes=names, shards=slice(0, 1))
    joint = read_manifests([pool, train.folder, other.folder])
    assert joint.classes == (*train.classes, "nine", "ten")
    assert (joint.labels[:256] == -1).all()
    middle = joint.labels[256 : 256 + train.num_samples]
    assert (middle == train.labels).all()
    expected = np.array([joint.classes.index(name) for name in names])[other.labels]
    assert (joint.labels[256 + train.num_samples :] == expected).all()


def test_names_that_differ_in_unicode_form_alone_are_one() -> None:
    cafe = unicodedata.normalize("NFC", "café")
    assert unite([[cafe, "a"], [unicodedata.normalize("NFD", cafe), "b"]]) == (cafe, "a", "b")


def test_the_hash_is_over_the_hashes_in_their_order(train: Manifest, pool: Path) -> None:
    ab, ba = read_manifests([train.folder, pool]), read_manifests([pool, train.folder])
    assert ab.hash == read_manifests([train.folder, pool]).hash
    assert len({ab.hash, ba.hash, train.hash}) == 3
    assert pickle.loads(pickle.dumps(ab)).hash == ab.hash
    assert ba.first_index == {ba.hash: 0, read_manifest(pool).hash: 0, train.hash: 256}


def test_a_dataset_given_twice_is_refused(train: Manifest) -> None:
    with pytest.raises(DataError, match="given twice"):
        JointManifest([train, train])


def test_labels_can_be_counted_in_the_classes_of_another_dataset(train: Manifest, tmp_path: Path) -> None:
    names = [*reversed(train.classes)]
    other = relabelled(train, tmp_path / "other", train.labels, classes=names, shards=slice(0, 1))
    seen = with_classes(other, train.classes)
    assert seen.classes == train.classes
    assert seen.hash == other.hash
    assert [train.classes[k] for k in seen.labels] == [names[k] for k in other.labels]
    assert with_classes(train, train.classes) is train
    both = read_manifests([train.folder, other.folder])
    again = with_classes(both, other.classes)
    assert again.hash == both.hash
    assert [both.classes[k] for k in both.labels] == [again.classes[k] for k in again.labels]
    with pytest.raises(DataError, match="has 10 classes that the training data does not have, the first: '9'"):
        with_classes(other, ("a", "b"))


def test_a_split_takes_samples_without_a_label_as_unlabelled(train: Manifest, pool: Path, tmp_path: Path) -> None:
    both = read_manifests([train.folder, pool])
    split = make_split(both, SplitConfig(validation_per_class=5), seed=0)
    assert split.subset("unlabelled").tolist() == list(range(train.num_samples, both.num_samples))
    assert len(split.subset("validation")) == 50
    assert split.counts("unlabelled").sum() == 0
    real = train.num_samples
    assert split.protocol.endswith(f"; {real} labels are real, 0 of them hidden; 256 samples have no label")
    alone = make_split(train, SplitConfig(validation_per_class=5), seed=0)
    for name in ("labelled", "validation"):
        assert split.subset(name).tolist() == alone.subset(name).tolist(), "unlabelled samples change no choice"
    hiding = make_split(both, SplitConfig(labelled=0.1, validation_per_class=5), seed=0)
    hidden = int((both.labels[hiding.subset("unlabelled")] >= 0).sum())
    assert hidden == len(hiding.subset("unlabelled")) - 256 > 1000
    assert f"; {real} labels are real, {hidden} of them hidden; 256 samples" in hiding.protocol


def test_a_split_of_several_datasets_is_made_and_read_by_the_command(
    train: Manifest, pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "split.json"
    arguments = ["split", str(train.folder), str(pool), "--out", str(out), "--labelled", "0.5"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    assert "256 samples have no label" in capsys.readouterr().out
    both = read_manifests([train.folder, pool])
    assert read_split(out, both).header["manifest"] == both.hash
    assert main(["show", str(train.folder), str(pool), "--split", str(out), "--sheet", str(tmp_path / "s.png")]) == 0
    with pytest.raises(DataError, match="was made for another dataset"):
        read_split(out, train)


def test_a_list_that_calls_an_unlabelled_sample_labelled_is_refused(
    train: Manifest, pool: Path, tmp_path: Path
) -> None:
    other = relabelled(train, tmp_path / "t", np.where(np.arange(train.num_samples) < 5, -1, train.labels))
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{other.key(k)}.png\n" for k in range(10)))
    with pytest.raises(ConfigError, match="names 5 samples that have no label"):
        make_split(other, SplitConfig(labelled_list=str(listed)), seed=0)


def test_a_dataset_without_any_label_has_no_split(pool: Path) -> None:
    with pytest.raises(DataError, match="has 0 samples with a label, of 0 classes"):
        make_split(read_manifest(pool), SplitConfig(), seed=0)


def test_a_label_beyond_the_classes_is_refused(train: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has labels from 0 to 0 for 0 classes"):
        relabelled(train, tmp_path / "t", np.zeros(train.num_samples, int), classes=[])
