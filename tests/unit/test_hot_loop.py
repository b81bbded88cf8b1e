"""What runs at every step never waits for the device: no number is read from it, nothing is copied to it from the host.

The mode NoWaiting fails a test: it raises an AssertionError in the operator that would wait.
"""

import pytest
import torch
from torch import nn

from pipeline.models.losses import distillation_loss, one_hot, soft_cross_entropy
from pipeline.ssl.config import PseudoLabelRule
from pipeline.ssl.pseudo_labels import PseudoLabeller
from pipeline.streaming.mixup import mix_at_random, mix_by_confidence
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.deepspeed_config import deepspeed_config
from pipeline.train.distributed import World, any_rank
from pipeline.train.muon import Muon
from tests.steps import NAMES, steps_of
from tests.waits import META, NoWaiting, Waited


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing_and_losses_wait_for_nothing(mixup: float, cutmix: float) -> None:
    with NoWaiting():
        truth = one_hot(torch.empty(6, dtype=torch.long, device=META), 5)
        partner = torch.arange(6, device=META).flip(0)
        images = torch.empty(6, 3, 8, 8, device=META)
        mixed, targets = mix_at_random(images, truth, partner, mixup=mixup, cutmix=cutmix)
        mix_by_confidence(mixed, targets, torch.empty(6, device=META), partner, 0.5)
        logits = torch.empty(6, 5, device=META)
        losses = (
            soft_cross_entropy(logits, targets, 0.1),
            distillation_loss(logits, logits, kind="soft", temperature=2.0),
        )
    assert [loss.shape for loss in losses] == [(6,), ()]
    assert (mixed.shape, targets.shape) == (images.shape, truth.shape)


@pytest.mark.parametrize("thresholds", ["fixed", "class_balanced", "freematch", "softmatch"])
@pytest.mark.parametrize("alignment", ["none", "labelled"])
def test_pseudo_labels_wait_for_nothing(thresholds: str, alignment: str) -> None:
    rule = PseudoLabelRule.model_validate({"thresholds": thresholds, "alignment": alignment})
    labeller = PseudoLabeller(torch.full((5,), 0.2, dtype=torch.float64, device=META), rule)
    with NoWaiting():
        labels = labeller.label(torch.empty(6, 5, device=META))
        labeller.update()
        entropy = labeller.class_entropy()
    assert {tensor.device.type for tensor in (*labels, entropy)} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_step_waits_for_nothing(name: str) -> None:
    """Forward, backward, clipping, update, teacher, metrics and flight recorder: what `fit` does between two log lines."""
    steps = steps_of(name, META)
    with NoWaiting():
        for step in range(2):
            assert steps.take(step).moved


def test_muon_waits_for_nothing_with_a_rate_on_the_device() -> None:
    weights = [nn.Parameter(torch.empty(shape, device=META)) for shape in ((6, 4), (6, 4), (3, 4, 3, 3))]
    groups = [
        {"params": weights, "weight_decay": 0.1, "names": ("a", "b", "c")},
        {"params": [nn.Parameter(torch.empty(3, device=META))], "names": ()},
    ]
    solver = Muon(groups, lr=0.1, betas=(0.9, 0.999), eps=1e-8)
    groups[0]["lr"] = torch.empty((), device=META)
    with NoWaiting():
        for _ in range(2):
            for weight in weights:
                weight.grad = torch.empty_like(weight)
            solver.step()
    assert all(solver.state[weight]["exp_avg"].device == META for weight in weights)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long, device=META)),
        lambda x: x.__setitem__(x > 0, x[:1]),
        lambda x: torch.ones(3).to(META),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: x.cpu(),
        lambda x: torch.tensor([1.0], device=META),
        lambda x: torch.as_tensor(1.0, device=META),
        lambda x: x.new_tensor([1.0]),
    ],
)
def test_the_mode_sees_what_waits(wait) -> None:
    x = torch.ones(3, device=META)
    with NoWaiting(), pytest.raises(Waited):
        wait(x)


def test_the_mode_lets_pass_what_does_not_wait() -> None:
    x = torch.ones(3, device=META)
    with NoWaiting():
        x[:2] += x.new_zeros(2) * torch.tensor(2.0)
        found = torch.where(x > 0, x, 0.0)[torch.arange(2, device=META)].masked_fill(x[:2] > 0, 1.0)
        assert torch.tensor(1.0).item() == 1.0
    assert found.shape == (2,)


def test_a_vote_waits_for_nothing() -> None:
    """The process group has one process here; the rank of two on a GPU is its only voter."""
    distributed.start(60.0)
    with NoWaiting():
        assert any_rank(True, World(0, 2, META))
        assert not any_rank(False, World(0, 2, META))


def test_deepspeed_times_no_step() -> None:
    config = deepspeed_config(OptimConfig(lr=1e-3), EngineConfig(), 2, 1)
    assert config["timers"]["throughput"]["enabled"] is False
