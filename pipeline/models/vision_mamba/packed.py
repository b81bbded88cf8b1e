"""Vision Mamba on our compiled layers: the fastest form for inference on a CPU, equal to the model to rounding.

It runs in fp32 eager mode and is not for export. What is rewritten:

- A norm's own weight and bias are part of the projection after it; only its mean and scale are left to compute.
- The gate SiLU(z) multiplies the sum of the directions once. The division by their number, if there is one, is part of the
  out-projection.
- Convolution, projections, softplus and recurrence of a direction run over about 40 tokens at a time, so that what passes
  between them never leaves the cache. A direction is an order of the tokens: nothing is flipped or gathered.
- All blocks are one call. With at least as many images as threads each thread takes whole images through a block.

A model with SSMixup is packed without it, as it is exported, except where it blends in evaluation too: such a mixer runs as
it was trained.

Shapes: B images, C channels, L tokens, D width, K classes.
"""

import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pipeline.models.packed import PackedModel
from pipeline.models.vision_mamba.blocks import Block
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.ops.native.mamba import Block as CompiledBlock
from pipeline.ops.native.mamba import Blocks, Norm, SwiGLU


def pack(model: VisionMamba) -> "PackedVisionMamba":
    """Put a trained model on our compiled layers.

    Args:
        model: The model; it is not changed.

    Returns:
        A model for fp32 on the CPU. It cannot be pickled: keep the model, and pack it again.

    Raises:
        EnvironmentProblem: There is no C++ compiler.
    """
    return PackedVisionMamba(model)


def _norm(layer: nn.Module) -> Norm:
    assert isinstance(layer, nn.RMSNorm | nn.LayerNorm)
    assert layer.eps is not None
    return Norm(layer.eps, layer.weight, layer.bias if isinstance(layer, nn.LayerNorm) else None)


def _compiled(block: Block, orders: Sequence[Tensor]) -> CompiledBlock:
    mixer = block.mixer
    directions = list(zip((mixer.direction(s) for s in mixer.suffixes), orders, strict=False))
    join, swiglu = mixer.out_proj.weight / mixer.divisor, None
    if hasattr(block, "mlp"):
        one, two, three = ((layer.weight, layer.bias) for layer in (block.mlp.w1, block.mlp.w2, block.mlp.w3))
        swiglu = SwiGLU(_norm(block.norm2), one, two, three)
    norm = block.norm1 if hasattr(block, "mlp") else block.norm
    return CompiledBlock(_norm(norm), mixer.in_proj.weight, directions, join, swiglu)


class OtherBlock(nn.Module):
    """A block that blends its directions in evaluation too."""

    def __init__(self, block: Block, columns: Tensor | None) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> a new tensor of the same shape."""
        blend = x.new_full((len(x), 2), 0.5)
        return self.block(x, self.columns, blend)


class PackedVisionMamba(PackedModel):
    """Vision Mamba on compiled layers, made by `pack`."""

    def __init__(self, model: VisionMamba) -> None:
        super().__init__(
            in_chans=model.patch_embed.proj.in_channels,
            num_classes=model.num_classes,
            image_size=model.image_size,
            any_size=False,
            instead="the model itself",
        )
        rows = torch.arange(model.pos_embed.shape[1])
        columns = rows if model.columns is None else model.columns[0].clone()
        # As DIRECTIONS: rows, rows from the last token to the first, columns, and columns from the last to the first.
        orders = [rows, rows.flip(0), columns, columns.flip(0)]
        with torch.no_grad():
            self.blocks = nn.Sequential(*_packed(model, orders))
        # The embedding, the last norm and the head stay as they are; the blocks of the copy would only take memory.
        blocks, model.layers = model.layers, nn.ModuleList()
        try:
            self.ends = copy.deepcopy(model).float().eval()
        finally:
            model.layers = blocks
        self.eval()

    def classify(self, images: Tensor) -> Tensor:
        """As `PackedModel.classify`."""
        x = self.blocks(self.ends.tokens(images).contiguous())
        return self.ends.forward_head(self.ends.norm_f(x))


def _packed(model: VisionMamba, orders: Sequence[Tensor]) -> Iterator[nn.Module]:
    """The blocks of a model; neighbours on compiled layers are one module."""

    def compiles(block: Block) -> bool:
        return not (block.mixer.ssmixup and block.mixer.ssmixup.everywhere)

    for compiled, blocks in itertools.groupby(cast(Iterable[Block], model.layers), compiles):
        if compiled:
            yield Blocks([_compiled(block, orders) for block in blocks])
        else:
            yield from (OtherBlock(copy.deepcopy(block), model.columns) for block in blocks)
