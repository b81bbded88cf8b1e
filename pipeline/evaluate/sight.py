"""Where a network sees: which of its layers keeps a map of the image, and how that layer's output becomes the map.

A plain backbone (a Vision Mamba, a ViT) keeps tokens in some order with a cls token somewhere; a hierarchical one keeps
(B, C, h, w), or (B, h, w, C) as timm's Swin does. Grad-CAM and the receptive field need only a `Sight`.

Shapes: B images, L tokens, C channels, h x w the map.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.timm_model import TimmModel
from pipeline.models.vision_mamba import VisionMamba, drop_slot

ToGrid = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sight:
    """`to_grid`: the output of either layer -> (B, C, h, w)."""

    explained: nn.Module  # Grad-CAM's layer: the last one through whose whole map the logits are made
    final: nn.Module  # the last one with a map: its centre has the receptive field
    to_grid: ToGrid


def sight_of(model: nn.Module) -> Sight:
    """For our models and timm's, by what they have and not by their names.

    Where only the cls token reaches the head, no gradient reaches the other tokens behind the last mixer or attention,
    so a plain backbone is explained by the normalised input of its last block (the practice of pytorch-grad-cam).
    Raises ConfigError for a network that keeps no map that is known here.
    """
    if isinstance(model, TimmModel):
        return sight_of(model.model)
    if isinstance(model, VisionMamba):
        entrance = f"layers.{model.depth - 1}.{'norm1' if hasattr(model.layers[-1], 'norm1') else 'norm'}"
        return Sight(explained=model.get_submodule(entrance), final=model.norm_f, to_grid=_mamba_grid(model))
    blocks: Any = getattr(model, "blocks", None)
    stages = getattr(model, "stages", getattr(model, "layers", None))
    prefix = getattr(model, "num_prefix_tokens", None)
    if blocks is not None and prefix is not None:
        last = model.get_submodule(f"blocks.{len(blocks) - 1}.norm1")
        return Sight(explained=last, final=model.get_submodule("norm"), to_grid=_square_grid(prefix))
    if isinstance(stages, nn.Sequential | nn.ModuleList):
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        last = stages[-1]
        last = last[-1] if isinstance(last, nn.ModuleList) else last  # a list is never called: its last block is
        return Sight(explained=last, final=last, to_grid=_channels_first if channels_last else _as_it_is)
    if hasattr(model, "layer4"):  # a ResNet
        last = model.get_submodule("layer4")
        return Sight(explained=last, final=last, to_grid=_as_it_is)
    raise ConfigError(
        f"{type(model).__name__} keeps no map that is known here: it has neither blocks with prefix tokens, nor stages,"
        " layers or layer4; add it to pipeline/evaluate/sight.py"
    )


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of `module` in every forward inside, with their place in the graph."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(_tensor(output)))
    try:
        yield seen
    finally:
        handle.remove()


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A stage may return the map and what else it made of it; the map comes first."""
    return output if isinstance(output, Tensor) else output[0]


def _mamba_grid(model: VisionMamba) -> ToGrid:
    def to_grid(tokens: Tensor) -> Tensor:
        if model.middle is not None:
            tokens = drop_slot(tokens, model.middle)
        if model.order is not None:
            tokens = tokens[:, model.order.argsort()]
        return tokens.unflatten(1, model.grid_size).permute(0, 3, 1, 2)

    return to_grid


def _square_grid(prefix: int) -> ToGrid:
    def to_grid(tokens: Tensor) -> Tensor:
        patches = tokens[:, prefix:]
        side = round(patches.shape[1] ** 0.5)
        return patches.unflatten(1, (side, -1)).permute(0, 3, 1, 2)

    return to_grid


def _channels_first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _as_it_is(x: Tensor) -> Tensor:
    return x
