"""Pixels become normalised batches on the device: in order, each once, and on a CPU without a copy."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipeline.streaming.batch import Batch
from pipeline.streaming.config import AugmentConfig
from pipeline.streaming.transfer import Transfer
from pipeline.streaming.transforms import train_views
from tests.waits import META

VIEWS = train_views((8, 8), AugmentConfig(), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
CPU = torch.device("cpu")


def pixels(k: int) -> Tensor:
    return torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(k))


def batch(k: int, images: Tensor | None = None) -> Batch:
    return Batch(
        images=pixels(k) if images is None else images,
        strong=pixels(100 + k),
        labels=torch.full((4,), k),
        indices=torch.arange(4) + k,
        virtual_readers=2,
    )


class Source:
    """Batches 0 to 5, counting how many have been asked for."""

    def __init__(self) -> None:
        self.asked = 0

    def __iter__(self) -> Iterator[Batch]:
        for k in range(6):
            self.asked += 1
            yield batch(k)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_every_batch_arrives_once_in_order_and_so_many_are_under_way(ahead: int) -> None:
    source, arrived = Source(), 0
    for k, found in enumerate(Transfer(CPU, VIEWS, ahead).deliver(source)):
        assert source.asked == min(k + 1 + ahead, 6)
        assert found.labels.tolist() == [k] * 4
        assert found.indices.tolist() == [k, k + 1, k + 2, k + 3]
        assert torch.equal(found.images, VIEWS.normalise(pixels(k)))
        assert found.strong is not None
        assert torch.equal(found.strong, VIEWS.normalise(pixels(100 + k)))
        arrived += 1
    assert arrived == 6


def test_on_a_cpu_nothing_is_copied_and_no_batch_is_asked_for_early() -> None:
    source = Source()
    given = batch(0)
    (found,) = Transfer(CPU, VIEWS).deliver([given])
    assert found.labels is given.labels
    assert found.indices is given.indices
    next(Transfer(CPU, VIEWS).deliver(source))
    assert source.asked == 1


def test_a_batch_that_is_kept_is_not_overwritten_and_one_that_is_not_lends_its_memory() -> None:
    batches = Transfer(CPU, VIEWS).deliver(batch(k) for k in range(6))
    kept = next(batches).images
    places = {next(batches).images.data_ptr() for _ in range(4)}
    assert torch.equal(kept, VIEWS.normalise(pixels(0)))
    assert kept.data_ptr() not in places
    assert len(places) <= 2


def test_cached_features_are_not_normalised() -> None:
    features = torch.rand(4, 7)
    (found,) = Transfer(CPU, VIEWS).deliver([batch(0, features)])
    assert found.images is features


def test_another_device_receives_float32() -> None:
    (found,) = Transfer(META, VIEWS).deliver([batch(0)])
    assert found.images.device == META
    assert found.images.dtype == torch.float32
    assert found.labels.device == META
