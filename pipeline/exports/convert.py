"""Released weights into an export of ours: the model told by the shapes, every key in its place or named."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.errors import ConfigError, HandoverError
from pipeline.exports.card import Card, LabelsSeen, Lineage, Parent, Preprocessing
from pipeline.exports.export import build_from_card, write_export
from pipeline.exports.released import ImageSize, Layout, layout_of, starred
from pipeline.exports.weights import read_weights
from pipeline.files import sha256_of

logger = logging.getLogger(__name__)

IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NUM_PROBE_IMAGES = 2


def convert(
    path: Path, folder: Path, *, entry: str | None = None, image_size: ImageSize = None, classes: tuple[str, ...] = ()
) -> Card:
    """Write the weights in the released file `path` (as `read_weights` finds them) as an export; returns its card.

    `image_size` (height, width) decides where positions do not (no square; patches that overlap). `classes` names the
    outputs of a classifier, in order; none: their numbers. Raises HandoverError for a file that is damaged, wants to
    run code, or does not fit to the last key; ConfigError for a folder that is taken or the wrong number of names.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; give --out a folder that does not")
    weights = read_weights(path, entry)
    try:
        layout = layout_of(weights)
        model, decoder = layout.describe(weights, image_size)
    except HandoverError as error:
        raise HandoverError(f"{path}: {error}") from None
    except ValidationError as error:
        raise HandoverError(f"{path}: its shapes describe no model: {error.errors()[0]['msg']}") from None
    if classes and len(classes) != model.num_classes:
        raise ConfigError(f"{len(classes)} class names for the {model.num_classes} classes of {path}")
    digest = sha256_of(path)
    card = Card(
        kind="pretrainer" if decoder else "classifier",
        model=model,
        decoder=decoder,
        classes=classes or tuple(map(str, range(model.num_classes))),
        preprocessing=IMAGENET,
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
    pictures = torch.randn(
        NUM_PROBE_IMAGES, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(0)
    )
    card = write_export(folder, card=card, weights=ours, fingerprint_images=pictures, labels={})
    count = sum(value.numel() for value in ours.values()) / 1e6
    spelt = ", ".join(f"{name} {value}" for name, value in model if value not in (None, "none", False))
    logger.info("%s: %s, %.2f M values: %s", path, layout.name, count, spelt)
    logger.info(
        "%d keys in place, %d computed here and found equal; nothing left over", len(ours), len(weights) - len(ours)
    )
    return card


def rename(weights: dict[str, Tensor], layout: Layout, card: Card, path: Path) -> dict[str, Tensor]:
    """The weights under our names, whole: raises HandoverError that names every key without a place, missing or misshapen."""
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
        raise HandoverError(f"{path} is laid out like {layout.name}, but not to the last key: {'; '.join(wrong)}")
    return ours


def _labels_of(path: Path, digest: str) -> LabelsSeen:
    """Foreign weights have seen labels nobody can enumerate."""
    return LabelsSeen(
        split=f"released-{digest[:12]}", protocol=f"whatever {path.name} was trained on", count=0, dataset=None
    )


def _long_sides(tensor: Tensor) -> list[int]:
    """Its shape without sides of 1: EfficientViM's norms are (1, D, 1) as released."""
    return [side for side in tensor.shape if side != 1]


def _list(keys: Iterable[str]) -> str:
    """All the names, those of the blocks once."""
    return ", ".join(sorted({starred(key) for key in keys}))
