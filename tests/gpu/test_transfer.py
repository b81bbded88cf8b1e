"""On a GPU pixels travel from pinned memory on a stream of their own; skipped without a GPU."""

from dataclasses import replace

import pytest
import torch

from pipeline.streaming.transfer import Transfer
from tests.gpu import waits
from tests.unit.streaming.test_transfer import VIEWS, batch, pixels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_images_are_those_of_a_cpu_and_channels_last():
    for k, found in enumerate(Transfer(torch.device("cuda"), VIEWS).deliver(batch(k) for k in range(20))):
        assert found.images.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.images.cpu(), VIEWS.normalise(pixels(k)), rtol=1e-6, atol=1e-6)
        assert found.labels.tolist() == [k] * 4


def test_pinned_memory_is_not_reused_before_its_copy_has_ended():
    """The GPU is kept busy on the copying stream, so copies queue up while the host writes the next batches."""
    device = torch.device("cuda")
    transfer = Transfer(device, VIEWS, ahead=8)
    large = torch.empty(64, 3, 224, 224, dtype=torch.uint8)

    def batches():
        for k in range(24):
            with torch.cuda.stream(transfer._stream):
                torch.cuda._sleep(20_000_000)
            yield replace(batch(k), images=large.fill_(k), strong=None)

    for k, found in enumerate(transfer.deliver(batches())):
        expected = VIEWS.normalise(torch.full((1, 3, 1, 1), k, dtype=torch.uint8)).to(device)
        torch.testing.assert_close(found.images, expected.expand_as(found.images), rtol=1e-6, atol=1e-6)


def test_the_host_waits_for_no_copy():
    transfer = Transfer(torch.device("cuda"), VIEWS)
    with waits.forbidden():
        assert len(list(transfer.deliver(batch(k) for k in range(4)))) == 4
