"""The hand-over between stages: write a model and its card as an export, and load it again with proof."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import HandoverError, PipelineError, first_line
from pipeline.exports.card import CARD, FINGERPRINT, WEIGHTS, Card
from pipeline.exports.fingerprint import TOLERANCE, Fingerprint
from pipeline.exports.headers import Claim, read_safetensors_header
from pipeline.exports.hub import README, TIMM_CONFIG, model_card, timm_alone_has, timm_config
from pipeline.exports.tensors import write_tensors
from pipeline.exports.weights import load_safetensors
from pipeline.files import replacing, sha256_of
from pipeline.models import build_from_config
from pipeline.models.arm import ARM
from pipeline.models.config import VisionMambaConfig
from pipeline.models.timm_model import INSIDE, TimmModel

logger = logging.getLogger(__name__)

MAX_FINGERPRINT_IMAGES = 64  # a stage stores 4


def build_from_card(card: Card) -> nn.Module:
    """Build the model that a card describes, with freshly initialised weights."""
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
    """Write an export so that it is whole or absent.

    Args:
        folder: Where to write. An export that is already there is replaced.
        card: The card without hashes.
        weights: Every key of the model's state dict, fp32.
        fingerprint_images: Normalised images, (N, 3, H, W).
        labels: Sample indices of the labelled images, for every split that the card lists with a dataset.

    Returns:
        The card with all hashes.

    Raises:
        HandoverError: If a value is not finite. Nothing is written then.
    """
    bad = [name for name, value in weights.items() if not torch.isfinite(value).all()]
    if bad:
        raise HandoverError(f"{folder} is not written: {len(bad)} tensors hold NaN or infinity, {bad[0]} first")
    model = build_from_card(card).eval()
    model.load_state_dict(dict(weights))
    fingerprint = Fingerprint.of(model, fingerprint_images)
    inside = INSIDE if isinstance(model, TimmModel) else ""
    with replacing(folder) as temporary:
        (temporary / "labels").mkdir(parents=True)
        write_tensors(temporary / WEIGHTS, {k.removeprefix(inside): v.float().contiguous() for k, v in weights.items()})
        fingerprint.write(temporary / FINGERPRINT)
        for split, indices in labels.items():
            np.save(temporary / "labels" / f"{split}.npy", indices)
        card = card.model_copy(
            update={
                "labels_seen": tuple(
                    seen.model_copy(
                        update={"sample_indices_sha256": sha256_of(temporary / "labels" / f"{seen.split}.npy")}
                    )
                    if seen.dataset
                    else seen
                    for seen in card.labels_seen
                ),
                "weights_sha256": sha256_of(temporary / WEIGHTS),
                "fingerprint_sha256": sha256_of(temporary / FINGERPRINT),
            }
        ).sealed()
        (temporary / CARD).write_text(json.dumps(card.model_dump(mode="json"), indent=1) + "\n")
        known_to_timm = timm_config(card, model)
        (temporary / README).write_text(model_card(card, folder.name, for_timm=timm_alone_has(known_to_timm)))
        if known_to_timm is not None:
            (temporary / TIMM_CONFIG).write_text(json.dumps(known_to_timm, indent=1) + "\n")
        _share_alike(temporary)
    return card


def _share_alike(folder: Path) -> None:
    """Give every file the mode that the umask decides: safetensors writes files that only their owner can read."""
    mode = (folder / CARD).stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def load_export(folder: Path, *, hashed: bool = False) -> tuple[nn.Module, Card]:
    """Load the model of an export, and prove it.

    Args:
        folder: The export.
        hashed: Whether another rank of this node has compared the hashes already (`Card.verify`).

    Returns:
        The model in eval mode, on the CPU in fp32, and its card.

    Raises:
        HandoverError: If the export is incomplete or damaged, if its weights do not fit its card, or if the model
            returns other outputs for the fingerprint batch than the stored ones.
    """
    card = Card.read(folder)
    if not hashed:
        card.verify(folder)
    _check_claims(folder, card)
    model = build_from_card(card).eval()
    inside = INSIDE if isinstance(model, TimmModel) else ""
    weights = {f"{inside}{k}": v for k, v in load_safetensors(folder / WEIGHTS).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise HandoverError(
            f"{folder} does not hold the model that its card describes: {len(missing)} tensors are missing"
            f" ({_first(missing)}), {len(unexpected)} are unexpected ({_first(unexpected)}); export it again"
        )
    fingerprint = Fingerprint.read(folder / FINGERPRINT)
    found = Fingerprint.of(model, fingerprint.images).outputs
    if found.shape != fingerprint.outputs.shape:
        raise HandoverError(
            f"{folder} stores outputs of shape {tuple(fingerprint.outputs.shape)}, but its model returns"
            f" {tuple(found.shape)}; export it again"
        )
    error = fingerprint.error(found)
    if not error <= TOLERANCE:
        raise HandoverError(
            f"{folder}: the loaded model's outputs for the fingerprint batch have a relative error of {error:.1e}"
            f" (allowed {TOLERANCE:.0e}); code or kernels differ from those that exported it: use the commit"
            f" {card.lineage.commit[:12] or 'that wrote it'}, or export it again"
        )
    logger.info("loaded %s: %d tensors, fingerprint error %.1e", folder, len(model.state_dict()), error)
    return model, card


def _check_claims(folder: Path, card: Card) -> None:
    """Compare the headers of both files with the model that the card describes, before any memory is taken.

    Raises:
        HandoverError: A tensor is missing, unexpected or of another shape, or the fingerprint batch does not fit.
    """
    claims = read_safetensors_header(folder / WEIGHTS)
    blocks = sum(getattr(card.model, "depths", (getattr(card.model, "depth", 0),)))
    if blocks > len(claims):
        raise HandoverError(f"{folder}: its card names {blocks} blocks, but only {len(claims)} tensors are stored")
    wanted = _wanted(folder, card)
    missing, unexpected = sorted(wanted.keys() - claims), sorted(claims.keys() - wanted)
    if missing or unexpected:
        raise HandoverError(
            f"{folder} does not hold the model that its card describes: {len(missing)} tensors are missing"
            f" ({_first(missing)}), {len(unexpected)} are unexpected ({_first(unexpected)}); export it again"
        )
    for name, shape in wanted.items():
        if claims[name] != Claim("F32", shape):
            raise HandoverError(
                f"{folder} does not hold the model that its card describes: {name} is {claims[name].dtype}"
                f" {claims[name].shape} there, the card says F32 {shape}; export it again"
            )
    batch = read_safetensors_header(folder / FINGERPRINT)
    images = batch["images"].shape if batch.keys() == {"images", "outputs"} else ()
    expected = (card.model.in_chans, *card.model.image_size)
    if images[1:] != expected or not 1 <= images[0] <= MAX_FINGERPRINT_IMAGES:
        raise HandoverError(
            f"{folder / FINGERPRINT} holds no images of shape {expected}, which the card's model takes; export it again"
        )


def _wanted(folder: Path, card: Card) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the card's model by its stored name."""
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = build_from_card(card)
    except (PipelineError, RuntimeError, ValueError, TypeError, AssertionError, ArithmeticError) as error:
        raise HandoverError(
            f"{folder}: no model can be built from its card ({first_line(error)}); export it again"
        ) from None
    inside = INSIDE if isinstance(model, TimmModel) else ""
    return {name.removeprefix(inside): tuple(value.shape) for name, value in model.state_dict().items()}


def load_classifier(folder: Path) -> tuple[nn.Module, Card]:
    """Load an export as `load_export` does, and refuse a pretrainer before its weights are read.

    Raises:
        ConfigError: If the export holds a pretrainer.
        HandoverError: As for `load_export`.
    """
    Card.read(folder).check_classifier(folder)
    return load_export(folder)


def _first(names: list[str]) -> str:
    return names[0] if names else "none"
