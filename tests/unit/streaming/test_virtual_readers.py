"""The derived number of virtual readers fits the worlds that a batch allows, and never depends on the world."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError
from pipeline.streaming.config import AugmentConfig, LoaderConfig, derive_virtual_readers
from pipeline.streaming.loader import Loader
from pipeline.streaming.transforms import train_views
from stages.check import check_readers
from stages.configs.distill import DistillConfig
from stages.spec import Stream

VIEWS = train_views((8, 8), AugmentConfig(), (0.5,) * 3, (0.5,) * 3)


@given(st.integers(1, 4096), st.integers(0, 10**6), st.booleans())
def test_the_derived_number_divides_the_batch_and_leaves_each_reader_its_samples(batch: int, samples: int, mixed: bool):
    readers = derive_virtual_readers(batch, samples, mixed=mixed)
    assert batch % readers == 0
    assert readers == 1 or (readers <= samples and batch // readers >= 1 + mixed)


@pytest.mark.parametrize("batch", [1, 12, 16, 96, 1024])
def test_with_enough_samples_every_world_that_divides_the_batch_fits(batch: int):
    readers = derive_virtual_readers(batch, samples=batch)
    assert [n for n in range(1, batch + 1) if readers % n == 0] == [n for n in range(1, batch + 1) if batch % n == 0]


def test_mixed_pairs_and_few_samples_lower_the_number():
    assert derive_virtual_readers(16, 1000, mixed=True) == 8
    assert derive_virtual_readers(15, 1000, mixed=True) == 5
    assert derive_virtual_readers(16, 9) == 8
    assert derive_virtual_readers(16, 0) == 1


@pytest.mark.parametrize("world_size", [2, 3, 4, 6, 12])
def test_without_a_given_number_global_batches_are_equal_for_every_world_size(train: Manifest, world_size: int):
    def batches(rank: int, world_size: int) -> list[torch.Tensor]:
        options = {"global_batch": 12, "seed": 0, "views": VIEWS, "config": LoaderConfig(workers=0)}
        loader = Loader(train, np.arange(100), rank=rank, world_size=world_size, **options)
        return [batch.images for batch in itertools.islice(loader.batches(), 10)]

    ranks = [batches(rank, world_size) for rank in range(world_size)]
    for step, whole in enumerate(batches(0, 1)):
        assert torch.equal(torch.cat([rank[step] for rank in ranks]), whole)


def config_of(batch: int, **more: object) -> DistillConfig:
    return DistillConfig.model_validate(
        {
            "run": {"experiment": "e"},
            "data": {"train": "d", "split": "s"},
            "model": {"name": "timm/resnet18"},
            "optim": {"lr": 1e-3},
            "loop": {"steps": 10, "global_batch": batch},
            **more,
        }
    )


@pytest.mark.parametrize(
    ("config", "samples", "world_size", "sentence"),
    [
        (config_of(16), 55, 16, ""),
        (config_of(16), 9, 16, "loop.global_batch 16 and has only 9 labelled samples; start 8, or change"),
        (config_of(12, mix={"mixup": 1}), 55, 4, "12 and mixes images in pairs that stay in one process; start 3, or"),
        (config_of(16), 0, 1, "there are no labelled samples in s; choose another data.split"),
    ],
)
def test_a_world_that_does_not_fit_is_refused_in_one_sentence(config, samples, world_size, sentence):
    counts = {"labelled": samples, "unlabelled": 1000}
    streams = {name: Stream(np.arange(count), config.loop.global_batch) for name, count in counts.items()}
    if not sentence:
        return check_readers(config, streams, world_size)
    with pytest.raises(ConfigError, match=sentence) as caught:
        check_readers(config, streams, world_size)
    assert "\n" not in str(caught.value)
