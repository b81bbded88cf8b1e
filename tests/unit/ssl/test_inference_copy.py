"""ZeRO-3 gathers each parameter with exactly one block, and every family then computes what the whole model computes."""

import copy
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.models import build_model
from pipeline.ssl.inference_copy import InferenceCopy, blocks_of, rounded_by_autocast
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import Engine
from tests.ranks import run_ranks

VIT = {"image_size": 32, "options": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}}
ARM_FORM = {"norm": "layer", "expand": 1, "mlp": "swiglu", "directions": 4, "pool": "mean", "pos_embed": "sincos"}
VSSD = {"image_size": 32, "width": 8, "depths": (1, 2, 1, 1), "heads": (1, 1, 2, 2), "states": 4}
# name -> its model, the fields that make it small, and its least number of blocks.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vim": ("vim_nano", {"depth": 2}, 2),
    "arm": ("vim_nano", {"depth": 2, **ARM_FORM}, 2),
    "efficientvim": ("efficientvim_nano", {}, 3),
    "vssd": ("vssd_micro", VSSD, 5),
    "vit": ("timm/vit_tiny_patch16_224", VIT, 2),
    "resnet": ("timm/resnet10t", {"image_size": 32}, 4),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_in_exactly_one_block(family: str) -> None:
    name, more, count = FAMILIES[family]
    with torch.device("meta"):
        model: nn.Module = build_model(name, num_classes=3, **more)
    found = [name for _, parameters in blocks_of(model) for name in parameters]
    assert sorted(found) == sorted(name for name, _ in model.named_parameters())
    *whole, (last, _) = blocks_of(model)
    assert last is model
    assert len(whole) >= count
    assert max(len(parameters) for _, parameters in whole) < len(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_travels_in_bf16_is_what_autocast_rounds_bit_for_bit(family: str) -> None:
    name, more, _ = FAMILIES[family]
    torch.manual_seed(0)
    model = build_model(name, num_classes=3, **more).eval()
    rounded, names = copy.deepcopy(model), rounded_by_autocast(model)
    for parameter_name, parameter in rounded.named_parameters():
        if parameter_name in names:
            parameter.data = parameter.data.bfloat16().float()
    images = torch.randn(2, 3, *model.image_size)  # type: ignore[misc]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got, want = rounded(images), model(images)
    assert torch.equal(got, want)
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    assert sum(sizes[n] for n in names) > 0.6 * sum(sizes.values())


def refresh_rounded(rank: int, port: int, folder: str) -> None:
    """Save an average, and its inference copy refreshed for a step under autocast and for an evaluation."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = distributed.start(60.0)
    model = build_model("vim_nano", num_classes=3, depth=1)
    config = EngineConfig(zero_stage=2, precision="bf16")
    engine = Engine(model, world, optim=OptimConfig(lr=1e-3), config=config, micro_batch=1, accumulation=1)
    tensors = {master: 1.1 * master.detach() + 0.01 for master in engine.masters}
    inference = InferenceCopy(engine, copy.deepcopy(model), tensors, average_buffers=False)
    found = {}
    for name, autocast in (("step", True), ("evaluation", False)):
        inference.refresh(autocast=autocast)
        found[name] = {n: p.detach().clone() for n, p in inference.module.named_parameters()}
    torch.save(found | {"whole": inference.full_weights()}, Path(folder) / f"{rank}.pt")
    engine.close()
    distributed.stop()


def test_a_step_receives_matrices_in_bf16_and_an_evaluation_everything_in_fp32(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(refresh_rounded, port, str(tmp_path))
    matrices = rounded_by_autocast(build_model("vim_nano", num_classes=3, depth=1))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for name, whole in found["whole"].items():
            if name not in found["step"]:
                continue
            assert torch.equal(found["evaluation"][name], whole), name
            sent = whole.bfloat16().float() if name in matrices else whole
            assert torch.equal(found["step"][name], sent), name
            assert name not in matrices or not torch.equal(sent, whole)


def compute_in_blocks(rank: int, port: int, folder: str) -> None:
    """Save the outputs of every family's inference copy under ZeRO-3, with every weight cut, and those of the whole model."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    world = distributed.start(60.0)
    found = {}
    for family, (name, more, _) in FAMILIES.items():
        torch.manual_seed(0)
        model = build_model(name, num_classes=3, **more)
        whole = copy.deepcopy(model).eval()
        config = EngineConfig(zero_stage=3, keep_whole=0, bucket_bytes=2**20)
        engine = Engine(model, world, optim=OptimConfig(lr=1e-3), config=config, micro_batch=1, accumulation=1)
        tensors = {master: 1.1 * master.detach() + 0.01 for master in engine.masters}  # what an average might be
        inference = InferenceCopy(engine, copy.deepcopy(whole), tensors, average_buffers=False)
        whole.load_state_dict(inference.full_weights())
        trained = {n for n, _ in engine.named_parameters}
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))  # ranks see other images
        with torch.no_grad():
            for _ in range(2):
                got, want = inference.module(images), whole(images)
                assert all(p.numel() == 0 for n, p in inference.module.named_parameters() if n in trained)
        found[family] = (got, want)
        engine.close()
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.stop()


def test_two_processes_gather_every_family_block_by_block(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_ranks(compute_in_blocks, port, str(tmp_path))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert list(found) == list(FAMILIES)
        for family, (got, want) in found.items():
            assert want.abs().max() > 1e-3, family
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=lambda m, f=family: f"{f}: {m}")
