"""Parameter groups: what decays, and how fast each layer learns."""

from collections import defaultdict
from typing import Any

from torch import nn

from pipeline.train.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups with `weight_decay` and `lr_scale` = layer_decay^(layers above), in a fixed order.

    Vectors (biases, norms, D) never decay, nor what the model's `no_weight_decay()` names. `layer_of(name)` of the
    model counts layers from 0 at the input.
    """
    exempt = model.no_weight_decay()  # type: ignore[operator]
    layer_of = model.layer_of  # type: ignore[operator]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    top = max(layer_of(name) for name, _ in named)  # type: ignore[operator]
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in named:
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else config.weight_decay
        groups[decay, config.layer_decay ** (top - layer_of(name))].append(parameter)  # type: ignore[operator]
    return [{"params": params, "weight_decay": decay, "lr_scale": scale} for (decay, scale), params in sorted(groups.items(), key=lambda g: g[0])]
