import itertools
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, EnvironmentProblem
from pipeline.evaluation_view import EvaluationView
from pipeline.streaming import batches, workers
from pipeline.streaming.config import STRONG, WEAK, AugmentConfig, LoaderConfig
from pipeline.streaming.loader import Batch, Loader, evaluation_batches
from pipeline.streaming.reader import Reader
from pipeline.streaming.transforms import eval_views, pair_views, train_views

SIZE, MEAN, STD = (32, 32), (0.3,) * 3, (0.35,) * 3
VIEWS = train_views(SIZE, AugmentConfig(crop_scale=(0.5, 1.0)), MEAN, STD)


def loader_of(manifest: Manifest, *, rank=0, world_size=1, workers=0, views=VIEWS, **options) -> Loader:
    config = LoaderConfig(virtual_readers=8, workers=workers, **options.pop("config", {}))
    options = {"global_batch": 32, "seed": 3, "sample_indices": np.arange(200)} | options
    return Loader(manifest, rank=rank, world_size=world_size, views=views, config=config, **options)


def take(loader: Loader, steps: int, start: int = 0) -> list[Batch]:
    batches = list(itertools.islice(loader.batches(start), steps))
    loader.close()
    return batches


@pytest.fixture(scope="module")
def straight(train: Manifest) -> list[Batch]:
    return take(loader_of(train), 9)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_global_batches_are_equal_for_every_world_size_and_number_of_workers(train, straight, world_size, workers):
    ranks = [take(loader_of(train, rank=r, world_size=world_size, workers=workers), 9) for r in range(world_size)]
    for step, whole in enumerate(straight):
        for field in ("images", "labels", "indices"):
            joined = torch.cat([getattr(rank[step], field) for rank in ranks])
            assert torch.equal(joined, getattr(whole, field)), (step, field)
        assert sum(rank[step].virtual_readers for rank in ranks) == 8


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_resumed_mid_epoch_at_another_world_size_continues_that_very_sequence(train, straight, world_size):
    ranks = [take(loader_of(train, rank=r, world_size=world_size), 4, start=5) for r in range(world_size)]
    for step in range(4):
        assert torch.equal(torch.cat([rank[step].images for rank in ranks]), straight[5 + step].images)


def test_epochs_see_a_sample_in_different_crops(train):
    # 32 samples, 32 a batch: a batch is an epoch.
    first, second = take(loader_of(train, sample_indices=np.arange(32)), 2)
    a, b = first.images[first.indices.argsort()], second.images[second.indices.argsort()]
    assert (first.indices != second.indices).any()
    assert (a != b).flatten(1).any(1).all()


def test_labels_are_the_manifests_and_hidden_ones_are_minus_one(train):
    (batch,) = take(loader_of(train), 1)
    assert torch.equal(batch.labels, torch.from_numpy(train.labels)[batch.indices])
    (hidden,) = take(loader_of(train, hide_labels=True), 1)
    assert (hidden.labels == -1).all()
    assert torch.equal(hidden.images, batch.images)


