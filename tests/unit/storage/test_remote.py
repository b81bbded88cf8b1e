import io
import itertools
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.datasets.index import index_remote
from pipeline.datasets.manifest import HEADER, SAMPLES, Manifest, read_manifest
from pipeline.errors import ConfigError, DataError
from pipeline.storage import helper
from pipeline.storage.cache import Cache
from pipeline.storage.config import RemoteConfig
from pipeline.storage.remote import fetch
from pipeline.streaming.config import AugmentConfig, LoaderConfig
from pipeline.streaming.loader import Loader, evaluation_batches
from pipeline.streaming.transforms import eval_views, train_views
from tests.unit.storage.flaky import serve

# The timeout is long enough for a busy machine: a correct response that comes too late would be fetched twice.
QUICK = RemoteConfig(timeout_seconds=1.5, attempts=4, backoff_seconds=0.01)
VIEWS = train_views((16, 16), AugmentConfig(), (0.5,) * 3, (0.5,) * 3)


def remote_copy(manifest: Manifest, url: str, folder: Path) -> Manifest:
    """Return the same dataset with its shards behind `url`."""
    folder.mkdir()
    for name in ("manifest.samples.npy", "manifest.names.bin"):
        shutil.copy(manifest.folder / name, folder / name)
    header = json.loads((manifest.folder / HEADER).read_text())
    (folder / HEADER).write_text(json.dumps(header | {"location": url}))
    return read_manifest(folder)


def epoch(manifest: Manifest, cache: Path | None, *, rank=0, world_size=1, workers=0, remote=QUICK) -> list:
    remote = remote.model_copy(update={"cache": str(cache or ""), "cache_gb": 1.0})
    config = LoaderConfig(virtual_readers=8, workers=workers, remote=remote)
    loader = Loader(
        manifest,
        np.arange(manifest.num_samples),
        global_batch=128,
        rank=rank,
        world_size=world_size,
        seed=0,
        views=VIEWS,
        config=config,
    )
    batches = list(itertools.islice(loader.batches(), int(loader.steps_per_epoch)))
    loader.close()
    return batches


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_drops_stalls_truncates_and_refuses_changes_nothing(train, tmp_path, workers):
    faults = ("drop", "", "stall", "truncate", "503", "", "429")
    with serve(train.folder, faults) as (url, log):
        manifest = remote_copy(train, url, tmp_path / "there")
        assert manifest.hash == train.hash
        batches = epoch(manifest, tmp_path / "cache", workers=workers)
    for ours, straight in zip(batches, epoch(train, None), strict=True):
        assert torch.equal(ours.images, straight.images)
        assert torch.equal(ours.indices, straight.indices)
    assert log.bytes_sent <= 1.1 * sum(shard.size for shard in train.shards)


def test_a_cut_connection_resumes_at_the_last_byte(tmp_path):
    content = np.random.default_rng(0).bytes(2_000_000)
    (tmp_path / "a.tar").write_bytes(content)
    with serve(tmp_path, ("drop", "truncate", "")) as (url, log):
        into = io.BytesIO()
        fetch(f"{url}/a.tar", 1000, 1_900_000, len(content), QUICK, into)
    assert into.getvalue() == content[1000:1_900_000]
    assert [first for _, first, _ in log.ranges] == sorted({first for _, first, _ in log.ranges})
    assert log.ranges[-1][1] > 1_300_000
    assert log.bytes_sent <= 1.1 * len(content)


@pytest.mark.parametrize(
    ("faults", "size", "sentence"),
    [
        (("404",), 10_000, "the server answers 404"),
        (("403",), 10_000, "the server answers 403"),
        (("no ranges",), 10_000, "does not serve byte ranges"),
        (("",), 9_999, "has 10000 bytes, the manifest says 9999"),
        (("503",), 10_000, "no byte after 0 in 4 attempts .*503"),
    ],
)
def test_an_error_that_no_second_attempt_can_help_is_one_sentence(tmp_path, faults, size, sentence):
    (tmp_path / "a.tar").write_bytes(bytes(10_000))
    with serve(tmp_path, faults) as (url, log), pytest.raises(DataError, match=sentence):
        fetch(f"{url}/a.tar", 0, 10_000, size, QUICK, io.BytesIO())
    assert len(log.ranges) == (4 if faults == ("503",) else 1)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[]", "no JSON object"), (b"null", "no JSON object"), (b"{", "is no manifest"), (b"\xff", "is no manifest")],
)
def test_a_served_header_that_is_none_is_one_sentence(train, tmp_path, content, said):
    shutil.copytree(train.folder, tmp_path / "served")
    (tmp_path / "served" / HEADER).write_bytes(content)
    with serve(tmp_path / "served") as (address, _), pytest.raises(DataError, match=said):
        index_remote(address, tmp_path / "out", None, RemoteConfig(), 1)
    assert not (tmp_path / "out" / HEADER).exists()


@pytest.mark.parametrize("braces", ["{0..", "{0..999999999999}", "{0..9999}{0..9999}", "{a,b"])
def test_braces_that_cannot_be_read_or_stand_for_too_many_are_refused(tmp_path, braces):
    with pytest.raises(ConfigError, match="the braces"):
        index_remote(f"http://127.0.0.1:1/{braces}.tar", tmp_path / "out", None, RemoteConfig(), 1)


