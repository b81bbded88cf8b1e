"""The optimizer, and its parameter groups: which weights decay, and how fast each layer learns."""

import fnmatch
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.train.config import OptimConfig


class Trainable(Protocol):
    """What training asks of a model beside `forward`."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter)."""

    def no_weight_decay(self) -> set[str]:
        """Return names of matrices that must not decay."""

    def layer_of(self, name: str) -> int:
        """Return the layer that a parameter belongs to, from 0 at the input."""


def parameter_groups(model: Trainable, config: OptimConfig) -> list[dict[str, Any]]:
    """Return groups in a fixed order, each with `weight_decay`, `lr_scale` = layer_decay^(layers above), and `joins`.

    `joins` is the optimizer step from which the group trains: unfreeze_every x (layers above).
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
    groups: dict[tuple[float, float, int], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        named_to_decay = any(fnmatch.fnmatchcase(name, pattern) for pattern in config.decay_also)
        spared = (parameter.ndim <= 1 or name in exempt) and not named_to_decay
        decay = 0.0 if spared else config.weight_decay
        above = top - model.layer_of(name)
        groups[decay, config.layer_decay**above, (config.unfreeze_every or 0) * above].append(parameter)
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scale, "joins": joins}
        for (decay, scale, joins), params in sorted(groups.items(), key=lambda g: g[0])
    ]


def make_optimizer(model: Trainable, config: OptimConfig) -> torch.optim.Optimizer:
    """Make torch's optimizer of a model's trained parameters; its learning rate is set at every step.

    It is fused: one pass over the weights in place of fifteen, on a CPU too.
    """
    groups = parameter_groups(model, config)
    options: dict[str, Any] = {"lr": config.lr, "fused": True}
    if config.kind == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.nesterov, **options)
    return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, **options)
