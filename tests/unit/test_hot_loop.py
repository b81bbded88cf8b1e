"""What runs at every step and is ours never waits for the device: nothing is read from it, nothing is copied to it from the host.

The meta device has no numbers, so reading one raises; a dispatch mode refuses copies between devices.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.losses import distillation_loss, one_hot, soft_cross_entropy
from pipeline.ssl.config import PseudoLabelRule
from pipeline.ssl.pseudo_labels import PseudoLabeller
from pipeline.streaming.mixup import mix_at_random, mix_by_confidence
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import deepspeed_config

META = torch.device("meta")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")


class Waited(AssertionError):
    pass


class NoWaiting(TorchDispatchMode):
    """Raises Waited where a GPU would have to be waited for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.removeprefix("aten::")
        devices = {t.device.type for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        if name == "_to_copy" and kwargs.get("device"):
            devices.add(torch.device(kwargs["device"]).type)
        if name in WAITS or (name in ("_to_copy", "copy_") and len(devices) > 1):
            raise Waited(name)
        if name == "_sample_dirichlet" and devices == {
            "meta"
        }:  # torch has no kernel of it for meta tensors; CUDA's waits for nothing
            return torch.empty_like(args[0])
        return function(*args, **kwargs)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixing_and_losses_wait_for_nothing(mixup: float, cutmix: float) -> None:
    with NoWaiting():
        truth = one_hot(torch.empty(6, dtype=torch.long, device=META), 5)
        partner = torch.arange(6, device=META).flip(0)
        images = torch.empty(6, 3, 8, 8, device=META)
        mixed, targets = mix_at_random(images, truth, partner, mixup=mixup, cutmix=cutmix)
        mix_by_confidence(mixed, targets, torch.empty(6, device=META), partner, 0.5)
        logits = torch.empty(6, 5, device=META)
        soft_cross_entropy(logits, targets, 0.1).mean()
        distillation_loss(logits, logits, kind="soft", temperature=2.0)


@pytest.mark.parametrize("thresholds", ["fixed", "class_balanced", "freematch", "softmatch"])
@pytest.mark.parametrize("alignment", ["none", "labelled"])
def test_pseudo_labels_wait_for_nothing(thresholds: str, alignment: str) -> None:
    rule = PseudoLabelRule.model_validate({"thresholds": thresholds, "alignment": alignment})
    labeller = PseudoLabeller(torch.full((5,), 0.2, dtype=torch.float64, device=META), rule)
    with NoWaiting():
        labeller.label(torch.empty(6, 5, device=META))
        labeller.update()
        labeller.class_entropy()


def test_the_mode_sees_what_waits() -> None:
    for wait in (lambda: torch.ones(1).item(), lambda: torch.ones(2).to(META), lambda: torch.ones(2).nonzero()):
        with NoWaiting(), pytest.raises(Waited):
            wait()


def test_deepspeed_times_no_step() -> None:
    config = deepspeed_config(OptimConfig(lr=1e-3), EngineConfig(), 2, 1)
    assert config["timers"]["throughput"]["enabled"] is False
