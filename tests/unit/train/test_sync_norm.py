"""Batch norms over ranks: two processes with halves of a batch are one process with all of it."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.recompute import count_images_once
from pipeline.train.sync_norm import synchronise_batch_norms
from tests.ranks import run_ranks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 1, 1)).double()


def batch() -> Tensor:
    return torch.randn(6, 2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 100


def half(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = network()
    synchronise_batch_norms(model, torch.device("cpu"))
    x = batch()[:2] if rank == 0 else batch()[2:]  # unequal shares, and far from zero
    count_images_once(model)
    loss = checkpoint(model, x, use_reentrant=False).square().sum()  # computed twice, counted once
    loss.backward()
    gradients = [p.grad for p in model.parameters()]
    for g in gradients:
        dist.all_reduce(g)
    if rank == 0:
        torch.save({"gradients": gradients, "buffers": [b.clone() for b in model.buffers()]}, Path(folder) / "found.pt")
    dist.destroy_process_group()


def test_gradients_and_statistics_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    run_ranks(half, str(tmp_path))
    found = torch.load(tmp_path / "found.pt")
    model = network()
    model(batch()).square().sum().backward()
    for got, parameter in zip(found["gradients"], model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)  # statistics are taken in fp32
    for got, buffer in zip(found["buffers"], model.buffers(), strict=True):
        torch.testing.assert_close(got, buffer, rtol=1e-6, atol=1e-6)


def without_parts(rank: int, folder: str) -> None:
    """A norm without a weight, without a bias, and of vectors; the batch is the ranks' one after the other."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    whole = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    for options in ({"affine": False}, {"bias": False}, {"momentum": None}, {"track_running_stats": False}):
        expected, found = nn.BatchNorm1d(4, **options), nn.BatchNorm1d(4, **options)
        for norm in (expected, found):
            if norm.weight is not None:
                nn.init.constant_(norm.weight, 5.0)
        synchronise_batch_norms(nn.Sequential(found), torch.device("cpu"))
        part = slice(0, 3) if rank == 0 else slice(3, 7)
        x, own = whole.clone().requires_grad_(), whole[part].clone().requires_grad_()
        y, mine = expected(x), found(own)
        y.pow(3).sum().backward()
        mine.pow(3).sum().backward()
        torch.testing.assert_close(mine, y[part])
        torch.testing.assert_close(own.grad, x.grad[part], rtol=1e-4, atol=1e-4)  # type: ignore[index]
        for mean, other in zip(found.buffers(), expected.buffers(), strict=True):
            torch.testing.assert_close(mean, other)
    dist.destroy_process_group()


def test_norms_without_a_weight_a_bias_or_statistics(tmp_path: Path) -> None:
    """The ranks assert; what one of them raises, this raises."""
    run_ranks(without_parts, str(tmp_path))


def test_alone_nothing_changes() -> None:
    plain, synchronised = network(), network()
    synchronise_batch_norms(synchronised, torch.device("cpu"))
    assert torch.equal(plain(batch()), synchronised(batch()))
    assert list(plain.state_dict()) == list(synchronised.state_dict())


def test_on_a_gpu_they_are_torchs_own_under_the_same_names() -> None:
    plain, converted = network(), network()
    synchronise_batch_norms(converted, torch.device("cuda"))
    assert type(converted[1]) is nn.SyncBatchNorm
    assert list(plain.state_dict()) == list(converted.state_dict())
    assert torch.equal(plain.eval()(batch()), converted.eval()(batch()))
