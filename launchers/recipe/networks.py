"""The rules that choose the network of a recipe, the stages it needs and its learning rate.

As in rules.py: one function for each rule, with its reason in words; constants are measured where a page is named, else ours.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

from launchers.recipe.choice import Choice, Stage
from launchers.recipe.look import Look

Family = Literal["efficientvim", "resnet", "small_resnet", "vision_mamba"]
FAMILIES: tuple[Family, ...] = get_args(Family)

# A ninth of a ResNet-18's parameters and a fifth of its work; the names are those of timm's arguments.
SMALL_RESNET = {"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]}
PATCHES = {32: 4, 64: 8, 128: 8, 192: 16}  # side -> patch
CLUSTERS = {32: 8, 64: 16, 128: 32, 192: 64}  # side -> ARM's cluster; 16 clusters, or 9 at 192 as in ARM
SIZES = {32: (64, 4), 64: (128, 6), 128: (192, 12), 192: (192, 24)}  # side -> width, depth

# Learning rates at a batch, from the demo, the study and docs/recipe.md; those of the Vision Mamba at BASE_WIDTH.
BASE_WIDTH = 64
BASE_RATES: dict[Family, dict[Stage, tuple[float, int]]] = {
    "vision_mamba": {"arm": (3e-3, 64), "distill": (2e-3, 32), "semi": (2e-3, 16)},
    "resnet": {"distill": (1e-3, 32), "semi": (7.5e-4, 16)},
    "small_resnet": {"distill": (2e-2, 32), "semi": (1e-2, 16)},
    "efficientvim": {"distill": (1e-2, 32), "semi": (6e-3, 16)},
}
# Those of the small networks are Muon's. A ResNet-18's wide matrices would cost a processor more than the step itself. A Vision
# Mamba has not been compared.
OPTIMIZERS: dict[Family, str] = {
    "vision_mamba": "adamw", "resnet": "adamw", "small_resnet": "muon", "efficientvim": "muon"
}  # fmt: skip
# A ResNet-18 learns more in short runs at three times these rates (docs/recipe.md); longer ones have not been compared.
SHORT_RUN, SHORT_FACTOR = 300, 3.0
MANY_IMAGES = 20_000  # images from which a GPU's time is worth ARM pretraining; ours, not measured


def family(look: Look, gpu: bool, asked: Family | Literal["auto"] = "auto") -> Choice:
    """Choose the kind of model: a Vision Mamba, which stage 1 pretrains, or a convolutional network without stage 1.

    A processor takes few steps of a ResNet-18 in half an hour. In the same time small networks learnt far more from few labels,
    and of two whose steps take as long, a ResNet with one block at each resolution learnt more than an EfficientViM
    (docs/recipe.md). Pretraining needs many images and a GPU.
    """
    if asked != "auto":
        return Choice(asked, f"--model {asked}")
    if gpu and look.images >= MANY_IMAGES:
        return Choice("vision_mamba", f"a Vision Mamba, since {look.images} images on a GPU are worth pretraining")
    more = "`--model vision_mamba` writes all three stages"
    if gpu:
        why = f"a ResNet-18 from random weights and no stage 1, since {look.images} images are fewer than {MANY_IMAGES}"
        return Choice("resnet", f"{why}; {more}")
    why = "a small ResNet from random weights and no stage 1, since there is no GPU: its many cheap steps learnt most"
    others = "`--model efficientvim` is an EfficientViM, `--model resnet` a whole ResNet-18"
    return Choice("small_resnet", f"{why} in our trials; {others}, {more}")


def stages(chosen: Family) -> tuple[Stage, ...]:
    """List the stages of a chain: stage 1 pretrains only a Vision Mamba."""
    return ("arm", "distill", "semi") if chosen == "vision_mamba" else ("distill", "semi")


def candidates(chosen: Family, sides: Sequence[Choice]) -> tuple[Choice, ...]:
    """List models of a family, the most costly first; the budget decides among them (`rules.pays_for`).

    All models of the first side come before the smallest of every other side.
    """
    first, *others = sides
    found = [(first, model) for model in _models(chosen, first.value)]
    found += [(side, _models(chosen, side.value)[-1]) for side in others]
    return tuple(Choice(model.value, f"{side.why}. {model.why[0].upper()}{model.why[1:]}") for side, model in found)


def _models(chosen: Family, side: int) -> tuple[Choice, ...]:
    """List the models of a family for a side, the largest first.

    A Vision Mamba has 64 tokens on a CPU, and width and depth that grow with the side.
    """
    if chosen == "resnet":
        return (Choice({"name": "timm/resnet18", "image_size": side}, "its last maps are a thirty-second of the side"),)
    if chosen == "small_resnet":
        small = {"name": "timm/resnet18", "image_size": side, "options": SMALL_RESNET}
        return (Choice(small, "it is a ResNet-18 with one block at each resolution and half the channels"),)
    if chosen == "efficientvim":
        maps = "its maps are a quarter, an eighth and a sixteenth of the side"
        return (
            Choice(
                {"name": "efficientvim_mini", "image_size": side}, f"{maps}; the budget pays for enough of its steps"
            ),
            Choice({"name": "efficientvim_nano", "image_size": side}, f"{maps}; a larger one would have too few steps"),
        )
    width, depth = SIZES[side]
    patch = PATCHES[side]
    values: dict[str, Any] = {
        "name": "vim_nano",
        "image_size": side,
        "patch_size": patch,
        "cluster_size": CLUSTERS[side],
        "embed_dim": width,
        "depth": depth,
    }
    tokens = (side // patch) ** 2
    return (Choice(values, f"patches of {patch} px give {tokens} tokens; {depth} blocks of width {width}"),)


def optimizer(chosen: Family) -> Choice:
    """Choose Muon for a small network: few steps of it learn what many of AdamW do (docs/recipe.md)."""
    kind = OPTIMIZERS[chosen]
    why = "Muon, whose orthogonal updates learn in few steps what AdamW learns in many" if kind == "muon" else "AdamW"
    return Choice(kind, why)


def learning_rate(
    chosen: Family, stage: Stage, global_batch: int, width: int = BASE_WIDTH, number: int = SHORT_RUN + 1
) -> Choice:
    """Scale the base rate by the square root of the batch and, for a Vision Mamba, by the inverse of the width.

    A ResNet-18's is SHORT_FACTOR times as large in a run of at most SHORT_RUN steps; `number` is that of the steps.

    The square root is the rule for Adam, whose steps are normalised by the gradient's noise (Malladi et al. 2022); for Muon
    it is ours. The inverse of the width is that of hidden layers under Adam (Yang et al. 2022).
    """
    base, at = BASE_RATES[chosen][stage]
    short = chosen == "resnet" and number <= SHORT_RUN
    base *= SHORT_FACTOR if short else 1.0
    value = float(f"{base * math.sqrt(global_batch / at) * BASE_WIDTH / width:.2g}")
    words = (
        f"lr {base:g} at batch {at}{', for a short run' if short else ''}, times the square root of {global_batch}/{at}"
    )
    return Choice(value, words + (f", times {BASE_WIDTH}/{width} for the width" if width != BASE_WIDTH else ""))
