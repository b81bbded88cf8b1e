"""Low-rank updates of linear layers (LoRA, Hu et al. 2022), which leave every name of the model as it is.

A layer keeps `weight` and `bias` and gets `lora_a` (rank, in) and `lora_b` (out, rank). It computes
W x + b + alpha / rank B A x, with B = 0 at the start, so that the first output is that of the weights.

Deviation: the library peft wraps each layer, which renames its weights (`base_layer.weight`). Layer decay, checkpoints and
exports go by timm's names, so the layers stay what they are here. The numbers are equal: tests/unit/models/test_backbone.py
compares with the formula, and docs/backbones.md tells how to compare with peft.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.backbone.config import LoRAConfig
from pipeline.ops.linear import Linear, linear

UPDATES = ("lora_a", "lora_b")


class LoRALinear(Linear):
    """A linear layer with a low-rank update. A plain one becomes one by `of`, in place.

    Attributes:
        lora_a: A, (rank, in).
        lora_b: B, (out, rank).
        lora_scale: alpha / rank.
        lora_dropout: Share of the update's input that is dropped in training.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_scale: float
    lora_dropout: float

    @classmethod
    def of(cls, layer: nn.Linear, config: LoRAConfig) -> "LoRALinear":
        """Give a linear layer an update; its weight and bias keep their names and values."""
        layer.__class__ = cls
        updated = cast(LoRALinear, layer)
        updated.lora_a = nn.Parameter(torch.empty(config.rank, layer.in_features, device=layer.weight.device))
        updated.lora_b = nn.Parameter(torch.zeros(layer.out_features, config.rank, device=layer.weight.device))
        nn.init.kaiming_uniform_(updated.lora_a, a=math.sqrt(5))  # as LoRA's authors and peft draw it
        updated.lora_scale, updated.lora_dropout = config.alpha / config.rank, config.dropout
        return updated

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        inner = linear(F.dropout(input, self.lora_dropout, self.training), self.lora_a)
        return linear(input, self.weight, self.bias) + self.lora_scale * linear(inner, self.lora_b)


def add_lora(model: nn.Module, config: LoRAConfig, heads: tuple[str, ...], image_size: tuple[int, int]) -> list[str]:
    """Give the linear layers of a backbone low-rank updates, in place.

    Args:
        model: The model.
        config: The updates.
        heads: Prefixes of the classifier's names, which gets none.
        image_size: Height and width of the images, in pixels.

    Returns:
        The names of the layers.

    Raises:
        ConfigError: No layer is meant, or one that is meant cannot be updated.
    """
    layers = {
        n: m for n, m in model.named_modules() if type(m) in (nn.Linear, Linear) and not f"{n}.".startswith(heads)
    }
    called = _called(model, layers, image_size)
    if config.targets is None:
        chosen = called
    else:
        unknown = [t for t in config.targets if not any(_ends_with(name, t) for name in layers)]
        if unknown:
            known = sorted({name.rpartition(".")[2] for name in called})
            raise ConfigError(
                f"backbone.lora.targets: no linear layer of the backbone is called {unknown[0]!r}; it has"
                f" {', '.join(known) or 'none'}"
            )
        chosen = [name for name in layers if any(_ends_with(name, t) for t in config.targets)]
        if silent := [name for name in chosen if name not in called]:
            raise ConfigError(
                f"backbone.lora.targets: {silent[0]} is not called as a layer (its model reads the weight itself), so an update"
                " would have no effect; leave it out"
            )
    if not chosen:
        raise ConfigError(
            "backbone.train=lora updates linear layers, but this backbone has none; set backbone.train=frozen or whole"
        )
    for name in chosen:
        LoRALinear.of(layers[name], config)
    return chosen


def _ends_with(name: str, target: str) -> bool:
    return f".{name}".endswith(f".{target}")


def _called(model: nn.Module, layers: Mapping[str, nn.Linear], image_size: tuple[int, int]) -> list[str]:
    """Return the layers that the forward pass calls, in training and in evaluation. Nothing is computed."""
    shapes: dict[str, Tensor] = {n: torch.empty_like(b, device="meta") for n, b in model.named_buffers()}
    for name, p in model.named_parameters():
        shapes[name] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
    images = torch.empty(2, 3, *image_size, device="meta")
    counts = dict.fromkeys(layers, 0)
    handles = []
    for name, layer in layers.items():

        def count(*_: Any, name: str = name) -> None:
            counts[name] += 1

        handles.append(layer.register_forward_pre_hook(count))
    was_training = model.training
    found = set(layers)
    try:
        for training in (True, False):
            counts.update(dict.fromkeys(layers, 0))
            model.train(training)
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.func.functional_call(model, shapes, images)
            found &= {name for name, number in counts.items() if number}
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return [name for name in layers if name in found]


def merged(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Add the updates to the weights: the state dict of the model without LoRA.

    Args:
        weights: A whole state dict of the model, for example that of its average.
        model: The model, which says which layers have updates and how strong they are.
    """
    plain = dict(weights)
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            a, b = (plain.pop(f"{name}.{update}") for update in UPDATES)
            plain[f"{name}.weight"] = plain[f"{name}.weight"] + layer.lora_scale * (b @ a)
    return plain
