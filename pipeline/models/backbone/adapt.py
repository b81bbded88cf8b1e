"""Let a part of a model train and keep the rest as it is, bit for bit: weights, running statistics, mode."""

import copy
import logging
from collections.abc import Collection
from types import MethodType
from typing import Any

from torch import nn

from pipeline.errors import ConfigError
from pipeline.models.backbone.config import BackboneConfig
from pipeline.models.backbone.lora import UPDATES, add_lora

logger = logging.getLogger(__name__)


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the names of a model's classifier."""
    fresh: tuple[str, ...] = model.fresh()  # type: ignore[operator]
    return tuple(prefix for prefix in fresh if not prefix.endswith("fc_norm."))


def adapt(
    model: nn.Module, config: BackboneConfig, image_size: tuple[int, int], new: Collection[str] = ()
) -> nn.Module:
    """Let only that part of a model train which the config names, in place.

    Args:
        model: The model, with the weights that it starts from.
        config: What trains.
        image_size: Height and width of the images, in pixels.
        new: Names of the weights that neither a file nor a parent gave; they train too.

    Returns:
        The same model.

    Raises:
        ConfigError: The model has no classifier, or no layer that can be updated, or cached features would change.
    """
    if config.train == "whole":
        return model
    heads = heads_of(model)
    if not any(name.startswith(heads) for name, _ in model.named_parameters()):
        raise ConfigError("backbone.train: this model names no classifier that could train; set backbone.train=whole")
    others = [name for name in new if not name.startswith(heads) and name in dict(model.named_parameters())]
    if others and config.cached_views:
        raise ConfigError(
            f"backbone.cached_views needs a backbone that is loaded whole, but {others[0]} is new and would train; set"
            " cached_views=0, or choose model.options so that the file has it"
        )
    if config.lora:
        add_lora(model, config.lora, heads, image_size)
    for name, parameter in model.named_parameters():
        trains = name.startswith(heads) or name in others or name.rpartition(".")[2] in UPDATES
        parameter.requires_grad_(trains)
    _hold(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info("backbone.train=%s: %.3f M of %.3f M weights train", config.train, trained / 1e6, total / 1e6)
    return model


def copy_of(model: nn.Module, *, share: bool) -> nn.Module:
    """Copy a model for an average of what trains.

    Args:
        model: The model.
        share: Whether the copy uses the very tensors of the frozen weights. ZeRO-3 cuts those of the model, so there it
            needs its own.
    """
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen if share else {})


def _hold(module: nn.Module) -> None:
    """Keep modules without a trained weight in eval mode: no drop path, and running statistics that stay."""
    parameters = list(module.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        module.eval()
        module.train = MethodType(_stay, module)  # type: ignore[method-assign] # copied with the module
        return
    for child in module.children():
        _hold(child)


def _stay(module: nn.Module, mode: bool = True) -> Any:
    """Take the place of `nn.Module.train` in a module that stays in eval mode."""
    return module
