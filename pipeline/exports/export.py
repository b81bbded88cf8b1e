"""The hand-over between stages: weights and card out and in, proved by a probe batch; and what transfers into what."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import HandoverError
from pipeline.exports.card import CARD, PROBE, WEIGHTS, Card
from pipeline.exports.hub import README, TIMM_CONFIG, model_card, timm_config
from pipeline.files import publish, sha256_of
from pipeline.models import build_from_config
from pipeline.models.arm import ARM
from pipeline.models.config import VisionMambaConfig
from pipeline.models.timm_model import INSIDE, TimmModel
from pipeline.models.vision_mamba.mixer import DIRECTIONS
from pipeline.models.vision_mamba.model import VisionMamba
from pipeline.models.vision_mamba.position_embedding import resize_position_embedding

logger = logging.getLogger(__name__)

# The largest difference between a probe's stored answer and the one computed here, over the answer's largest value.
PROBE_TOLERANCE = 1e-3
# What fine-tuning makes anew, and what it leaves behind of a pretrainer: nothing else may be missing or left over.
FRESH = ("head.", "norm_f.", "cls_token")
DROPPED = ("norms.", "to_decoder.", "query", "blocks.", "norm.", "to_pixels.")


def build_from_card(card: Card) -> nn.Module:
    if card.kind == "pretrainer":
        assert card.decoder is not None
        assert isinstance(card.model, VisionMambaConfig)
        return ARM(card.model, card.decoder)
    return build_from_config(card.model)


def write_export(
    folder: Path,
    *,
    card: Card,
    weights: Mapping[str, Tensor],
    fingerprint_images: Tensor,
    labels: Mapping[str, np.ndarray],
) -> Card:
    """Write an export so that it is whole or absent, and return its card with the hashes filled in.

    `weights`: every key of the model's state dict, fp32.  `fingerprint_images` (n, 3, H, W).  `labels`: split -> positions.
    Raises HandoverError for a value that is not finite: nothing non-finite reaches the disk.
    """
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise HandoverError(f"not exported: {len(bad)} tensors hold NaN or infinity, {bad[0]} first")
    model = build_from_card(card).eval()
    model.load_state_dict(dict(weights))
    with torch.no_grad():
        answer = model(fingerprint_images.float())
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "labels").mkdir(parents=True)
    inside = INSIDE if isinstance(model, TimmModel) else ""
    save_file({k.removeprefix(inside): v.float().contiguous() for k, v in weights.items()}, temporary / WEIGHTS)
    save_file({"images": fingerprint_images.float().contiguous(), "answer": answer.contiguous()}, temporary / PROBE)
    for split, positions in labels.items():
        np.save(temporary / "labels" / f"{split}.npy", positions)
    seen = tuple(
        s.model_copy(update={"positions_sha256": sha256_of(temporary / "labels" / f"{s.split}.npy")})
        if s.dataset
        else s
        for s in card.labels_seen
    )
    hashes = {
        "labels_seen": seen,
        "weights_sha256": sha256_of(temporary / WEIGHTS),
        "fingerprint_sha256": sha256_of(temporary / PROBE),
    }
    card = card.model_copy(update=hashes).sealed()
    (temporary / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n")
    known_to_timm = timm_config(card, model)
    (temporary / README).write_text(model_card(card, folder.name, for_timm=known_to_timm is not None))
    if known_to_timm is not None:
        (temporary / TIMM_CONFIG).write_text(json.dumps(known_to_timm, indent=1) + "\n")
    publish(temporary, folder)
    return card


def load_export(folder: Path) -> tuple[nn.Module, Card]:
    """The model of a verified export, on the CPU in fp32, after it gave the stored answer to its probe batch."""
    card = Card.read(folder)
    card.verify(folder)
    model = build_from_card(card).eval()
    inside = INSIDE if isinstance(model, TimmModel) else ""
    weights = {f"{inside}{k}": v for k, v in load_file(folder / WEIGHTS).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise HandoverError(
            f"{folder} does not hold the model its card describes: {len(missing)} missing ({_first(missing)}),"
            f" {len(unexpected)} unexpected ({_first(unexpected)})"
        )
    probe = load_file(folder / PROBE)
    with torch.no_grad():
        answer = model(probe["images"])
    error = float((answer - probe["answer"]).abs().max() / probe["answer"].abs().max().clamp(min=1e-12))
    if not error <= PROBE_TOLERANCE:
        raise HandoverError(
            f"{folder}: the loaded model answers its probe batch with a relative error of {error:.1e}"
            f" (allowed {PROBE_TOLERANCE:.0e}); its code or kernels differ from those that exported it"
        )
    logger.info("loaded %s: %d tensors, probe error %.1e", folder, len(model.state_dict()), error)
    return model, card


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What became of every tensor."""

    loaded: list[str]
    fresh: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        fresh, dropped = (
            ", ".join(sorted(self.fresh)) or "none",
            ", ".join(sorted({d.split(".")[0] for d in self.dropped})) or "none",
        )
        return f"loaded {len(self.loaded)}/{len(self.loaded) + len(self.fresh)} tensors; new: {fresh}; left behind: {dropped}"


def transfer(source: nn.Module, target: nn.Module, where: Path) -> Transfer:
    """Load `target` from an exported model: a classifier whole, or a pretrainer's backbone into a Vision Mamba (ARM 2.4).

    From a pretrainer, the one direction's parameters start all directions, positions are resized to the new grid
    with an empty slot for the cls token, and FRESH is left as initialised. A classifier may have been trained on images of
    another size: its positions, if it has any, are resized. Raises HandoverError for any other key or shape that does
    not fit.
    """
    weights = source.state_dict()
    dropped: list[str] = []
    if isinstance(source, ARM):
        if not isinstance(target, VisionMamba):
            raise HandoverError(f"{where} is a pretrained Vision Mamba, which cannot start another kind of model")
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
    problems = [
        f"{k} is {tuple(weights[k].shape)} there and {tuple(v.shape)} here"
        for k, v in wanted.items()
        if k in weights and weights[k].shape != v.shape
    ]
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


def _at_this_size(weights: dict[str, Tensor], source: nn.Module, target: nn.Module) -> dict[str, Tensor]:
    """A classifier's weights with positions for the target's images."""
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
    """The name that the parameter `key` has in the first direction."""
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


def _first(names: list[str]) -> str:
    return names[0] if names else "none"
