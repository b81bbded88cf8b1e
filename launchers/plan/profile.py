"""A stage that has not started yet, measured: its parameters and FLOPs on the meta device, its activations on the CPU.

For the activations one and two images pass through the model on the CPU, and the bytes that autograd keeps for the
backward pass are counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from launchers.plan.cost import BF16, FP32, Parameter
from launchers.plan.step_time import Passes, Work
from pipeline.models import build_from_config
from pipeline.models.arm import ARM
from pipeline.models.backbone.adapt import adapt
from pipeline.models.flops import ScanSize, forward_cost
from pipeline.ssl.inference_copy import rounded_by_autocast
from pipeline.train.muon import product_flops
from pipeline.train.optim import parameter_groups
from stages import spec_of
from stages.check import NONE_PENDING, Pending, parent_models
from stages.configs.base import StageConfig
from stages.spec import Network, Workload


@dataclass(frozen=True)
class Profile:
    """The numbers of a stage that a plan is computed from.

    A batch of b images keeps `fixed_activations` + b x `image_activations` bytes for the backward pass.

    Attributes:
        workload: The networks of a step.
        parameters: The trained parameters, with the optimizer's groups.
        frozen_parameters: Number of parameters of all frozen networks, and of the student's that do not train.
        work: What a step computes per sample of the first stream.
        fixed_activations: Bytes of activations that do not depend on the batch.
        image_activations: Bytes of activations per image.
    """

    workload: Workload
    parameters: tuple[Parameter, ...]
    frozen_parameters: int
    work: Work
    fixed_activations: int
    image_activations: int


def profile(config: StageConfig, num_classes: int, pending: Pending = NONE_PENDING) -> Profile:
    """Measure a stage.

    Args:
        config: The stage's config.
        num_classes: Classes of the training manifest.
        pending: The exports that earlier stages of the chain will write, with those stages' configs.

    Raises:
        HandoverError: A parent that decides the model neither exists nor is pending.
    """
    workload, built = networks(config, num_classes, pending)
    student, image_size = workload.student, workload.student.model.image_size
    trained = build(student).train()
    if config.engine.activation_checkpointing:
        trained.set_grad_checkpointing(True)  # type: ignore[operator]
    bf16 = config.engine.precision == "bf16"
    # A batch norm over a map of one pixel needs two images.
    two, three = (activation_bytes(trained, batch, image_size, bf16) for batch in (2, 3))
    return Profile(
        workload=workload,
        parameters=trained_parameters(built[student.name], config),
        frozen_parameters=sum(p.numel() for network in workload.frozen for p in built[network.name].parameters())
        + sum(p.numel() for p in built[student.name].parameters() if not p.requires_grad),
        work=work(config, workload, built, workload.images * (three - two)),
        fixed_activations=max(0, 3 * two - 2 * three),
        image_activations=three - two,
    )


def networks(
    config: StageConfig, num_classes: int, pending: Pending = NONE_PENDING
) -> tuple[Workload, dict[str, nn.Module]]:
    """Return the workload of a stage, and its trained and frozen networks by name, on the meta device.

    The arguments and errors are those of `profile`.
    """
    workload = spec_of(config).workload(config, num_classes, parent_models(config, num_classes, pending))
    with torch.device("meta"):
        return workload, {network.name: build(network) for network in (workload.student, *workload.frozen)}


def work(config: StageConfig, workload: Workload, built: Mapping[str, nn.Module], kept: float) -> Work:
    """Count what a step of a stage computes.

    Args:
        config: The stage's config.
        workload: Its networks.
        built: The student and the frozen networks, by name.
        kept: Bytes of activations per sample of the first stream that the backward pass needs.
    """
    costs = {
        network.name: forward_cost(built[network.name], network.model.image_size)
        for network in workload.networks
        if network.name in built
    }
    student = workload.student
    products, scans = 0.0, dict[ScanSize, Passes]()
    for network in () if student.backbone.cached_views else workload.networks:
        cost = costs.get(network.name, costs[student.name])  # an average has the student's architecture
        trains = network.backbone.passes > 1
        twice = network.trained_images * (config.engine.activation_checkpointing and trains)
        backward = float(network.trained_images * trains)
        forward = float(network.trained_images + network.inferred_images + twice)
        products += cost.products * (forward + network.trained_images * (network.backbone.passes - 1))
        for size, number in cost.scans.items():
            before = scans.get(size, Passes(0.0, 0.0))
            scans[size] = Passes(before.forward + number * forward, before.backward + number * backward)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in built[student.name].modules())
    flops = workload.flops(lambda network: costs[network.name].flops)
    return Work(flops, products or float(flops), scans, kept, norms if config.engine.sync_batch_norm else 0)


def build(network: Network) -> nn.Module:
    """Build a network of a workload, with fresh weights."""
    if network.decoder is not None:
        return ARM(network.model, network.decoder)  # type: ignore[arg-type] # a decoder belongs to a Vision Mamba
    return adapt(build_from_config(network.model), network.backbone, network.model.image_size)


def trained_parameters(model: nn.Module, config: StageConfig) -> tuple[Parameter, ...]:
    """Return the parameters that a stage trains, in the order of the model, with the optimizer's groups."""
    groups = parameter_groups(model, config.optim)  # type: ignore[arg-type]
    group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    halves = rounded_by_autocast(model) if config.engine.precision == "bf16" else ()
    trained = []
    for name, p in named:
        at = group_of[id(p)]
        plain = Parameter(name, p.numel(), at, BF16 if name in halves else FP32, groups[at]["moments"])
        trained.append(replace(plain, update_flops=product_flops(p.shape)) if plain.is_orthogonalised else plain)
    return tuple(trained)


def activation_bytes(model: nn.Module, batch: int, image_size: tuple[int, int], bf16: bool) -> int:
    """Count what one forward pass on the CPU keeps for the backward pass, without the weights; each storage counts once.

    Args:
        model: The model, in training mode.
        batch: Number of images.
        image_size: (height, width) in pixels.
        bf16: Whether to compute under autocast to bfloat16.

    Returns:
        Bytes.
    """
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
        output = model(images)
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
