"""Muon against literal code in float64, the singular value decomposition and torch's own."""

import json
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from launchers.local import spawn
from pipeline.models import build_model
from pipeline.models.backbone.adapt import adapt
from pipeline.models.backbone.config import BackboneConfig
from pipeline.train.config import OptimConfig
from pipeline.train.muon import Muon, orthogonalise, product_flops
from pipeline.train.optim import make_optimizer, moments_of, parameter_groups


def test_an_update_has_the_directions_of_the_nearest_orthogonal_matrix_and_the_size_of_adamws() -> None:
    """Singular values lie between 0.68 and 1.13 where the given ones are above a hundredth of the norm, at any shape."""
    for shape in ((5, 5), (48, 12), (12, 48), (32, 3, 3, 3), (64, 7, 1), (170, 18, 3, 3), (250, 170)):
        torch.manual_seed(0)
        given = torch.randn(shape)
        update = given.clone()
        orthogonalise([update])
        rows, columns = update.flatten(1).shape
        size = 0.2 * max(rows, columns) ** 0.5
        left, singular, right = torch.linalg.svd(given.flatten(1).double(), full_matrices=False)
        kept = singular > 0.01 * given.norm()
        found = (left.T @ update.flatten(1).double() @ right.T) / size
        assert ((found.diagonal()[kept] > 0.67) & (found.diagonal()[kept] < 1.14)).all(), shape
        torch.testing.assert_close(found, torch.diag(found.diagonal()), rtol=0, atol=2e-5, msg=str(shape))


@pytest.mark.parametrize(("rank", "spread", "most"), [
    (1, 0.0, 2e-2), (5, 0.0, 2e-3), (5, 3.0, 1e-2), (60, 3.0, 1e-3), (256, 0.0, 1e-3), (256, 4.0, 1e-3)
])  # fmt: skip
def test_a_wide_matrix_is_iterated_by_its_square_as_in_float64(rank: int, spread: float, most: float) -> None:
    """Gradients of any rank, whose directions differ by up to 10^spread; the oracle is the iteration itself."""
    torch.manual_seed(0)
    scales = 10.0 ** -torch.linspace(0, spread, rank, dtype=torch.float64)
    given = (torch.randn(256, rank).double() * scales) @ torch.randn(rank, 1152).double()
    want = given / given.norm()
    for _ in range(5):
        square = want @ want.T
        want = 3.4445 * want + (-4.7750 * square + 2.0315 * square @ square) @ want
    want = 0.2 * 1152**0.5 * want
    for shape in ((256, 1152), (256, 128, 3, 3)):
        update = given.float().view(shape)
        orthogonalise([update])
        assert (update.flatten(1).double() - want).norm() < most * want.norm()
    tall = given.float().T.contiguous()
    orthogonalise([tall])
    assert (tall.T.double() - want).norm() < most * want.norm()


def test_matrices_of_one_shape_are_computed_together_and_zeros_stay_zeros() -> None:
    torch.manual_seed(0)
    given = [torch.randn(8, 20), torch.zeros(8, 20), torch.randn(20, 8), torch.randn(6, 4)]
    together = [matrix.clone() for matrix in given]
    orthogonalise(together)
    for matrix, want in zip(given, together, strict=True):
        alone = matrix.clone()
        orthogonalise([alone])
        torch.testing.assert_close(want, alone, rtol=1e-5, atol=1e-6)
    assert not together[1].any()


@pytest.mark.parametrize("shape", [(48, 192), (192, 48), (32, 16, 3, 3), (1, 5), (200, 300)])
def test_flops_are_those_that_torch_counts(shape: tuple[int, ...]) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalise([torch.randn(shape)])
    assert counter.get_total_flops() == product_flops(torch.Size(shape))


