"""Released weights into an export of ours: read without running anything, every key in its place or named.

A pickle can run code when it is loaded, so torch's restricted unpickler reads it, which knows tensors and plain
containers, and beside them only ALLOWED. No size that a file claims is made unless the file holds as many values.
"""

import argparse
import logging
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import ConfigError, HandoverError
from pipeline.files import sha256_of
from pipeline.models.card import Card, LabelsSeen, Lineage, Parent, Preprocessing
from pipeline.models.export import build_from_card, write_export
from pipeline.models.released import ImageSize, Layout, layout_of, starred

logger = logging.getLogger(__name__)

# Classes a pickle may name beside torch's own. ARM's and Vim's files keep their command line in a Namespace: only attributes.
ALLOWED = (argparse.Namespace,)
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
NUM_PROBE_IMAGES = 2


def convert(
    path: Path, folder: Path, *, entry: str = "model", image_size: ImageSize = None, classes: tuple[str, ...] = ()
) -> Card:
    """Write the weights under `entry` of the released file `path` as an export; returns its card.

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
        probe_sha256="",
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
    card = write_export(folder, card=card, weights=ours, probe_images=pictures, labels={})
    count = sum(value.numel() for value in ours.values()) / 1e6
    logger.info("%s: %s, read as %s, %.2f M values", path, layout.name, card.model.model_dump(), count)
    logger.info(
        "%d keys in place, %d computed here and found equal; nothing left over", len(ours), len(weights) - len(ours)
    )
    return card


def read_weights(path: Path, entry: str) -> dict[str, Tensor]:
    """The tensors by name of a .safetensors file, or of `entry` in a torch checkpoint (or its whole, if it is the weights)."""
    if not path.is_file():
        raise HandoverError(f"no file at {path}")
    content: Any = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not isinstance(content, dict) or not content:
        raise HandoverError(f"{path} holds a {type(content).__name__}, not the weights by their names")
    if not all(isinstance(value, Tensor) for value in content.values()):
        if not isinstance(content.get(entry), dict):
            raise HandoverError(
                f"{path} has no weights under {entry!r}; give --entry one of: {', '.join(map(str, content))}"
            )
        content = content[entry]
    odd = [str(name) for name, value in content.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if odd:
        raise HandoverError(
            f"{path}: {_list(odd)} under {entry!r} are no tensors; give --entry the one that holds weights"
        )
    hollow = [name for name, v in content.items() if v.untyped_storage().nbytes() < v.numel() * v.element_size()]
    if hollow:
        raise HandoverError(f"{path}: {_list(hollow)} claim more values than the file holds")
    # DistributedDataParallel and torch.compile prefix every name.
    return {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in content.items()}


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
        elif value.shape != wanted[name].shape:
            wrong.append(f"{key} is {tuple(value.shape)}, not {tuple(wanted[name].shape)}")
        elif not value.is_floating_point():
            wrong.append(f"{key} holds {value.dtype}")
        else:
            ours[name] = value.float()
    if unknown:
        wrong.append(f"no place for {_list(unknown)}")
    if len(ours) < len(wanted) and not wrong:
        wrong.append(f"{_list(set(wanted) - set(ours))} missing")
    if wrong:
        raise HandoverError(f"{path} is laid out like {layout.name}, but not to the last key: {'; '.join(wrong)}")
    return ours


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise HandoverError(f"{path} is no safetensors file: {error}") from None


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(ALLOWED)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's text advises to load it all the same
        allowed = ", ".join(f"{c.__module__}.{c.__qualname__}" for c in ALLOWED)
        raise HandoverError(
            f"{path} is not read: it holds {named.group(1) if named else 'an unknown instruction'}, and anything but tensors,"
            f" plain containers and {allowed} could run code; ask its author for a file of weights alone"
        ) from None
    except Exception as error:  # a damaged archive raises whatever its reader stumbles over
        said = f"{type(error).__name__} {error}".splitlines()[0][:200]
        raise HandoverError(f"{path} is no torch checkpoint, or damaged: {said}") from None


def _labels_of(path: Path, digest: str) -> LabelsSeen:
    """Foreign weights have seen labels nobody can enumerate."""
    return LabelsSeen(
        split=f"released-{digest[:12]}", protocol=f"whatever {path.name} was trained on", count=0, dataset=None
    )


def _list(keys: Iterable[str]) -> str:
    """All the names, those of the blocks once."""
    return ", ".join(sorted({starred(key) for key in keys}))
