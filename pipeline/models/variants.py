"""Values of the named models: for each name the fields of its family's config that differ from the defaults."""

from typing import Any

_ARM = {"expand": 1, "norm": "layer", "mlp": "swiglu", "directions": 4, "pool": "mean"}

VISION_MAMBA_VARIANTS: dict[str, dict[str, Any]] = {
    # Vision Mamba as released: RMSNorm, expand 2, no MLP, two directions, cls in the middle.
    "vim_tiny": {"embed_dim": 192, "depth": 24},
    "vim_small": {"embed_dim": 384, "depth": 24},
    "vim_base": {"embed_dim": 768, "depth": 24},
    # ARM in its fine-tuning form: LayerNorm, expand 1, SwiGLU, four directions, mean of the patches.
    "arm_base": {"embed_dim": 768, "depth": 12, **_ARM},
    "arm_large": {"embed_dim": 1024, "depth": 24, **_ARM},
    "arm_huge": {"embed_dim": 1536, "depth": 24, **_ARM},
    # Semi-ViM states only "146 M" for Base. Vim at 768 x 36 has 145.6 M: an inference, as are the two below it.
    "semivim_tiny": {"embed_dim": 192, "depth": 24},
    "semivim_small": {"embed_dim": 384, "depth": 24},
    "semivim_base": {"embed_dim": 768, "depth": 36},
    # Ours: a laptop's CPU trains it in seconds.
    "vim_nano": {"embed_dim": 64, "depth": 4, "d_state": 8, "image_size": (32, 32), "patch_size": 4, "cluster_size": 8},
}

# ARM pretrains a backbone in this form. What fine-tuning builds anew: a classifier, a final norm and a cls token.
PRETRAINING_FORM: dict[str, Any] = {
    "directions": 1,
    "cls_token": "none",
    "pool": "mean",
    "pos_embed": "sincos",
    "num_classes": 0,
    "drop_path": 0.0,
}


def _efficientvim(
    widths: tuple[int, ...], depths: tuple[int, ...], states: tuple[int, ...], size: int
) -> dict[str, Any]:
    return {"widths": widths, "depths": depths, "states": states, "image_size": (size, size)}


EFFICIENTVIM_VARIANTS: dict[str, dict[str, Any]] = {
    "efficientvim_m1": _efficientvim((128, 192, 320), (2, 2, 2), (49, 25, 9), 224),
    "efficientvim_m2": _efficientvim((128, 256, 512), (2, 2, 2), (49, 25, 9), 224),
    "efficientvim_m3": _efficientvim((224, 320, 512), (2, 2, 2), (49, 25, 9), 224),
    "efficientvim_m4": _efficientvim((224, 320, 512), (3, 4, 2), (64, 32, 16), 256),
    # Ours, for the bundled digits: at 32 px the maps are 8, 4 and 2 a side, so the stem halves twice instead of four times.
    "efficientvim_nano": {**_efficientvim((32, 48, 64), (1, 2, 1), (16, 9, 4), 32), "stem_stride": 4},
    # Ours, for a person's own small images: a recipe takes it where the budget pays for enough of its steps (docs/recipe.md).
    "efficientvim_mini": {**_efficientvim((64, 96, 160), (1, 2, 1), (16, 9, 4), 32), "stem_stride": 4},
}
EFFICIENTVIM_VARIANTS |= {f"{name}_dist": {**v, "distilled": True} for name, v in EFFICIENTVIM_VARIANTS.items()}

VSSD_VARIANTS: dict[str, dict[str, Any]] = {
    "vssd_micro": {"width": 48, "depths": (2, 2, 8, 4), "heads": (2, 4, 8, 16), "states": 48},
    "vssd_tiny": {"width": 64, "depths": (2, 4, 8, 4), "heads": (2, 4, 8, 16)},
    "vssd_small": {"width": 64, "depths": (3, 4, 21, 5), "heads": (2, 4, 8, 16)},
    "vssd_base": {"width": 96, "depths": (3, 4, 21, 5), "heads": (3, 6, 12, 24)},
    # Table D of EfficientViM: its mixer in place of NC-SSD in the first three stages.
    "vssd_tiny_hsm": {"width": 64, "depths": (2, 4, 8, 4), "heads": (2, 4, 8, 16), "mixer": "hsm"},
}

# WRN-DEPTH-WIDEN of the FixMatch family, for images of 32 pixels.
WIDE_RESNET_VARIANTS: dict[str, dict[str, Any]] = {
    "wrn_28_2": {"depth": 28, "widen": 2, "image_size": (32, 32)},
    "wrn_28_8": {"depth": 28, "widen": 8, "image_size": (32, 32)},
}
