"""The hashing of shards in the background: what it reads, what it remembers, what it finds."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.train.distributed import World
from pipeline.train.shard_check import ShardCheck

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def dataset(digits: Path, tmp_path: Path) -> Manifest:
    shutil.copytree(digits / "train", tmp_path / "train")
    return read_manifest(tmp_path / "train")


def test_every_shard_is_hashed_once_and_then_known_by_its_stamp(dataset: Manifest, monkeypatch) -> None:
    hashed: list[str] = []
    original = ShardCheck._hash
    monkeypatch.setattr(ShardCheck, "_hash", lambda self, path: hashed.append(path.name) or original(self, path))
    with ShardCheck([dataset, dataset], ALONE) as shards:
        shards.begin({})
        assert shards.problem(wait=True) == ""
        stamps = shards.stamps()
        assert shards.settled
    assert sorted(hashed) == [shard.name for shard in dataset.shards]
    assert set(stamps) == {shard.sha256 for shard in dataset.shards}
    hashed.clear()
    os.utime(dataset.path_of(1))
    with ShardCheck([dataset], ALONE) as shards:
        shards.begin(stamps)
        assert shards.problem(wait=True) == ""
        assert hashed == [dataset.shards[1].name]
        assert set(shards.stamps()) == set(stamps)


def test_a_restored_time_of_modification_hides_nothing(dataset: Manifest) -> None:
    with ShardCheck([dataset], ALONE) as shards:
        shards.begin({})
        shards.problem(wait=True)
        stamps = shards.stamps()
    path = dataset.path_of(0)
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with ShardCheck([dataset], ALONE) as shards:
        shards.begin(stamps)
        assert shards.problem(wait=True).startswith(f"{path} has the size but not the content")
        assert not shards.settled


def test_ranks_share_the_shards(dataset: Manifest) -> None:
    shares = [[file.path for file in ShardCheck([dataset], World(k, 3, ALONE.device))._files] for k in range(3)]
    paths = [path for share in shares for path in share]
    assert sorted(paths) == [dataset.path_of(k) for k in range(len(dataset.shards))]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_shard_that_cannot_be_read_is_named(dataset: Manifest) -> None:
    dataset.path_of(0).unlink()
    with ShardCheck([dataset], ALONE) as shards:
        shards.begin({})
        assert "000000.tar cannot be read (No such file or directory)" in shards.problem(wait=True)