def test_steps_are_the_literal_ones_and_torchs() -> None:
    """In float64 to 1e-5; torch's Muon computes its products in bf16, and its first update differs by less than 2 %."""
    torch.manual_seed(0)
    model = build_model("vim_nano", num_classes=3, depth=1)
    optim = OptimConfig(kind="muon", lr=0.02, weight_decay=0.1)
    solver = make_optimizer(model, optim)
    named = dict(model.named_parameters())
    weight, bias = named["layers.0.mixer.in_proj.weight"], named["norm_f.weight"]
    group = next(g for g in solver.param_groups if any(p is weight for p in g["params"]))
    assert "layers.0.mixer.in_proj.weight" in group["names"]
    want, momentum = weight.detach().double(), torch.zeros(weight.shape, dtype=torch.float64)
    peer = nn.Parameter(weight.detach().clone())
    torchs = torch.optim.Muon(
        [peer], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    adam = nn.Parameter(bias.detach().clone())
    others = torch.optim.AdamW([adam], lr=0.02, weight_decay=0.0)
    for step in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        assert weight.grad is not None
        assert bias.grad is not None
        g, before = weight.grad.double(), weight.detach().clone()
        peer.grad, adam.grad = weight.grad.clone(), bias.grad.clone()
        solver.step()
        torchs.step()
        others.step()
        momentum = 0.9 * momentum + 0.1 * g
        x = 0.9 * momentum + 0.1 * g
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm()
        for _ in range(5):
            x = 3.4445 * x + (-4.7750 * (x @ x.T) + 2.0315 * (x @ x.T) @ (x @ x.T)) @ x
        x = 0.2 * max(x.shape) ** 0.5 * (x.T if tall else x)
        want = want - 0.02 * (0.1 * want + x)
        torch.testing.assert_close(weight.detach().double(), want, rtol=1e-5, atol=1e-5)
        if step == 0:
            moved, of_torch = weight.detach() - before, peer.detach() - before
            assert (moved - of_torch).norm() < 0.02 * moved.norm()
        torch.testing.assert_close(bias.detach(), adam.detach(), rtol=0, atol=0)
    kept = moments_of(model, solver)
    assert kept["layers.0.mixer.in_proj.weight"] == ("exp_avg",)
    assert kept["norm_f.weight"] == ("exp_avg", "exp_avg_sq")
    assert all(sorted(set(solver.state[p]) - {"step"}) == sorted(kept[name]) for name, p in named.items())


MATRICES = {
    "vim_nano": (
        "patch_embed.proj.weight",
        *(f"layers.0.mixer.{n}.weight" for n in ("in_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b", "out_proj")),
    ),
    "efficientvim_nano": (
        *(f"patch_embed.conv.{k}.conv.weight" for k in range(4)),
        *(f"stages.2.blocks.0.mixer.{n}.conv.weight" for n in ("BCdt_proj", "hz_proj", "out_proj")),
        *(f"stages.2.blocks.0.ffn.{n}.conv.weight" for n in ("fc1", "fc2")),
    ),
    "wrn_28_2": ("stem.weight",),
}


@pytest.mark.parametrize("name", MATRICES)
def test_layers_that_mix_their_inputs_are_orthogonalised_and_nothing_else(name: str) -> None:
    """Not the classifier, tokens, A, gates, vectors and depthwise kernels, which mix no channels."""
    model = build_model(name, num_classes=10)
    found = {n for group in parameter_groups(model, OptimConfig(kind="muon", lr=1e-3)) for n in group["names"]}
    assert set(MATRICES[name]) <= found
    kept = {n.rpartition(".")[2] for n in found}
    assert kept == {"weight"}
    assert not any(n.startswith(("head", "heads")) or ".dw" in n or "conv1d" in n or "alpha" in n for n in found)
    shapes = {n: p.shape for n, p in model.named_parameters()}
    assert all(shapes[n][1] > 1 for n in found)
    if name == "efficientvim_nano":
        assert len(found) == 32
    assert not any(group["names"] for group in parameter_groups(model, OptimConfig(lr=1e-3)))


def test_updates_of_lora_are_matrices_and_frozen_weights_are_none() -> None:
    model = adapt(build_model("timm/vit_tiny_patch16_224", num_classes=3), BackboneConfig(train="lora"), (224, 224))
    found = {n for group in parameter_groups(model, OptimConfig(kind="muon", lr=1e-3)) for n in group["names"]}
    assert found
    assert all(n.endswith(("lora_a", "lora_b")) for n in found)


def test_hooks_are_called_once_a_step() -> None:
    """An AdamW that was made before has hooked its class; clipping twice would shrink the gradients twice."""
    weight, bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    torch.optim.AdamW([nn.Parameter(torch.ones(2))])
    groups = [
        {"params": [weight], "weight_decay": 0.0, "names": ("w",)},
        {"params": [bias], "weight_decay": 0.0, "names": ()},
    ]
    solver, calls = Muon(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-8), [0]
    solver.register_step_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    for p in (weight, bias):
        p.grad = torch.ones_like(p)
    solver.step()
    assert calls == [1]
    assert (weight != 1).any()
    torch.testing.assert_close(bias.detach(), torch.full((4,), 0.9))


def test_four_ranks_step_as_one_at_every_zero_stage_though_one_owns_nothing_of_a_matrix(capfd) -> None:
    command = [sys.executable, "-m", "tests.unit.train.muon_ranks"]
    found = []
    for world in (1, 4):
        assert spawn(command, world) == 0
        found.append([json.loads(line) for line in capfd.readouterr().out.splitlines() if line.startswith("{")])
    alone, four = found
    assert len(alone) == len(four) == 5
    assert [run["a_rank_without"] for run in four] == [False, True, True, True, True]
    for run in [*alone, *four]:
        for name, value in run["weights"].items():
            torch.testing.assert_close(
                torch.tensor(value), torch.tensor(alone[0]["weights"][name]), rtol=1e-5, atol=1e-6
            )