def test_weak_and_strong_views_come_normalised_and_different(train):
    views = pair_views(train_views(SIZE, WEAK, MEAN, STD), train_views(SIZE, STRONG, MEAN, STD))
    (batch,) = take(loader_of(train, views=views), 1)
    assert batch.strong is not None
    assert batch.images.shape == batch.strong.shape == (32, 3, 32, 32)
    assert batch.images.dtype == batch.strong.dtype == torch.float32
    assert batch.images.min() >= -0.3 / 0.35 - 1e-6
    assert batch.images.max() <= 0.7 / 0.35 + 1e-6
    assert (batch.images != batch.strong).flatten(1).any(1).all()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_counts_each_of_ten_samples_once(train, world_size, workers):
    sample_indices = np.arange(5, 15)
    views = eval_views(SIZE, MEAN, STD, view=EvaluationView(crop=1.0))
    ranks = [
        list(
            evaluation_batches(
                train, sample_indices, batch_size=4, rank=r, world_size=world_size, views=views, workers=workers
            )
        )
        for r in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    joined = torch.cat([batch.indices for batches in ranks for batch in batches])
    labels = torch.cat([batch.labels for batches in ranks for batch in batches])
    assert sorted(joined[joined >= 0].tolist()) == sample_indices.tolist()
    assert torch.equal(labels[joined >= 0], torch.from_numpy(train.labels)[joined[joined >= 0]])
    assert (labels[joined < 0] == -1).all()


def test_chunks_are_whole_virtual_readers_and_partners_stay_inside_one():
    labels = torch.arange(32)
    batch = Batch(images=torch.rand(32, 3, 4, 4), labels=labels, indices=labels, virtual_readers=8)
    assert batch.partner()[:4].tolist() == [3, 2, 1, 0]
    chunks = batch.chunks(4)
    assert [chunk.virtual_readers for chunk in chunks] == [2, 2, 2, 2]
    assert torch.equal(torch.cat([chunk.labels[chunk.partner()] for chunk in chunks]), labels[batch.partner()])
    with pytest.raises(ConfigError, match="cannot be cut into 5"):
        batch.chunks(5)


def test_steps_per_epoch_and_a_seek_far_ahead(train):
    loader = loader_of(train)
    assert loader.steps_per_epoch == 200 / 32
    (batch,) = take(loader, 1, start=10**6)
    assert len(batch) == 32


def test_virtual_readers_are_checked_against_the_samples_before_the_start(train):
    with pytest.raises(ConfigError, match=r"virtual_readers is 8, but .* has only 5 samples"):
        loader_of(train, sample_indices=np.arange(5))
    with pytest.raises(ConfigError, match="virtual_readers 8 does not divide the global batch of 12"):
        loader_of(train, global_batch=12)
    with pytest.raises(ConfigError, match="must be a multiple of the 3 processes"):
        loader_of(train, world_size=3)


START = """
import itertools, multiprocessing, os, signal, sys
from pathlib import Path
import numpy as np
from pipeline.streaming.config import AugmentConfig, LoaderConfig
from pipeline.streaming.loader import Loader
from pipeline.datasets.manifest import read_manifest
from pipeline.streaming.transforms import train_views
from pipeline.errors import EnvironmentProblem

views = train_views((16, 16), AugmentConfig(), (0.5,) * 3, (0.5,) * 3)
config = LoaderConfig(virtual_readers=8, workers=1)
options = dict(global_batch=32, rank=0, world_size=1, seed=0, views=views, config=config)
batches = Loader(read_manifest(Path(sys.argv[1])), np.arange(200), **options).batches()
next(batches)
"""

KILL = """
(worker,) = multiprocessing.active_children()
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    os.kill(worker.pid, number)
for _ in itertools.islice(batches, 5):
    pass
print("still there", flush=True)
try:
    os.kill(worker.pid, signal.SIGKILL)
    for _ in itertools.islice(batches, 1000):
        pass
except EnvironmentProblem as error:
    print(error)
"""


def test_a_signal_to_the_whole_job_leaves_the_workers_at_work_and_a_killed_one_is_a_sentence(train):
    command = [sys.executable, "-c", START + KILL, str(train.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.startswith("still there\na data worker died (DataLoader worker"), done.stderr
    assert "lower data.loader.workers or data.loader.prefetch" in done.stdout


class Cut:
    """What torch's iterator is when the connection to its worker breaks."""

    def __init__(self, error: Exception, target, *args) -> None:
        self.error = error
        self._workers = [multiprocessing.get_context("fork").Process(target=target, args=args)]
        self._workers[0].start()

    def __iter__(self):
        return self

    def __next__(self):
        raise self.error

    def _shutdown_workers(self) -> None:
        pass


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_a_sentence(monkeypatch, error):
    """The connection is then gone before torch hears of the death. With a living worker it is an error of another kind."""
    dead, living = Cut(error, os._exit, 9), Cut(error, time.sleep, 60)
    monkeypatch.setattr(workers, "_start_workers", lambda *_: dead)
    with pytest.raises(
        EnvironmentProblem, match=r"a data worker died \(DataLoader worker \(pid \d+\) ended with exit code 9\)"
    ):
        list(workers.read_batches([], [0], 1, 2))
    monkeypatch.setattr(workers, "_start_workers", lambda *_: living)
    with pytest.raises(type(error)):
        list(workers.read_batches([], [0], 1, 2))
    living._workers[0].join()


def test_a_process_that_leaves_its_loader_open_ends(train):
    command = [sys.executable, "-c", START, str(train.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stream_with_hidden_labels_is_not_sampled_by_them(train):
    with pytest.raises(ConfigError, match="sampling=class_balanced would reveal the labels"):
        loader_of(train, hide_labels=True, config={"sampling": "class_balanced"})


def test_a_small_stream_is_decoded_once_and_a_large_one_again_each_time(train, straight, monkeypatch):
    read: list[int] = []
    whole = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, index: read.append(index) or whole(self, index))
    small = take(loader_of(train), 9)
    assert sorted(read) == list(range(200))  # 288 samples were drawn from 200
    read.clear()
    monkeypatch.setattr(batches, "KEPT_BYTES", 200 * 8 * 8 * 3 - 1)
    large = take(loader_of(train), 9)
    assert len(read) == 9 * 32
    for wanted, kept, again in zip(straight, small, large, strict=True):
        assert torch.equal(wanted.images, kept.images)
        assert torch.equal(wanted.images, again.images)
