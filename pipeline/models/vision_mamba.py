"""Vision Mamba: a plain backbone whose mixer is the selective scan in one, two or four directions.

Vim (Zhu et al. 2024): no MLP, RMSNorm, two directions, cls token in the middle.  ARM (Ren et al. 2024), in
fine-tuning: LayerNorm, SwiGLU, expand 1, four directions, mean of the patches.  Semi-ViM: its sources give no
architecture but "146 M" for Base, which Vim at 768 x 36 has (145.6 M); that, and Vim's own Tiny and Small under its
name, are inferences of ours.
Parameter names follow the released checkpoints, so that a converter (`pipeline.exports.convert`) is a renaming.

Deviations, on purpose: every direction gets the step-size initialisation (the released code leaves the reversed
one at softplus(0)); drop path reaches its stated maximum in the last block; grids need not be square.

Shapes: B images, L tokens, D width, E = expand x D inner width, N states, R rank of the step size.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.config import VISION_MAMBA_VARIANTS as VARIANTS
from pipeline.models.config import SSMixupConfig
from pipeline.models.ssmixup import mixed_scan
from pipeline.ops.scan import Direction, mixer_scan

__all__ = ["VARIANTS", "VisionMamba"]

# Suffixes of the released checkpoints: row-major, its reverse, column-major, its reverse.
DIRECTIONS = ("", "_b", "_c", "_c_b")
NORMS = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class Mixer(nn.Module):
    """One in- and out-projection shared by all directions; convolution, projections, A and D of each its own."""

    def __init__(
        self, dim: int, *, d_state: int, d_conv: int, expand: int, directions: int, ssmixup: SSMixupConfig | None = None
    ) -> None:
        super().__init__()
        self.ssmixup = ssmixup
        if ssmixup and ssmixup.nu == "learned":
            self.nu = nn.Parameter(torch.zeros(1))
        self.inner = expand * dim
        self.rank = math.ceil(dim / 16)
        self.d_state = d_state
        self.suffixes = DIRECTIONS[:directions]
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=False)
        for s in self.suffixes:
            self.add_module(
                f"conv1d{s}", nn.Conv1d(self.inner, self.inner, d_conv, groups=self.inner, padding=d_conv - 1)
            )
            self.add_module(f"x_proj{s}", nn.Linear(self.inner, self.rank + 2 * d_state, bias=False))
            self.add_module(f"dt_proj{s}", nn.Linear(self.rank, self.inner))
            self.register_parameter(f"A{s}_log", nn.Parameter(torch.empty(self.inner, d_state)))
            self.register_parameter(f"D{s}", nn.Parameter(torch.empty(self.inner)))
        self.out_proj = nn.Linear(self.inner, dim, bias=False)

    def reset_scan_parameters(self) -> None:
        """A = -(1..N) (S4D-real), D = 1, step sizes log-uniform in [1e-3, 0.1], in every direction."""
        states = torch.arange(1, self.d_state + 1, dtype=torch.float32)
        for s in self.suffixes:
            with torch.no_grad():
                self.get_parameter(f"A{s}_log").copy_(states.log().expand(self.inner, -1))
                self.get_parameter(f"D{s}").fill_(1.0)
                dt = torch.exp(torch.empty(self.inner).uniform_(math.log(1e-3), math.log(0.1))).clamp_(min=1e-4)
                self.get_parameter(f"dt_proj{s}.bias").copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
            nn.init.uniform_(self.get_parameter(f"dt_proj{s}.weight"), -(self.rank**-0.5), self.rank**-0.5)

    def forward(self, x: Tensor, columns: Tensor | None, blend: Tensor | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); `columns` (2, L) is the column-major order and its inverse, for four directions;
        `blend` (B, 2) is SSMixup's psi and 1 - psi of each image, zeros for one without the term."""
        xz = self.in_proj(x)  # (B, L, 2E)
        y = self._both_ways(xz, self.suffixes[:2], blend)
        if columns is not None:
            # One gather in and one out serve both column directions.
            order, inverse = columns
            y = y + self._both_ways(xz[:, order], self.suffixes[2:], blend)[:, inverse]
        # The mean over the directions, taken on the weight: it is smaller than y.
        return F.linear(y, self.out_proj.weight / len(self.suffixes))

    def _both_ways(self, xz: Tensor, suffixes: tuple[str, ...], blend: Tensor | None) -> Tensor:
        """The sum of one or two directions of a sequence, (B, L, 2E) -> (B, L, E), with their SSMixup if there is one."""
        directions = [self._direction(s) for s in suffixes]
        if self.ssmixup is None or blend is None:
            return mixer_scan(xz, directions)
        nu = self.nu if self.ssmixup.nu == "learned" else self.ssmixup.nu
        return mixed_scan(xz, directions, blend, nu, shared_C=self.ssmixup.readout == "shared_C")

    def _direction(self, suffix: str) -> Direction:
        own = self.get_parameter
        return Direction(
            own(f"conv1d{suffix}.weight"),
            own(f"conv1d{suffix}.bias"),
            own(f"x_proj{suffix}.weight"),
            own(f"dt_proj{suffix}.weight"),
            own(f"dt_proj{suffix}.bias"),  # enters inside the softplus, in fp32
            -torch.exp(own(f"A{suffix}_log").float()),
            own(f"D{suffix}"),
        )