def test_a_server_that_lies_about_sizes_fills_no_memory(tmp_path):
    (tmp_path / SAMPLES).write_bytes(bytes(1000))
    with (
        serve(tmp_path, ("longer",)) as (address, _),
        pytest.raises(DataError, match="more bytes than it was asked for"),
    ):
        fetch(f"{address}/{SAMPLES}", 0, 100, None, RemoteConfig(attempts=1), io.BytesIO())
    with serve(tmp_path, ("huge",)) as (address, _), pytest.raises(DataError, match="a manifest at most"):
        index_remote(address, tmp_path / "out", None, RemoteConfig(), 1)


def test_a_missing_server_is_one_sentence():
    with pytest.raises(DataError, match="no byte after 0 in 4 attempts"):
        fetch("http://127.0.0.1:1/a.tar", 0, 10, 10, QUICK, io.BytesIO())
    with pytest.raises(ConfigError, match="unknown kind of address 'pipe'"):
        fetch("pipe://cat", 0, 10, 10, QUICK, io.BytesIO())


def test_a_server_that_goes_away_in_the_middle_ends_with_the_byte_where_it_broke(tmp_path):
    (tmp_path / "a.tar").write_bytes(bytes(10_000))
    gone = pytest.raises(DataError, match="no byte after 5000 in 4 attempts")
    with serve(tmp_path, ("truncate", "503", "503", "503", "503")) as (url, log), gone:
        fetch(f"{url}/a.tar", 0, 10_000, 10_000, QUICK, io.BytesIO())
    assert len(log.ranges) == 4  # the first one, which was cut after 5,000 bytes, and three in a row without any


def test_threads_and_forked_processes_share_one_process_that_reads_and_outlive_its_death(tmp_path):
    """obstore itself does not survive a fork; when its process is killed, the next attempt starts another one."""
    content = np.random.default_rng(0).bytes(100_000)
    (tmp_path / "a.tar").write_bytes(content)

    def read(start: int) -> bytes:
        into = io.BytesIO()
        fetch(f"{url}/a.tar", start, start + 1000, len(content), QUICK, into)
        return into.getvalue()

    def check(starts: range) -> None:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(read, starts)) == [content[start : start + 1000] for start in starts]

    with serve(tmp_path) as (url, _):
        check(range(0, 50_000, 1000))
        process = helper._helper[1]
        children = [
            multiprocessing.get_context("fork").Process(target=check, args=(range(k, 9_000, 1000),)) for k in (0, 7)
        ]
        for child in children:
            child.start()
        check(range(50_000, 60_000, 1000))
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0, 0]
        assert helper._helper[1] is process
        process.kill()
        process.wait()
        check(range(0, 10_000, 1000))
        assert helper._helper[1] is not process


def test_ranks_of_a_node_share_the_cache_and_fetch_each_byte_once(train, tmp_path):
    with serve(train.folder) as (url, log):
        manifest = remote_copy(train, url, tmp_path / "there")
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(
                target=epoch,
                args=(manifest, tmp_path / "cache"),
                kwargs={"rank": r, "world_size": 4, "remote": RemoteConfig()},
            )
            for r in range(4)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert [process.exitcode for process in ranks] == [0] * 4
    assert log.bytes_sent <= sum(shard.size for shard in train.shards)
    assert len(log.ranges) == len(set(log.ranges)) == len(train.shards)


def test_evaluation_reads_remote_shards_too(train, tmp_path):
    views = eval_views((16, 16), (0.5,) * 3, (0.5,) * 3)
    options = {"batch_size": 16, "rank": 0, "world_size": 1, "views": views}
    with serve(train.folder, ("", "drop")) as (url, _):
        manifest = remote_copy(train, url, tmp_path / "there")
        remote = QUICK.model_copy(update={"cache": str(tmp_path / "cache")})
        ours = list(evaluation_batches(manifest, np.arange(100), remote=remote, **options))
    straight = list(evaluation_batches(train, np.arange(100), **options))
    assert all(torch.equal(a.images, b.images) for a, b in zip(ours, straight, strict=True))


def test_a_remote_dataset_without_a_cache_or_with_too_small_a_one_is_refused(train, tmp_path):
    manifest = remote_copy(train, "https://nowhere.invalid/data", tmp_path / "there")
    with pytest.raises(ConfigError, match=r"remote\.cache is empty"):
        epoch(manifest, None)
    small = LoaderConfig(remote=RemoteConfig(cache=str(tmp_path), cache_gb=1e-5))
    with pytest.raises(ConfigError, match="cache_gb 1e-05 is less than"):
        Loader(manifest, np.arange(100), global_batch=8, rank=0, world_size=1, seed=0, views=VIEWS, config=small)


def test_the_cache_keeps_its_limit_and_the_last_used_files(tmp_path):
    cache = Cache(tmp_path, limit=1000)
    fetched = []

    def read(name: str) -> bytes:
        def write(file) -> None:
            fetched.append(name)
            file.write(name.encode() * 100)

        descriptor = cache.open(name, 100, write)
        try:
            return os.pread(descriptor, 100, 0)
        finally:
            os.close(descriptor)

    for name in "abcdefghij":
        assert read(name) == name.encode() * 100
    assert read("a") == b"a" * 100  # used again, so b is the oldest
    assert read("k") == b"k" * 100
    assert sum(path.stat().st_size for path in tmp_path.glob("?")) <= 1000
    assert (tmp_path / "a").exists()
    assert not (tmp_path / "b").exists()
    (tmp_path / "a").write_bytes(b"cut")
    assert read("a") == b"a" * 100
    assert fetched == [*"abcdefghijk", "a"]
