"""Vision Mamba on our compiled layers: the fastest form for inference on a CPU, equal to the model to rounding.

It runs in fp32 eager mode and is not for export. What is rewritten:

- A norm's own weight and bias are part of the projection after it; only its mean and scale are left to compute.
- The gate SiLU(z) multiplies the sum of the directions once. The division by their number, if there is one, is part of the
  out-projection.
- Convolution, projections, softplus and recurrence of a direction run over about 40 tokens at a time, so that what passes
  between them never leaves the cache. A direction is an order of the tokens: nothing is flipped or gathered.

A model with SSMixup is packed without it, as it is exported, except where it blends in evaluation too: such a mixer runs as
it was trained.

Shapes: B images, C channels, L tokens, D width, K classes.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.models.packed import PackedModel
from pipeline.models.vision_mamba.blocks import Block
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.ops.native.mamba import GatedLinear, Memory, Norm, NormedLinear, NormedSwiGLU, Scans


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


class PackedBlock(nn.Module):
    """A block on compiled layers."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        mixer = block.mixer
        self.project = NormedLinear(_norm(block.norm1 if hasattr(block, "mlp") else block.norm), mixer.in_proj.weight)
        self.scans = Scans([mixer.direction(s) for s in mixer.suffixes])
        self.join = GatedLinear(mixer.out_proj.weight / mixer.divisor)
        self.mlp = None
        if hasattr(block, "mlp"):
            one, two, three = ((layer.weight, layer.bias) for layer in (block.mlp.w1, block.mlp.w2, block.mlp.w3))
            self.mlp = NormedSwiGLU(_norm(block.norm2), one, two, three)

    def forward(self, x: Tensor, orders: Sequence[Tensor], memory: Memory) -> Tensor:
        """Tokens (B, L, D) -> the same tensor, changed; `orders` holds the token at each step of each direction."""
        xz = self.project(x, memory)
        self.join(self.scans(xz, orders[: len(self.scans.directions)], memory), xz, x)
        if self.mlp is not None:
            self.mlp(x)
        return x


class OtherBlock(nn.Module):
    """A block that blends its directions in evaluation too."""

    def __init__(self, block: Block, columns: Tensor | None) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor, orders: Sequence[Tensor], memory: Memory) -> Tensor:
        """As for `PackedBlock`, but with a new tensor."""
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
        with torch.no_grad():
            self.blocks = nn.ModuleList(_packed(block, model) for block in model.layers)
        # The embedding, the last norm and the head stay as they are; the blocks of the copy would only take memory.
        blocks, model.layers = model.layers, nn.ModuleList()
        try:
            self.ends = copy.deepcopy(model).float().eval()
        finally:
            model.layers = blocks
        rows = torch.arange(model.pos_embed.shape[1])
        columns = rows if model.columns is None else model.columns[0]
        # As DIRECTIONS: rows, rows from the last token to the first, columns, and columns from the last to the first.
        self.orders = [order.clone() for order in (rows, rows.flip(0), columns, columns.flip(0))]
        self.eval()

    def classify(self, images: Tensor) -> Tensor:
        """As `PackedModel.classify`."""
        x, memory = self.ends.tokens(images).contiguous(), Memory()
        for block in self.blocks:
            x = block(x, self.orders, memory)
        return self.ends.forward_head(self.ends.norm_f(x))


def _packed(block: nn.Module, model: VisionMamba) -> nn.Module:
    assert isinstance(block, Block)
    if block.mixer.ssmixup and block.mixer.ssmixup.everywhere:
        return OtherBlock(copy.deepcopy(block), model.columns)
    return PackedBlock(block)
