"""Muon against literal code in float64, the singular value decomposition and torch's own."""

import torch
from torch import nn

from pipeline.models import build_model
from pipeline.train.config import OptimConfig
from pipeline.train.muon import Muon, orthogonalise
from pipeline.train.optim import make_optimizer, moments_of, parameter_groups


def test_an_update_has_the_directions_of_the_nearest_orthogonal_matrix_and_the_size_of_adamws() -> None:
    """Singular values lie between 0.68 and 1.13 where the given ones are above a hundredth of the norm, at any shape."""
    for shape in ((5, 5), (48, 12), (12, 48), (32, 3, 3, 3), (64, 7, 1)):
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


def test_hidden_matrices_are_orthogonalised_and_nothing_else() -> None:
    """Not the classifier, tokens, A, vectors and depthwise kernels, which mix no channels."""
    for name in ("vim_nano", "efficientvim_nano", "timm/resnet18", "wrn_28_2"):
        model = build_model(name, num_classes=10)
        config = OptimConfig(kind="muon", lr=1e-3)
        found = {n for group in parameter_groups(model, config) for n in group["names"]}
        heads = ("head.", "heads.", "model.fc.")
        for n, p in model.named_parameters():
            mixes = p.ndim > 1 and p.shape[1] > 1
            hidden = not n.startswith(heads) and not n.endswith(("_log", "_log_b", "pos_embed", "cls_token"))
            assert (n in found) == (mixes and hidden), (name, n, p.shape)
        usual = parameter_groups(model, OptimConfig(lr=1e-3))
        assert not any(group["names"] for group in usual)


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
