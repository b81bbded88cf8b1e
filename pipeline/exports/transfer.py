"""Start one model from the weights of another: every tensor is loaded, declared as new, or declared as left behind."""

import logging
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from pipeline.errors import HandoverError
from pipeline.models.arm import ARM
from pipeline.models.timm_model import TimmModel
from pipeline.models.vision_mamba.mixer import DIRECTIONS
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.models.vision_mamba.position_embedding import resize_position_embedding

logger = logging.getLogger(__name__)

# Parameters that fine-tuning initialises anew, and parameters of a pretrainer that it leaves behind.
FRESH = ("head.", "norm_f.", "cls_token")
DROPPED = ("norms.", "to_decoder.", "query", "blocks.", "norm.", "to_pixels.")

# At most so many tensors that are left behind are named; of more, the first words of their names are.
NAMED = 4


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Names of the tensors that were loaded, newly initialised, and left behind."""

    loaded: list[str]
    fresh: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        fresh = ", ".join(sorted(self.fresh)) or "none"
        few = len(self.dropped) <= NAMED
        dropped = ", ".join(sorted({name if few else name.split(".")[0] for name in self.dropped})) or "none"
        total = len(self.loaded) + len(self.fresh)
        return f"loaded {len(self.loaded)}/{total} tensors; new: {fresh}; left behind: {dropped}"


def transfer(source: nn.Module, target: nn.Module, where: Path) -> Transfer:
    """Load an exported model into `target`.

    A classifier is loaded whole. If it was trained on images of another size, its position embedding is resized.
    A pretrainer gives its backbone to a Vision Mamba (ARM, section 2.4): its one direction initialises all directions,
    the position embedding is resized to the new grid with an empty slot for the cls token, and FRESH is initialised.

    Args:
        source: The model of an export.
        target: The model to start. It is changed in place.
        where: Folder of the export, for messages.

    Raises:
        HandoverError: If any other key is missing or left over, or a shape differs.
    """
    weights = source.state_dict()
    dropped: list[str] = []
    if isinstance(source, ARM):
        if not isinstance(target, VisionMamba):
            raise HandoverError(
                f"{where} holds a pretrained Vision Mamba, which cannot start another kind of model; choose a model.name"
                " of the Vision Mamba family"
            )
        dropped = [k for k in weights if k.startswith(DROPPED)]
        weights = {k.removeprefix("backbone."): v for k, v in weights.items() if k not in dropped}
        weights["pos_embed"] = resize_position_embedding(
            weights["pos_embed"], source.backbone.grid_size, target.grid_size, target_cls=target.cls_index
        )
        allowed: tuple[str, ...] = FRESH
    else:
        allowed = ()
        weights = _at_this_size(weights, source, target)
    wanted = target.state_dict()
    for key in wanted:
        origin = _first_direction(key)
        if isinstance(source, ARM) and key not in weights and origin in weights:
            weights[key] = weights[origin].clone()
    problems = misshapen(weights, wanted)
    # SSMixup's strength begins at 0, where it changes nothing.
    problems += [
        f"{k} is missing" for k in wanted if k not in weights and not k.startswith(allowed) and not k.endswith(".nu")
    ]
    problems += [f"{k} has no place here" for k in weights if k not in wanted]
    if problems:
        raise HandoverError(
            f"{where} does not fit this model: {problems[0]}"
            + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
            + "; set model.* as the export's model.json says, or start from another export"
        )
    target.load_state_dict(weights, strict=False)
    report = Transfer(
        loaded=[k for k in wanted if k in weights], fresh=[k for k in wanted if k not in weights], dropped=dropped
    )
    logger.info("init_from %s: %s", where, report)
    return report


def misshapen(weights: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    """One sentence for every tensor whose shape differs from the wanted one."""
    return [
        f"{k} is {tuple(weights[k].shape)} there and {tuple(v.shape)} here"
        for k, v in wanted.items()
        if k in weights and weights[k].shape != v.shape
    ]


def _at_this_size(weights: dict[str, Tensor], source: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    """Resize a classifier's position embedding to the target's images."""
    if isinstance(source, VisionMamba) and isinstance(target, VisionMamba) and source.grid_size != target.grid_size:
        resized = resize_position_embedding(
            weights["pos_embed"],
            source.grid_size,
            target.grid_size,
            source_cls=source.cls_index,
            target_cls=target.cls_index,
        )
        return {**weights, "pos_embed": resized}
    if isinstance(source, TimmModel) and isinstance(target, TimmModel):
        return target.weights_of(source)
    return weights


def _first_direction(key: str) -> str:
    """Return the name that the parameter `key` has in the first direction."""
    head, dot, name = key.partition(".mixer.")
    if not dot:
        return key
    stem = name.split(".")[0]
    for suffix in sorted(DIRECTIONS[1:], key=len, reverse=True):
        if stem.endswith(suffix):  # conv1d_b, x_proj_c_b, D_b
            return f"{head}{dot}{name.replace(stem, stem.removesuffix(suffix), 1)}"
        if stem == f"A{suffix}_log":
            return f"{head}{dot}A_log"
    return key
