"""The model of a stage that has not been started: its parameters and FLOPs on the meta device, its activations from a probe.

The probe runs one and two images on the CPU and counts the bytes that autograd keeps for the backward pass.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from launchers.plan.cost import Parameter
from pipeline.exports.card import Card
from pipeline.models import build_from_config
from pipeline.models.arm import ARM
from pipeline.models.config import TIMM_PREFIX, FamilyConfig, TimmConfig
from pipeline.models.flops import TRAINING, forward_flops
from pipeline.train.optim import parameter_groups
from stages.configs import ArmConfig, DistillConfig, SemiConfig, StageConfig
from stages.semi import student_of


@dataclass(frozen=True)
class Profile:
    """`flops` of a step per sample of the first stream, backward included; `images` of all streams that one such sample
    brings; activations of a batch of b images: `fixed_activations` + b x `image_activations` bytes."""

    shape: FamilyConfig
    parameters: tuple[Parameter, ...]
    frozen_teacher: int
    flops: int
    images: int
    fixed_activations: int
    image_activations: int


def profile(config: StageConfig, num_classes: int, pending: Mapping[Path, StageConfig]) -> Profile:
    """`pending`: exports that earlier stages of the chain will write, and those stages' configs."""
    shape = model_of(config, num_classes, pending)
    with torch.device("meta"):
        model, teacher = _build(config, shape), _frozen_teacher(config, shape, pending)
    forward = forward_flops(model, shape.image_size)
    unlabelled = config.unlabelled_ratio if isinstance(config, SemiConfig) and config.pseudo.weight else 0
    images = 1 + unlabelled
    flops = (TRAINING * images + unlabelled) * forward  # the teacher sees the unlabelled
    if teacher is not None:
        flops += forward_flops(teacher, shape.image_size)
    probe = _build(config, shape).train()
    if config.engine.activation_checkpointing:
        probe.set_grad_checkpointing(True)  # type: ignore[operator]
    bf16 = config.engine.precision == "bf16"
    one, two = (activation_bytes(probe, batch, shape.image_size, bf16) for batch in (1, 2))
    return Profile(
        shape=shape,
        parameters=_parameters(model, config),
        frozen_teacher=sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0,
        flops=flops,
        images=images,
        fixed_activations=max(0, 2 * one - two),
        image_activations=two - one,
    )


def model_of(config: StageConfig, num_classes: int, pending: Mapping[Path, StageConfig]) -> FamilyConfig:
    """The config of the model that a stage trains, from its own config or its parent's card."""
    if isinstance(config, ArmConfig):
        return config.model
    if isinstance(config, DistillConfig):
        return config.model.model_copy(update={"num_classes": num_classes})
    assert isinstance(config, SemiConfig)
    return student_of(_shape_at(config.parents()["init_from"], num_classes, pending), config)


def _shape_at(folder: Path, num_classes: int, pending: Mapping[Path, StageConfig]) -> FamilyConfig:
    if folder in pending:
        return model_of(pending[folder], num_classes, pending)
    return Card.read(folder).model


def _build(config: StageConfig, shape: FamilyConfig) -> nn.Module:
    if isinstance(config, ArmConfig):
        return ARM(config.model, config.decoder)
    return build_from_config(shape)


def _frozen_teacher(config: StageConfig, shape: FamilyConfig, pending: Mapping[Path, StageConfig]) -> nn.Module | None:
    if not isinstance(config, DistillConfig) or config.teacher is None:
        return None
    classes: Any = getattr(shape, "num_classes", 0)
    if config.teacher.timm is not None:
        name = TIMM_PREFIX + config.teacher.timm
        return build_from_config(TimmConfig(name=name, num_classes=classes, image_size=shape.image_size))
    return build_from_config(_shape_at(config.parents()["teacher"], classes, pending))


def _parameters(model: nn.Module, config: StageConfig) -> tuple[Parameter, ...]:
    groups = parameter_groups(model, config.optim)  # type: ignore[arg-type]
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return tuple(Parameter(name, p.numel(), group_of[id(p)]) for name, p in named)


def activation_bytes(model: nn.Module, batch: int, image_size: tuple[int, int], bf16: bool) -> int:
    """What one forward pass on the CPU keeps for the backward pass, without the weights; each storage counts once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor
        return tensor

    images = torch.zeros(batch, 3, *image_size)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16),
    ):
        answer = model(images)
    del answer
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
