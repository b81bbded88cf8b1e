"""Convert released weights to an export. The shapes tell the model; every key is placed, or the file is refused."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.errors import ConfigError, HandoverError
from pipeline.exports.assumptions import decide
from pipeline.exports.card import IMAGENET, Card, LabelsSeen, Lineage, Parent
from pipeline.exports.export import build_from_card, write_export
from pipeline.exports.released import ImageSize, Layout, layout_of, starred
from pipeline.exports.weights import read_checkpoint
from pipeline.files import sha256_of
from pipeline.models.family import FamilyConfig

logger = logging.getLogger(__name__)

NUM_FINGERPRINT_IMAGES = 2


def convert(
    path: Path,
    folder: Path,
    *,
    entry: str | None = None,
    image_size: ImageSize = None,
    classes: tuple[str, ...] = (),
    form: Mapping[str, str] | None = None,
) -> Card:
    """Write the weights of a released file as an export.

    Args:
        path: The file, which `read_checkpoint` reads.
        folder: The export, which must not exist.
        entry: Key of the weights in a checkpoint, as for `read_checkpoint`.
        image_size: Height and width in pixels, where the number of patches does not tell them (patches that overlap or
            do not lie in a square).
        classes: Names of a classifier's classes, in the order of the logits; empty = their numbers.
        form: Fields of the model's config that no shape tells (`assumptions.CHOICES`). What is not given is read from the
            arguments that the file stores, or assumed with a warning.

    Returns:
        The export's card.

    Raises:
        ConfigError: If the folder exists, or the number of names is wrong.
        HandoverError: If the file is damaged, could run code, or has a key that does not fit.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; give --out a folder that does not")
    weights, arguments = read_checkpoint(path, entry)
    try:
        layout = layout_of(weights)
        model, decoder = layout.describe(weights, image_size)
        decisions = decide(layout.left_open(weights), form or {}, arguments, certain=layout.certain)
        model = model.model_copy(update={decision.field: decision.value for decision in decisions})
    except HandoverError as error:
        raise HandoverError(f"{path}: {error}") from None
    except ValidationError as error:
        raise HandoverError(f"{path}: its shapes describe no model: {error.errors()[0]['msg']}") from None
    if classes and len(classes) != model.num_classes:
        raise ConfigError(f"{len(classes)} class names for the {model.num_classes} classes of {path}")
    for decision in decisions:
        if decision.guessed:
            logger.warning("WARNING: %s leaves open how its model computes: %s", path, decision)
    digest = sha256_of(path)
    assumptions = (*map(str, decisions), *layout.assumed, *_of_the_images(layout, model, image_size))
    card = Card(
        kind="pretrainer" if decoder else "classifier",
        model=model,
        decoder=decoder,
        classes=classes or tuple(map(str, range(model.num_classes))),
        preprocessing=IMAGENET.model_copy(update={"view": layout.view(model.image_size)}),
        assumptions=assumptions,
        weights_sha256="",
        fingerprint_sha256="",
        lineage=Lineage(
            stage="convert",
            config_sha256="",
            commit="",
            dataset="",
            split=None,
            parents=(Parent(role=layout.name, path=str(path), weights_sha256=digest),),
        ),
        labels_seen=() if decoder else (_labels_of(path, digest),),
    )
    ours = rename(weights, layout, card, path)
    fingerprint_images = torch.randn(
        NUM_FINGERPRINT_IMAGES, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(0)
    )
    card = write_export(folder, card=card, weights=ours, fingerprint_images=fingerprint_images, labels={})
    count = sum(value.numel() for value in ours.values()) / 1e6
    fields = ", ".join(f"{name} {value}" for name, value in model if value not in (None, "none", False))
    logger.info("%s: %s, %.2f M values: %s", path, layout.name, count, fields)
    for assumption in assumptions:
        logger.info("taken for granted: %s", assumption)
    logger.info("%d tensors loaded, %d computed here and equal, none left over", len(ours), len(weights) - len(ours))
    return card


def _of_the_images(layout: Layout, model: FamilyConfig, given: ImageSize) -> tuple[str, str]:
    """Say what is taken for granted about the images, which no weight knows."""
    height, width = model.image_size
    return (
        f"images are {height} x {width} pixels: {'given by --image-size' if given else layout.size}",
        "pixels are normalised by ImageNet's mean and standard deviation, and an evaluation shows them as the project's own"
        f" does: {layout.view(model.image_size).words}",
    )


def rename(weights: dict[str, Tensor], layout: Layout, card: Card, path: Path) -> dict[str, Tensor]:
    """Return all weights under our names.

    Args:
        weights: Tensors by released name.
        layout: How the release names them.
        card: Describes the model.
        path: The released file, for messages.

    Raises:
        HandoverError: If a key has no place, is missing or has another shape. The sentence names them all.
    """
    with torch.device("meta"):
        model = build_from_card(card)
    wanted, computed = model.state_dict(), layout.computed(model)
    ours: dict[str, Tensor] = {}
    unknown, wrong = [], []
    for key, value in weights.items():
        name = layout.our_name(key)
        if key in computed:
            if value.shape != computed[key].shape or not torch.allclose(value.float(), computed[key], atol=1e-4):
                wrong.append(f"{key} is not what our model computes")
        elif name not in wanted:
            unknown.append(key)
        elif _long_sides(value) != _long_sides(wanted[name]):
            wrong.append(f"{key} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}")
        elif value.is_floating_point() != wanted[name].is_floating_point():
            wrong.append(f"{key} holds {value.dtype}")
        else:
            ours[name] = value.reshape(wanted[name].shape).float()
    if unknown:
        wrong.append(f"no place for {_list(unknown)}")
    if len(ours) < len(wanted) and not wrong:
        wrong.append(f"{_list(set(wanted) - set(ours))} missing")
    if wrong:
        raise HandoverError(f"{path} has the layout {layout.name}, but not all of its keys fit: {'; '.join(wrong)}")
    return ours


def _labels_of(path: Path, digest: str) -> LabelsSeen:
    """Released weights have seen labels that nobody can enumerate."""
    return LabelsSeen(
        split=f"released-{digest[:12]}", protocol=f"whatever {path.name} was trained on", count=0, dataset=None
    )


def _long_sides(tensor: Tensor) -> list[int]:
    """Return the shape without dimensions of size 1: EfficientViM's released norms are (1, D, 1)."""
    return [side for side in tensor.shape if side != 1]


def _list(keys: Iterable[str]) -> str:
    """List the names; a name that all blocks share appears once."""
    return ", ".join(sorted({starred(key) for key in keys}))
