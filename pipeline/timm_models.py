"""Our models under timm's names and with timm's interface.

    import pipeline.timm_models, timm

    timm.create_model("vim_small", num_classes=10, img_size=384, features_only=True)
    timm.create_model("local-dir:runs/mine/semi/export", pretrained=True)  # or hf-hub:USER/NAME

Importing this module registers every model of ours that timm lacks. It takes timm's arguments (`img_size`, `in_chans`,
`drop_path_rate`, `global_pool`) and any field of the family's config. Parameters have the names of our exports, so the files of
an export load.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.models.config import EfficientViMConfig, VisionMambaConfig, WideResNetConfig
from pipeline.models.family import FamilyConfig
from pipeline.models.timm_names import FIRST_CONVOLUTION, NAMES, classifiers
from pipeline.models.vision_mamba.position_embedding import resize_position_embedding
from pipeline.ops.torchvision_cpu import allow_torchvision

POOLS = {"token": "cls", "avg": "mean", "cls": "cls", "mean": "mean"}  # timm's words and ours
default_cfgs: dict[str, Any] = {}  # timm looks for them under this name


class _Form:
    """Mixed into a model's class: the constructor and the methods that timm's users expect and the class lacks."""

    feature_info: list[dict[str, Any]]
    layer_of: Callable[[str], int]

    def __init__(
        self,
        *,
        name: str,
        img_size: int | Sequence[int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        drop_path_rate: float = 0.0,
        global_pool: str | None = None,
        **fields: Any,
    ) -> None:
        if "image_size" in fields:
            raise ConfigError(f"model {name}: image_size is called img_size here, as timm calls it")
        if img_size is not None:
            fields["image_size"] = img_size if isinstance(img_size, int) else tuple(img_size)
        if global_pool and NAMES[name] is VisionMambaConfig:
            fields["pool"] = POOLS.get(global_pool, global_pool)
        given = {"name": name, "num_classes": num_classes, "drop_path": drop_path_rate, **fields}
        config = validate(NAMES[name], given, f"model {name}")
        # The config of a stage allows three channels alone, because that is what a dataset has.
        super().__init__(**config.arguments() | {"in_chans": in_chans})
        self.in_chans, self.feature_info = in_chans, _features(self, config)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return the layer of a parameter by its name, for layer-wise decay; there is no coarser grouping."""
        return self.layer_of


class _VisionMambaForm(_Form):
    """The form of Vision Mamba, which brings most of the methods."""

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one; `global_pool` is `token` or `avg`."""
        super().reset_classifier(num_classes, POOLS[global_pool] if global_pool else None)  # type: ignore[misc]


class _StagedForm(_Form):
    """The form of a network whose stages each give a map."""

    forward_features: Callable[[Tensor], Any]
    get_submodule: Callable[[str], nn.Module]
    num_features: int

    @property
    def head_hidden_size(self) -> int:
        """Features that the classifier reads."""
        return self.num_features

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Compute the last maps (B, D, H, W) of some stages, as timm's models do. They are never normalised.

        Args:
            images: (B, C, H, W).
            indices: Stages counted from 0; n means the last n, None all.
            norm: Only False.
            stop_early: Changes nothing; all stages run.
            output_fmt: Only NCHW.
            intermediates_only: Return the list alone, without the result of `forward_features` before it.

        Raises:
            ValueError: `norm` or another format is asked for.
        """
        from timm.models._features import feature_take_indices

        if norm or output_fmt != "NCHW":
            raise ValueError("maps are given as NCHW and without a norm")
        wanted, _ = feature_take_indices(len(self.feature_info), indices)
        found: dict[int, Tensor] = {}

        def keep(stage: int) -> Callable[..., None]:
            # A stage of EfficientViM returns its hidden states too.
            return lambda module, inputs, out: found.update({stage: out[0] if isinstance(out, tuple) else out})

        hooks = [self.get_submodule(self.feature_info[i]["module"]).register_forward_hook(keep(i)) for i in set(wanted)]
        try:
            features = self.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        maps = [found[i] for i in wanted]
        return maps if intermediates_only else (features, maps)


def _features(model: Any, family: FamilyConfig) -> list[dict[str, Any]]:
    """Describe what features can be taken: channels, pixels on a side of a cell, and the submodule that returns them."""
    if isinstance(family, VisionMambaConfig):
        stride = family.stride or family.patch_size
        return [
            {"num_chs": family.embed_dim, "reduction": stride, "module": f"layers.{i}"} for i in range(family.depth)
        ]
    number = len(model.stages)
    # The families other than EfficientViM double their width from stage to stage.
    widths: Sequence[int] = [model.num_features // 2 ** (number - 1 - i) for i in range(number)]
    first = 1 if isinstance(family, WideResNetConfig) else 4
    if isinstance(family, EfficientViMConfig):
        widths, first = family.widths, int(family.stem_stride)
    return [
        {"num_chs": width, "reduction": first * 2**i, "module": _returning(stage, f"stages.{i}")}
        for i, (width, stage) in enumerate(zip(widths, model.stages, strict=True))
    ]


def _returning(stage: nn.Module, name: str) -> str:
    """Return the name of what returns a stage's map: the stage, or its last block where the stage is only a list."""
    return f"{name}.{len(stage) - 1}" if isinstance(stage, nn.ModuleList) else name


def _fit(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Resize the position embedding of weights that were trained at another size of the images."""
    given = weights.get("pos_embed")
    if given is None or given.shape == model.pos_embed.shape:
        return weights
    _, height, width = model.pretrained_cfg["input_size"]
    stride = model.patch_embed.proj.stride[0]
    grid = ((height - model.patch_size) // stride + 1, (width - model.patch_size) // stride + 1)
    source_cls = model.cls_index_of(grid[0] * grid[1])
    resized = resize_position_embedding(given, grid, model.grid_size, source_cls=source_cls, target_cls=model.cls_index)
    return {**weights, "pos_embed": resized}


def _register() -> None:
    allow_torchvision()
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

    from pipeline.models.registry import MODEL_CLASSES

    classes = {
        family: type(
            MODEL_CLASSES[family].__name__,
            (_VisionMambaForm if family is VisionMambaConfig else _StagedForm, MODEL_CLASSES[family]),
            {"__module__": __name__},
        )
        for family in set(NAMES.values())
    }

    def entrypoint(name: str, described: FamilyConfig) -> Callable[..., nn.Module]:
        family, last_blocks = type(described), 3
        stages = tuple(range(len(getattr(described, "depths", (0, 1, 2)))))

        def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
            out = arguments.pop("out_indices", last_blocks if family is VisionMambaConfig else stages)
            return build_model_with_cfg(
                classes[family],
                name,
                pretrained,
                feature_cfg={"out_indices": out, "feature_cls": "getter"},
                pretrained_filter_fn=_fit,
                name=name,
                **arguments,
            )

        create.__name__ = create.__qualname__ = name
        return create

    for name, family in NAMES.items():
        config = family.model_validate({"name": name})
        default_cfgs.update(
            generate_default_cfgs(
                {
                    name: {
                        "input_size": (3, *config.image_size),
                        "fixed_input_size": family is VisionMambaConfig,
                        "num_classes": config.num_classes,
                        "first_conv": FIRST_CONVOLUTION[family],
                        "classifier": classifiers(config),
                    }
                }
            )
        )
        register_model(entrypoint(name, config))


_register()