class SwiGLU(nn.Module):
    """w3(SiLU(w1 x) * w2 x), hidden width floor(8D/3)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = 8 * dim // 3
        self.w1, self.w2, self.w3 = nn.Linear(dim, hidden), nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class DropPath(nn.Module):
    """Drops the residual branch of whole samples with probability `rate`, in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """x + Mixer(norm(x)), then x + SwiGLU(norm(x)) if there is an MLP; the stream x stays in its own dtype (fp32)."""

    def __init__(
        self,
        dim: int,
        *,
        norm: str,
        mlp: str,
        drop_path: float,
        d_state: int,
        d_conv: int,
        expand: int,
        directions: int,
        ssmixup: SSMixupConfig | None = None,
    ) -> None:
        super().__init__()
        self.mixer = Mixer(dim, d_state=d_state, d_conv=d_conv, expand=expand, directions=directions, ssmixup=ssmixup)
        self.drop_path = DropPath(drop_path)
        # Vim's one norm is called `norm`, ARM's two `norm1` and `norm2`, in the released files.
        if mlp == "none":
            self.norm = NORMS[norm](dim, eps=1e-5)
        else:
            self.norm1, self.norm2 = NORMS[norm](dim, eps=1e-5), NORMS[norm](dim, eps=1e-5)
            self.mlp = SwiGLU(dim)

    def forward(self, x: Tensor, columns: Tensor | None, blend: Tensor | None = None) -> Tensor:
        if hasattr(self, "mlp"):
            x = x + self.drop_path(self.mixer(self.norm1(x), columns, blend))
            return x + self.drop_path(self.mlp(self.norm2(x)))
        return x + self.drop_path(self.mixer(self.norm(x), columns, blend))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, stride: int, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, grid height x grid width, D), row-major."""
        return self.proj(images).flatten(2).transpose(1, 2)


class VisionMamba(nn.Module):
    """Backbone and classifier in timm's language; every argument is a field of `VisionMambaConfig`."""

    columns: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        stride: int | None,
        in_chans: int,
        embed_dim: int,
        depth: int,
        d_state: int,
        d_conv: int,
        expand: int,
        directions: int,
        order: Literal["raster", "cluster"],
        cluster_size: int,
        mlp: str,
        norm: str,
        cls_token: Literal["middle", "none"],
        pool: Literal["cls", "mean"],
        pos_embed: Literal["learned", "sincos"],
        drop_path: float,
        num_classes: int,
        ssmixup: SSMixupConfig | None = None,
    ) -> None:
        super().__init__()
        self.ssmixup = ssmixup
        stride = stride or patch_size
        self.image_size, self.patch_size = image_size, patch_size
        self.grid_size = ((image_size[0] - patch_size) // stride + 1, (image_size[1] - patch_size) // stride + 1)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.depth, self.num_classes, self.pool = depth, num_classes, pool
        self.grad_checkpointing = False
        self.middle = self.num_patches // 2 if cls_token == "middle" else None
        self.patch_embed = PatchEmbed(patch_size, stride, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.num_patches + (cls_token == "middle"), embed_dim), pos_embed == "learned"
        )
        self.fixed_positions = pos_embed == "sincos"
        if cls_token == "middle":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.layers = nn.ModuleList(
            Block(
                embed_dim,
                norm=norm,
                mlp=mlp,
                drop_path=r,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                directions=directions,
                ssmixup=ssmixup if ssmixup and i in ssmixup.blocks(depth) else None,
            )
            for i, r in enumerate(rates, start=1)
        )
        self.norm_f = NORMS[norm](embed_dim, eps=1e-5)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        side = cluster_size // patch_size if order == "cluster" else None
        with torch.device("cpu"):  # real on the meta device too: no state dict would bring them
            self.register_buffer("order", cluster_order(self.grid_size, side) if side else None, persistent=False)
            self.register_buffer("columns", self._column_order(side) if directions == 4 else None, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """ARM's and Vim's initialisation (spec 1.7 and 4.3 of the method), for every direction alike."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # In a second pass: the first one has zeroed the biases of the step sizes with all others.
        for module in self.modules():
            if isinstance(module, Mixer):
                module.reset_scan_parameters()
                with torch.no_grad():
                    module.out_proj.weight.div_(math.sqrt(self.depth))
        fan_in = self.patch_embed.proj.weight[0].numel()
        nn.init.trunc_normal_(self.patch_embed.proj.weight, std=fan_in**-0.5)  # LeCun
        nn.init.zeros_(self.patch_embed.get_parameter("proj.bias"))
        if self.fixed_positions:
            with torch.no_grad():
                self.pos_embed.copy_(
                    resize_positions(sincos_positions(self.grid_size, self.embed_dim), self.grid_size, self)
                )
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.middle is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self._reset_head()

    def _reset_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def embed(self, images: Tensor) -> Tensor:
        """Patches with positions, in the order of the scan, without the cls token: (B, num_patches, D)."""
        if images.shape[-2:] != torch.Size(self.image_size):
            raise ValueError(f"images are {tuple(images.shape[-2:])}, this model was built for {self.image_size}")
        positions = self.pos_embed if self.middle is None else drop_slot(self.pos_embed, self.middle)
        x = self.patch_embed(images) + positions
        return x if self.order is None else x[:, self.order]

    def encode(self, x: Tensor, taps: tuple[int, ...] = (), blend: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """All blocks over the tokens x (B, L, D); also the streams after the blocks `taps`, counted from 1."""
        tapped = []
        for i, layer in enumerate(self.layers, start=1):
            x = self._through(layer, x, blend)
            if i in taps:
                tapped.append(x)
        return x, tapped

    def forward_features(self, images: Tensor, blend: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, L, D): normalised tokens in the order of the scan, cls (if any) in the middle.

        `blend` (B, 2): SSMixup's psi and 1 - psi of each image, in a model that has it; zeros leave an image without.
        """
        return self.norm_f(self.encode(self._tokens(images), blend=self._blend(images, blend))[0])

    def _blend(self, images: Tensor, given: Tensor | None) -> Tensor | None:
        """SSMixup's weights of each image: those given, or one half for every image of a model that blends everywhere."""
        if given is None and self.ssmixup and self.ssmixup.everywhere:
            return images.new_full((len(images), 2), 0.5)
        return given

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The patches' stream after the blocks `indices`, as timm's models give it; before it, unless
        `intermediates_only`, what `forward_features` gives.

        `indices` count from 0, or from the end if negative; n means the last n, None all. Maps (B, D, rows, across), or
        tokens (B, rows x across, D) for "NLC", row-major whatever the scan's order. `norm` applies the final norm;
        `stop_early` leaves out the blocks after the last index. Raises ValueError for a block that does not exist.
        """
        if indices is None:
            indices = self.depth
        if isinstance(indices, int):
            indices = range(-indices, 0)
        if not all(-self.depth <= i < self.depth for i in indices):
            raise ValueError(f"indices {list(indices)} name blocks outside 0..{self.depth - 1}")
        wanted = [i % self.depth for i in indices]
        if stop_early and not intermediates_only:
            raise ValueError("stop_early leaves no final features; set intermediates_only=True")
        x, blend, found = self._tokens(images), self._blend(images, None), []
        for i, layer in enumerate(self.layers[: max(wanted) + 1] if stop_early else self.layers):
            x = self._through(layer, x, blend)
            if i in wanted:
                patches = self._row_major(self.norm_f(x) if norm else x)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, self.grid_size)
                found.append(patches)
        return found if intermediates_only else (self.norm_f(x), found)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if self.pool == "cls":
            x = x[:, self.middle]
        else:
            x = (x if self.middle is None else drop_slot(x, self.middle)).mean(1)
        return x if pre_logits else self.head(x)

    def forward(self, images: Tensor, blend: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> logits (B, num_classes); `blend` as in `forward_features`."""
        return self.forward_head(self.forward_features(images, blend))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["cls", "mean"] | None = None) -> None:
        """A fresh head where the old weights are; 0 classes: none. `global_pool` also changes what the head reads."""
        if global_pool == "cls" and self.middle is None:
            raise ValueError("this model has no cls token to read; use global_pool='mean'")
        self.num_classes, self.pool = num_classes, global_pool or self.pool
        head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head = head.to(self.pos_embed)
        self._reset_head()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the block again there: less memory, more time."""
        self.grad_checkpointing = enable

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A released Vim, or ARM in its fine-tuning form, at this model's grid; positions are taken for those of a square."""
        positions, slot = weights.get("pos_embed", self.pos_embed), None
        patches = positions.shape[1] - ("cls_token" in weights)
        if "cls_token" in weights:
            slot = patches // 2
        side = math.isqrt(patches)
        if (side, side) == self.grid_size or side * side != patches:
            return weights
        return {**weights, "pos_embed": resize_positions(positions, (side, side), self, slot)}

    def fresh(self) -> tuple[str, ...]:
        """Prefixes of what fine-tuning may make anew."""
        return ("head.",)

    def no_weight_decay(self) -> set[str]:
        """Names exempt from decay though they are matrices: A (a 2-D log), tokens and positions."""
        exempt = ("_log", "pos_embed", "cls_token")
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    def layer_of(self, name: str) -> int:
        """For layer-wise decay: 0 for the embeddings, i + 1 for block i, depth + 1 for the rest."""
        if name.startswith("layers."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else self.depth + 1

    def _through(self, layer: nn.Module, x: Tensor, blend: Tensor | None = None) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, self.columns, blend, use_reentrant=False)
        return layer(x, self.columns, blend)

    def _row_major(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) in the order of the scan -> the patches (B, num_patches, D), row by row."""
        x = x if self.middle is None else drop_slot(x, self.middle)
        return x if self.order is None else x[:, self.order.argsort()]

    def _tokens(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        if self.middle is None:
            return x
        # The cls slot has a position of its own, at the middle index.
        cls = (self.cls_token + self.pos_embed[:, self.middle : self.middle + 1]).expand(len(x), -1, -1)
        return torch.cat([x[:, : self.middle], cls, x[:, self.middle :]], dim=1)

    def _column_order(self, side: int | None) -> Tensor:
        """(2, L): where the tokens stand when read column by column, and the inverse; cls keeps the middle.

        Clusters of `side` patches have no columns of single tokens: theirs is the cluster order of the transposed grid.
        """
        rows, across = self.grid_size
        columns = torch.arange(rows * across).view(rows, across).t().flatten()
        if side is not None:
            columns = columns[cluster_order((across, rows), side)]
            columns = cluster_order(self.grid_size, side).argsort()[columns]
        if self.middle is not None:
            columns = columns + (columns >= self.middle).long()
            columns = torch.cat([columns[: self.middle], torch.tensor([self.middle]), columns[self.middle :]])
        return torch.stack([columns, columns.argsort()])


def cluster_order(grid_size: tuple[int, int], side: int) -> Tensor:
    """Row-major patch indices, listed cluster by cluster: clusters row by row, patches row by row inside (ARM)."""
    rows, across = grid_size
    index = torch.arange(rows * across).view(rows // side, side, across // side, side)
    return index.permute(0, 2, 1, 3).flatten()


def sincos_positions(grid_size: tuple[int, int], dim: int) -> Tensor:
    """Fixed 2-D positions (1, rows x across, dim): first half the column, second half the row, each [sin | cos] (ARM 1.3)."""
    if dim % 4:
        raise ValueError(f"sin-cos positions need a width that is a multiple of 4, got {dim}")
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, across = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    y, x = torch.meshgrid(rows, across, indexing="ij")
    halves = [
        torch.cat([(p.flatten()[:, None] * omega).sin(), (p.flatten()[:, None] * omega).cos()], 1) for p in (x, y)
    ]
    return torch.cat(halves, dim=1).float().unsqueeze(0)


def drop_slot(x: Tensor, slot: int) -> Tensor:
    """x (B, L, D) without token `slot`."""
    return torch.cat([x[:, :slot], x[:, slot + 1 :]], dim=1)


def resize_positions(
    positions: Tensor, grid_size: tuple[int, int], target: VisionMamba, slot: int | None = None
) -> Tensor:
    """Positions (1, rows x across, D) of a grid, bicubic onto the target's grid, with a slot for the target's cls token.

    `slot`: where among them a cls token stands, which is no place of the grid; its position goes over as it is, into a slot
    that is zero otherwise.
    """
    cls = torch.zeros_like(positions[:, :1]) if slot is None else positions[:, slot : slot + 1]
    positions = positions if slot is None else drop_slot(positions, slot)
    if grid_size != target.grid_size:
        grid = positions.unflatten(1, grid_size).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=target.grid_size, mode="bicubic", align_corners=False)
        positions = grid.permute(0, 2, 3, 1).flatten(1, 2)
    middle = target.middle
    return positions if middle is None else torch.cat([positions[:, :middle], cls, positions[:, middle:]], dim=1)
