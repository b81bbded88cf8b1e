"""The linear layers that give a classifier its logits, in any family, and what long-tail remedies do with them.

Shapes: B images, F features, K classes.
"""

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.layers import init_classifier


def classifier_layers(model: nn.Module, num_classes: int) -> dict[str, nn.Linear]:
    """Find the linear layers of a model's heads by name; their outputs add up to the logits.

    A model has one, EfficientViM has one for each set of features that it fuses.

    Args:
        model: A model of any family.
        num_classes: Outputs of each layer.

    Raises:
        ConfigError: The model has none: its head is a convolution, for example.
    """
    heads = tuple(model.fresh())  # type: ignore[operator]
    found = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and f"{name}.".startswith(heads) and layer.out_features == num_classes
    }
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer of {num_classes} classes in its head, which this needs; choose"
            " another model.name"
        )
    return found


def add_balanced_head(model: nn.Module, num_classes: int) -> list[str]:
    """Put a fresh head before the model's own: the logits become (B, 2 K), the new head's and then the old head's.

    The layers keep their names, so layer decay, ZeRO, checkpoints and the teacher need not know.

    Returns:
        Names of the layers, for `keep_balanced_head`.
    """
    layers = classifier_layers(model, num_classes)
    for name, old in layers.items():
        new = nn.Linear(old.in_features, num_classes).to(old.weight)
        init_classifier(new)
        wide = nn.Linear(old.in_features, 2 * num_classes, bias=old.bias is not None).to(old.weight)
        with torch.no_grad():
            wide.weight.copy_(torch.cat([new.weight, old.weight]))
            if old.bias is not None:
                wide.bias.copy_(torch.cat([new.bias, old.bias]))
        model.set_submodule(name, wide)
    return list(layers)


def keep_balanced_head(weights: dict[str, Tensor], layers: list[str], num_classes: int) -> dict[str, Tensor]:
    """Return the state dict of a model of the original shape, whose head is the balanced one."""
    wide = {f"{name}.{part}" for name in layers for part in ("weight", "bias")}
    return {name: value[:num_classes].clone() if name in wide else value for name, value in weights.items()}


class FirstOutputs(nn.Module):
    """A model cut to the first `number` of its outputs.

    Args:
        model: Images -> (B, K).
        number: Outputs that are kept.
    """

    def __init__(self, model: nn.Module, number: int) -> None:
        super().__init__()
        self.model, self.number = model, number

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, number)."""
        return self.model(images)[:, : self.number]
