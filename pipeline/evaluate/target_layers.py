"""Find the layers of a network that keep a map of the image, and turn their outputs into that map.

A plain backbone (a Vision Mamba, a ViT) keeps tokens in some order, with a cls token among them. A hierarchical one keeps
(B, C, h, w), or (B, h, w, C) as timm's Swin does. Grad-CAM and the receptive field need only `TargetLayers`. timm's models
say in their `feature_info` where the last map is and how many channels it has, so no family of timm is named here.

Shapes: B images of H x W pixels, L tokens, C channels, h x w the map.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.models.timm_model import TimmModel
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.models.vision_mamba.tokens import drop_token

LEAST_SIDE = 3  # pixels a side that a map needs to show where something is

ToGrid = Callable[[Tensor, tuple[int, int]], Tensor]


@dataclass(frozen=True, kw_only=True)
class TargetLayers:
    """The layers that Grad-CAM and the receptive field hook into.

    Attributes:
        gradcam: The last layer through whose whole map the logits are computed.
        receptive_field: The last layer with a map; the field is that of the map's centre.
        to_grid: Turns the output of either layer, and the images' (H, W), into a map (B, C, h, w).
    """

    gradcam: nn.Module
    receptive_field: nn.Module
    to_grid: ToGrid


def target_layers(model: nn.Module) -> TargetLayers:
    """Find the target layers of one of our models or of timm's, by its structure and not by its name.

    If only the cls token reaches the head, no gradient reaches the other tokens behind the last mixer or attention. So
    Grad-CAM uses the normalised input of the last block of a plain backbone (the practice of pytorch-grad-cam).

    Raises:
        ConfigError: If the network keeps no map that is known here.
    """
    if isinstance(model, TimmModel):
        return _timm_layers(model.model, min(model.image_size))
    if isinstance(model, VisionMamba):
        entrance = f"layers.{model.depth - 1}.{'norm1' if hasattr(model.layers[-1], 'norm1') else 'norm'}"
        return TargetLayers(
            gradcam=model.get_submodule(entrance), receptive_field=model.norm_f, to_grid=_mamba_grid(model)
        )
    stages = getattr(model, "stages", None)
    if isinstance(stages, nn.Sequential | nn.ModuleList):
        last = stages[-1]
        last = last[-1] if isinstance(last, nn.ModuleList) else last  # a list is never called: its last block is
        return TargetLayers(gradcam=last, receptive_field=last, to_grid=lambda maps, _size: maps)
    raise _unknown(model)


def _timm_layers(model: Any, side: int) -> TargetLayers:
    info = getattr(model, "feature_info", None)
    maps = list(info) if isinstance(info, list | tuple) else []
    # On small images the last map of a ResNet is a single pixel, which shows nothing.
    wide = [found for found in maps if side >= LEAST_SIDE * found.get("reduction", 1)]
    last = (wide or maps)[-1] if maps else None
    prefix = getattr(model, "num_prefix_tokens", 0)
    try:
        if prefix and hasattr(model, "blocks"):
            entrance = model.get_submodule(f"blocks.{len(model.blocks) - 1}.norm1")
            to_grid = _grid(model.num_features, prefix, model)
            return TargetLayers(gradcam=entrance, receptive_field=model.get_submodule("norm"), to_grid=to_grid)
        if last is not None:
            module = model.get_submodule(last["module"])
            return TargetLayers(gradcam=module, receptive_field=module, to_grid=_grid(last["num_chs"], prefix, model))
    except (AttributeError, KeyError):  # a name that is not, or no longer, one of a module
        pass
    raise _unknown(model)


def _unknown(model: nn.Module) -> ConfigError:
    return ConfigError(
        f"{type(model).__name__} keeps no map that is known here: it has neither stages nor a feature_info that names its"
        " last map; add it to pipeline/evaluate/target_layers.py"
    )


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of `module`, with their graph, in every forward pass inside the `with` block."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(_tensor(output)))
    try:
        yield seen
    finally:
        handle.remove()


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return the map of a stage that may return other tensors after it."""
    return output if isinstance(output, Tensor) else output[0]


def _mamba_grid(model: VisionMamba) -> ToGrid:
    def to_grid(tokens: Tensor, _size: tuple[int, int]) -> Tensor:
        if model.cls_index is not None:
            tokens = drop_token(tokens, model.cls_index)
        if model.order is not None:
            tokens = tokens[:, model.order.argsort()]
        return tokens.unflatten(1, model.grid_size).permute(0, 3, 1, 2)

    return to_grid


def _grid(channels: int, prefix: int, model: nn.Module) -> ToGrid:
    """Handle a map in either order of axes, or tokens row by row behind `prefix` others (or none)."""

    def to_grid(output: Tensor, size: tuple[int, int]) -> Tensor:
        if output.dim() == 4 and output.shape[1] == channels:
            return output
        if output.dim() == 4 and output.shape[3] == channels:
            return output.permute(0, 3, 1, 2)
        if output.dim() == 3 and output.shape[2] == channels:
            for others in (prefix, 0):  # some models add the cls token later
                patches = output[:, others:]
                rows = round((patches.shape[1] * size[0] / size[1]) ** 0.5)  # the map has the images' proportions
                if rows and patches.shape[1] % rows == 0:
                    return patches.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
        raise ConfigError(
            f"{type(model).__name__} has {tuple(output.shape)} where a map of {channels} channels was expected;"
            " add it to pipeline/evaluate/target_layers.py"
        )

    return to_grid
