import itertools

import numpy as np
import pytest

from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, DataError
from pipeline.streaming.config import LoaderConfig
from pipeline.streaming.order import Order, cut_blocks, cut_runs, readers_of_rank, shuffle_quality
from pipeline.streaming.sampling import sample_weights


def order_of(count: int, *, blocks: int | None = None, batch: int = 24, virtual_readers: int = 8, **options) -> Order:
    edges = np.unique(np.linspace(0, count, (blocks or count) + 1).astype(int))
    options = {"window": 10**6, "seed": 0} | options
    return Order(np.arange(count) * 3, edges, global_batch=batch, virtual_readers=virtual_readers, **options)


def stream(order: Order, steps: int) -> np.ndarray:
    return np.concatenate([order.step(s, range(order.virtual_readers)).ravel() for s in range(steps)])


@pytest.mark.parametrize("count", [1, 5, 23, 24, 100, 1000])
@pytest.mark.parametrize("window", [1, 40, 10**6])
def test_every_epoch_holds_every_sample_once_wherever_its_seams_fall(count, window):
    order = order_of(count, window=window)
    steps = -(-4 * count // 24)
    epochs = stream(order, steps)[: 4 * count].reshape(4, count)
    for epoch in epochs:
        assert sorted(epoch) == list(range(0, 3 * count, 3))


def test_epochs_differ_and_an_epoch_begun_again_is_itself():
    first, second = stream(order_of(240), 20).reshape(2, 240)
    assert (first != second).any()
    assert (stream(order_of(240), 10) == first).all()
    assert (stream(order_of(240, seed=1), 10) != first).any()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_end_to_end_are_the_global_batch(world_size):
    order = order_of(1000)
    for step in (0, 41, 42, 1000):
        ranks = [order.step(step, readers_of_rank(8, rank, world_size)).ravel() for rank in range(world_size)]
        assert (np.concatenate(ranks) == order.step(step, range(8)).ravel()).all()


def test_a_virtual_reader_taken_in_any_pieces_is_one_stream():
    order = order_of(100, batch=48)
    whole = order.take(3, 0, 60)[0]
    assert (np.concatenate([order.take(3, k, 7)[0] for k in range(0, 56, 7)]) == whole[:56]).all()
    assert (order.take(3, 0, 60)[1] == np.sort(order.take(3, 0, 60)[1])).all()


def test_a_virtual_reader_within_its_window_touches_few_blocks_at_a_time():
    order = order_of(80_000, blocks=800, batch=64, window=8 * 200)
    blocks = order.take(0, 1000, 100)[0] // 3 // 100
    assert len(np.unique(blocks)) <= 2 * 200 // 100 + 2


def test_shuffle_quality_is_one_for_a_full_shuffle_and_bounded_for_a_window(train: Manifest):
    everything = np.arange(train.num_samples)

    def quality(blocks: int, window: int) -> float:
        edges = np.unique(np.linspace(0, len(everything), blocks + 1).astype(int))
        return shuffle_quality(
            Order(everything, edges, global_batch=64, virtual_readers=8, window=window, seed=0), train
        )

    assert quality(len(everything), 10**6) == pytest.approx(1, abs=0.05)
    assert quality(64, 400) > 0.8
    assert quality(1, 1) > quality(8, 1) - 1  # a number even for no shuffle at all


def test_small_datasets_are_shuffled_sample_by_sample(train: Manifest):
    sample_indices = np.arange(0, train.num_samples, 2)
    assert (cut_blocks(train, sample_indices, virtual_readers=8)[0] == np.arange(len(sample_indices) + 1)).all()


def test_blocks_respect_shards_and_size(train: Manifest):
    blocks = cut_runs(train, np.arange(train.num_samples), span=8192)
    samples = train.samples
    for first, stop in itertools.pairwise(blocks):
        assert train.shard_of(first) == train.shard_of(stop - 1)
        assert samples["offset"][stop - 1] - samples["offset"][first] < 8192


def test_class_balanced_epochs_are_even_and_repeat_factor_repeats_rare_classes():
    labels = np.repeat([0, 1, 2], [300, 90, 10])
    for sampling, expected in (("class_balanced", [133, 133, 133]), ("repeat_factor", [300, 104, 35])):
        config = LoaderConfig(sampling=sampling, repeat_threshold=0.3)
        weights, groups = sample_weights(labels, config)
        order = order_of(400, weights=weights, groups=groups)
        epoch = stream(order, -(-order.epoch_size // 24))[: order.epoch_size] // 3
        counts = np.bincount(labels[epoch])
        assert np.abs(counts - expected).max() <= 2, sampling
        appearances = np.bincount(epoch, minlength=400)
        for c in range(3):
            assert np.ptp(appearances[labels == c]) <= 1


def test_refusals_name_the_numbers():
    with pytest.raises(ConfigError, match="virtual_readers 7 does not divide the global batch of 24; leave"):
        order_of(10, virtual_readers=7)
    with pytest.raises(ConfigError, match="virtual_readers 8 must be a multiple of the 3 processes"):
        readers_of_rank(8, 0, 3)
    with pytest.raises(DataError, match="has no samples"):
        order_of(0)
