"""Vision Mamba: a plain backbone whose mixer is the selective scan in one, two or four directions.

- Vim (Zhu et al. 2024): RMSNorm, no MLP, two directions, cls token in the middle.
- ARM (Ren et al. 2024) in fine-tuning: LayerNorm, SwiGLU, expand 1, four directions, mean of the patches.
- Semi-ViM: its sources give no architecture, only "146 M" for Base. Vim with D = 768 and 36 blocks has 145.6 M. That, and
  Vim's own Tiny and Small under its name, are our inferences.

Parameter names follow the released checkpoints, so that reading one (`pipeline.exports.released`) only renames keys.

Deliberate deviations: every direction gets the initialisation of the step sizes (the released code leaves the reversed
one at softplus(0)); drop path reaches its stated maximum in the last block; grids need not be square.

Shapes: B images, C channels, L tokens, D width, K classes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pipeline.models.config import SSMixupConfig
from pipeline.models.layers import drop_path_rates, init_classifier
from pipeline.models.vision_mamba.blocks import NORMS, Block, PatchEmbed
from pipeline.models.vision_mamba.mixer import Mixer
from pipeline.models.vision_mamba.position_embedding import resize_position_embedding, sincos_position_embedding
from pipeline.models.vision_mamba.tokens import cluster_order, column_order, drop_token
from pipeline.ops.linear import Linear


class VisionMamba(nn.Module):
    """Backbone and classifier with the methods of timm's models.

    The arguments are the fields of `VisionMambaConfig`, which describes them.

    Attributes:
        grid_size: Patches (rows, across).
        cls_position: Where the cls token is, as the config says.
        cls_index: Index of the cls token among the tokens, or None without one.
        combine: How the outputs of the directions are put together.
        order: Row-major index of the patch at each step of the scan, (num_patches,); None where the scan is row-major.
        columns: The column-major order of the tokens and its inverse, (2, L); None below four directions.
    """

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
        cls_token: Literal["middle", "first", "none"],
        combine: Literal["mean", "sum"],
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
        self.cls_position, self.combine = cls_token, combine
        self.cls_index = self.cls_index_of(self.num_patches)
        self.patch_embed = PatchEmbed(patch_size, stride, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(
            torch.zeros(1, self.num_patches + (cls_token != "none"), embed_dim), pos_embed == "learned"
        )
        self.fixed_position_embedding = pos_embed == "sincos"
        if cls_token != "none":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.layers = nn.ModuleList(
            Block(
                embed_dim,
                norm=norm,
                mlp=mlp,
                drop_path=rate,
                d_state=d_state,
                d_conv=d_conv,
                expand=expand,
                directions=directions,
                combine=combine,
                ssmixup=ssmixup if ssmixup and i in ssmixup.blocks(depth) else None,
            )
            for i, rate in enumerate(drop_path_rates(drop_path, depth), start=1)
        )
        self.norm_f = NORMS[norm](embed_dim, eps=1e-5)
        self.head = Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        side = cluster_size // patch_size if order == "cluster" else None
        with torch.device("cpu"):  # real on the meta device too: no state dict would bring them
            clusters = cluster_order(self.grid_size, side) if side else None
            columns = column_order(self.grid_size, side, self.cls_index) if directions == 4 else None
        self.register_buffer("order", clusters, persistent=False)
        self.register_buffer("columns", columns, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as ARM and Vim do, and every direction alike."""
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
        if self.fixed_position_embedding:
            grid, table = self.grid_size, sincos_position_embedding(self.grid_size, self.embed_dim)
            with torch.no_grad():
                self.pos_embed.copy_(resize_position_embedding(table, grid, grid, target_cls=self.cls_index))
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_index is not None:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        init_classifier(self.head)

    def embed(self, images: Tensor) -> Tensor:
        """Embed the patches and add the position embedding.

        Args:
            images: (B, C, H, W) of the size the model was built for.

        Returns:
            (B, num_patches, D) in the order of the scan, without the cls token.

        Raises:
            ValueError: The images have another size.
        """
        if images.shape[-2:] != torch.Size(self.image_size):
            raise ValueError(f"images are {tuple(images.shape[-2:])}, this model was built for {self.image_size}")
        of_patches = self.pos_embed if self.cls_index is None else drop_token(self.pos_embed, self.cls_index)
        x = self.patch_embed(images) + of_patches
        return x if self.order is None else x[:, self.order]

    def encode(self, x: Tensor, taps: tuple[int, ...] = (), blend: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Run all blocks over the tokens.

        Args:
            x: Tokens (B, L, D).
            taps: Blocks, counted from 1, after which the residual stream is kept.
            blend: As in `forward_features`.

        Returns:
            The stream (B, L, D) after the last block, and those after the blocks `taps`.
        """
        tapped = []
        for i, layer in enumerate(self.layers, start=1):
            x = self._through(layer, x, blend)
            if i in taps:
                tapped.append(x)
        return x, tapped

    def forward_features(self, images: Tensor, blend: Tensor | None = None) -> Tensor:
        """Compute the normalised tokens.

        Args:
            images: (B, C, H, W).
            blend: (B, 2), SSMixup's psi and 1 - psi of each image; zeros leave an image without the term.

        Returns:
            (B, L, D) in the order of the scan, with the cls token (if there is one) at `cls_index`.
        """
        return self.norm_f(self.encode(self.tokens(images), blend=self.blend_for(images, blend))[0])

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the patches' residual stream after some blocks, as timm's models give it.

        Args:
            images: (B, C, H, W).
            indices: Blocks counted from 0, or from the end if negative; n means the last n, None all.
            norm: Apply the final norm to them.
            stop_early: Skip the blocks after the last index.
            output_fmt: Maps (B, D, rows, across), or tokens (B, rows x across, D) for "NLC"; row-major in any scan order.
            intermediates_only: Return the list alone.

        Returns:
            The features of `forward_features` and the list of intermediates, or the list alone.

        Raises:
            ValueError: A block does not exist, or `stop_early` is asked for together with the features.
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
        x, blend, found = self.tokens(images), self.blend_for(images), []
        for i, layer in enumerate(self.layers[: max(wanted) + 1] if stop_early else self.layers):
            x = self._through(layer, x, blend)
            if i in wanted:
                patches = self._row_major(self.norm_f(x) if norm else x)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, self.grid_size)
                found.append(patches)
        return found if intermediates_only else (self.norm_f(x), found)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool tokens (B, L, D) and classify them: logits (B, K), or the pooled (B, D) with `pre_logits`."""
        x = self.pooled(x, self.cls_index)
        return x if pre_logits else self.head(x)

    def pooled(self, x: Tensor, at: int | None) -> Tensor:
        """Tokens (B, L, D) with the cls token at index `at` -> what the head reads, (B, D)."""
        if self.pool == "cls":
            return x[:, at]
        return (x if at is None else drop_token(x, at)).mean(1)

    def forward(self, images: Tensor, blend: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> logits (B, K); `blend` as in `forward_features`."""
        return self.forward_head(self.forward_features(images, blend))

    def get_classifier(self) -> nn.Module:
        """Return the head, as timm's models do."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["cls", "mean"] | None = None) -> None:
        """Replace the head by a fresh one on the same device.

        Args:
            num_classes: K; 0 for no head.
            global_pool: What the head reads from now on, if it is to change.

        Raises:
            ValueError: The cls token is asked for and there is none.
        """
        if global_pool == "cls" and self.cls_index is None:
            raise ValueError("this model has no cls token to read; use global_pool='mean'")
        self.num_classes, self.pool = num_classes, global_pool or self.pool
        head = Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head = head.to(self.pos_embed)
        init_classifier(self.head)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass and compute the block again there: less memory, more time."""
        self.grad_checkpointing = enable

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Fit a released state dict (Vim, or ARM in its fine-tuning form) to this model's grid.

        The released position embedding is taken to be that of a square grid, and its cls token to stand where this model's
        does.
        """
        embedding = weights.get("pos_embed", self.pos_embed)
        patches = embedding.shape[1] - ("cls_token" in weights)
        source_cls = self.cls_index_of(patches) if "cls_token" in weights else None
        side = math.isqrt(patches)
        if (side, side) == self.grid_size or side * side != patches:
            return weights
        resized = resize_position_embedding(
            embedding, (side, side), self.grid_size, source_cls=source_cls, target_cls=self.cls_index
        )
        return {**weights, "pos_embed": resized}

    def fresh(self) -> tuple[str, ...]:
        """Prefixes of the parameters that fine-tuning may initialise anew."""
        return ("head.",)

    def no_weight_decay(self) -> set[str]:
        """Names of the matrices exempt from weight decay: A (a 2-D log), the cls token and the position embedding."""
        exempt = ("_log", "pos_embed", "cls_token")
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    def layer_of(self, name: str) -> int:
        """Layer of a parameter for layer-wise decay: 0 for the embeddings, i + 1 for block i, depth + 1 for the rest."""
        if name.startswith("layers."):
            return int(name.split(".")[1]) + 1
        return 0 if name.startswith(("patch_embed", "pos_embed", "cls_token")) else self.depth + 1

    def cls_index_of(self, num_patches: int) -> int | None:
        """Index of the cls token among `num_patches` patches, or None without one."""
        return {"middle": num_patches // 2, "first": 0, "none": None}[self.cls_position]

    def blend_for(self, images: Tensor, given: Tensor | None = None) -> Tensor | None:
        """SSMixup's weights as given, or one half for every image of a model that blends everywhere."""
        if given is None and self.ssmixup and self.ssmixup.everywhere:
            return images.new_full((images.shape[0], 2), 0.5)
        return given

    def _through(self, layer: nn.Module, x: Tensor, blend: Tensor | None = None) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, self.columns, blend, use_reentrant=False)
        return layer(x, self.columns, blend)

    def _row_major(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) in the order of the scan -> the patches (B, num_patches, D), row by row."""
        x = x if self.cls_index is None else drop_token(x, self.cls_index)
        return x if self.order is None else x[:, self.order.argsort()]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> all tokens (B, L, D), the cls token among them."""
        return self.with_cls(self.embed(images), self.cls_index)

    def with_cls(self, x: Tensor, at: int | None) -> Tensor:
        """Patches (B, N, D) -> the tokens with the cls token at index `at`; without one, the patches."""
        if at is None or self.cls_index is None:
            return x
        cls = self.cls_token + self.pos_embed[:, self.cls_index : self.cls_index + 1]
        return torch.cat([x[:, :at], cls.expand(x.shape[0], -1, -1), x[:, at:]], dim=1)
