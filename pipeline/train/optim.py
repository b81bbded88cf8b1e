"""The optimizer, and its parameter groups: which weights decay, how fast each layer learns, and which are stepped as matrices."""

import fnmatch
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from pipeline.errors import ConfigError
from pipeline.models.backbone.lora import UPDATES
from pipeline.train.config import OptimConfig
from pipeline.train.muon import Muon

# What each kind keeps of a weight beside the weight, by torch's names; a matrix of Muon needs no second moment.
MOMENTS = {
    "adamw": ("exp_avg", "exp_avg_sq"),
    "muon": ("exp_avg", "exp_avg_sq"),
    "matrix": ("exp_avg",),
    "sgd": ("momentum_buffer",),
}


class Trainable(Protocol):
    """What training asks of a model beside `forward`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter)."""

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield (name, module)."""

    def no_weight_decay(self) -> set[str]:
        """Return names of matrices that must not decay."""

    def layer_of(self, name: str) -> int:
        """Return the layer that a parameter belongs to, from 0 at the input."""


def parameter_groups(model: Trainable, config: OptimConfig) -> list[dict[str, Any]]:
    """Return groups in a fixed order, each with `weight_decay`, `lr_scale` = layer_decay^(layers above), `joins` and `moments`.

    `joins` is the optimizer step from which the group trains: unfreeze_every x (layers above). `moments` are the names of what
    the optimizer keeps of each weight; a group of Muon's matrices also has their `names`.
    Vectors (biases, norms, D) do not decay, nor does what the model's `no_weight_decay()` names, unless a pattern of
    `decay_also` fits the name.

    Raises:
        ConfigError: A pattern of `decay_also` fits no parameter that trains.
    """
    exempt = model.no_weight_decay()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for pattern in config.decay_also:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            some = ", ".join(sorted(exempt)[:3] or [name for name, _ in named[:3]])
            raise ConfigError(
                f"optim.decay_also: {pattern!r} fits no parameter that trains; their names are such as {some}; mend the pattern"
            )
    top = max(model.layer_of(name) for name, _ in named)
    heads = tuple(model.fresh()) if hasattr(model, "fresh") else ()  # ARM has no classifier
    matrices = set(_matrices(model)) if config.kind == "muon" else set()
    groups: dict[tuple[float, float, int, bool], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in named:
        named_to_decay = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.decay_also)
        spared = (parameter.ndim <= 1 or name in exempt) and not named_to_decay
        decay = 0.0 if spared else config.weight_decay
        above = top - model.layer_of(name)
        matrix = name in matrices and not (name in exempt or name.startswith(heads))
        groups[decay, config.layer_decay**above, (config.unfreeze_every or 0) * above, matrix].append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "weight_decay": decay,
            "lr_scale": scale,
            "joins": joins,
            "moments": MOMENTS["matrix" if matrix else config.kind],
            "names": tuple(name for name, _ in members) if matrix else (),
        }
        for (decay, scale, joins, matrix), members in sorted(groups.items(), key=lambda g: g[0])
    ]


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[str, ...]]:
    """Return trained parameter -> the names of what the optimizer keeps of it beside its step, before ZeRO cuts anything."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group["moments"] for group in optimizer.param_groups for p in group["params"]}


def _matrices(model: Trainable) -> Iterator[str]:
    """Name the weights of linear layers and convolutions, and LoRA's, whose outputs each read several inputs.

    A depthwise convolution mixes no channels, and a table of vectors (gates, tokens, A) is no matrix that maps anything.
    """
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            layer = isinstance(module, nn.Linear | _ConvNd) and name == "weight"
            if (layer or name in UPDATES) and weight.ndim > 1 and weight.shape[1] > 1:
                yield f"{prefix}.{name}" if prefix else name


def make_optimizer(model: Trainable, config: OptimConfig) -> torch.optim.Optimizer:
    """Make torch's optimizer of a model's trained parameters; its learning rate is set at every step.

    It is fused: one pass over the weights in place of fifteen, on a CPU too.
    """
    groups = parameter_groups(model, config)
    if config.kind == "muon":
        return Muon(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    options: dict[str, Any] = {"lr": config.lr, "fused": True}
    if config.kind == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **options)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, **options)
