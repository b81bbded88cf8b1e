"""Load a released weights file into a model of ours or of timm. Nothing is downloaded.

A pickle can run code when it is loaded. So torch's restricted unpickler reads it, which knows tensors, plain containers
and ALLOWED. Sizes are checked before anything is unpacked (`headers`), and a tensor is refused if it is no plain one or
claims more values than the file holds.
Exports of ours are read by `export.load_export`, which proves more.
"""

import argparse
import logging
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import HandoverError, first_line
from pipeline.exports.assumptions import CHOICES, told_by
from pipeline.exports.headers import (
    MAX_TENSORS,
    check_archive,
    check_bare_pickle,
    read_safetensors_header,
)
from pipeline.exports.transfer import Transfer, misshapen
from pipeline.exports.vit_layouts import timm_names
from pipeline.models.timm_model import INSIDE, TimmModel
from pipeline.models.vision_mamba.model import VisionMamba

logger = logging.getLogger(__name__)

# Classes that a pickle may name besides torch's own, and what they become: Vim and ARM store their command line, of which
# only the attributes are read; EfficientViM stores its settings, which are read as a mapping.
ALLOWED = ((argparse.Namespace, "argparse.Namespace"), (OrderedDict, "yacs.config.CfgNode"))
# Keys under which training checkpoints store weights. The averaged weights come first: papers report those.
ENVELOPES = ("model_ema", "state_dict_ema", "model", "state_dict")
# DistributedDataParallel and torch.compile prefix every name, in any order.
_WRAPPED = re.compile(r"^(module\.|_orig_mod\.)+")


class Checkpoint(NamedTuple):
    """What is read from a released file.

    Attributes:
        weights: Tensors by name.
        arguments: The command line that its training stored as `args`, by name; empty without one.
    """

    weights: dict[str, Tensor]
    arguments: Mapping[str, Any]


def read_weights(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """Read the tensors of a released file; see `read_checkpoint`."""
    return read_checkpoint(path, entry).weights


def read_checkpoint(path: Path, entry: str | None = None) -> Checkpoint:
    """Read tensors by name from a .safetensors file or a torch checkpoint. No code in the file runs.

    Args:
        path: The file.
        entry: Key of the weights in a checkpoint; None = the first of ENVELOPES that is there, or the whole file.

    Raises:
        HandoverError: If the file is missing, damaged, or holds anything but weights.
    """
    if not path.is_file():
        raise HandoverError(f"no weights at {path}; put the file there, since nothing is downloaded")
    try:
        state = _read(path)
    except OSError as error:
        raise HandoverError(f"{path} cannot be read: {error.strerror or error}; ask its owner, or copy it") from None
    entries = {str(name): value for name, value in state.items()} if isinstance(state, dict) else {}
    wrapped = entry or next((name for name in ENVELOPES if isinstance(entries.get(name), dict)), None)
    if wrapped is not None:
        if not isinstance(entries.get(wrapped), dict):
            raise HandoverError(f"{path} has no weights under {wrapped!r}; it holds: {_some(entries)}")
        state = entries[wrapped]
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise HandoverError(
            f"{path} holds no state dict (tensors by name), neither at its top nor under {', '.join(ENVELOPES)}"
        )
    if len(state) > MAX_TENSORS:
        raise HandoverError(f"{path} is not read: it has {len(state)} tensors, at most {MAX_TENSORS} are allowed")
    for name, value in state.items():
        if problem := _problem(value):
            raise HandoverError(f"{path}: {str(name)[:100]} {problem}")
    stored = entries.get("args")
    arguments = vars(stored) if isinstance(stored, argparse.Namespace) else stored
    return Checkpoint(
        {_WRAPPED.sub("", str(name)): value for name, value in state.items()},
        arguments if isinstance(arguments, dict) else {},
    )


def _problem(value: Tensor) -> str:
    """Say what keeps a tensor from being plain numbers that the file holds; empty if nothing does."""
    if type(value) not in (Tensor, nn.Parameter) or value.is_nested:
        return "is a tensor of a special class; save plain tensors"
    if value.is_quantized:
        return "is quantised; dequantise it before you save it"
    if value.layout is not torch.strided:
        return f"is sparse ({value.layout}); save it dense"
    if value.device.type != "cpu":
        return f"has no values in this file (device {value.device.type}); save real tensors"
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        return "claims more values than the file holds"
    return ""


def _read(path: Path) -> Any:
    """Read a file by its content: endings are often wrong."""
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise HandoverError(
            f"{path} is only a pointer of Git LFS; type `git lfs pull` where it came from, and copy it again"
        )
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return load_safetensors(path)
    if start.startswith(b"PK"):
        check_archive(path)
    else:
        check_bare_pickle(path)
    return _read_pickle(path)


def _some(names: dict[str, Any]) -> str:
    return ", ".join(name[:60] for name in list(names)[:8])[:300] + (", ..." if len(names) > 8 else "")


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file after its header has been checked.

    Raises:
        HandoverError: It is damaged, or claims more than it holds or than fits in memory.
    """
    read_safetensors_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise HandoverError(f"{path} is no safetensors file, or damaged: {error}") from None


def _read_pickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(ALLOWED)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of formats that are refused below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's text advises to load the file unsafely
        known = ", ".join(name for _, name in ALLOWED)
        raise HandoverError(
            f"{path} is not read: it holds {named.group(1) if named else 'an unknown instruction'}, and anything but tensors,"
            f" plain containers and {known} could run code; if you trust it, load it elsewhere and save its state dict as"
            " safetensors"
        ) from None
    except MemoryError:
        raise HandoverError(f"{path} does not fit in memory; read it on a larger machine") from None
    except Exception as error:  # a damaged archive raises errors of many classes
        said = f"{type(error).__name__}: {first_line(error)}"
        raise HandoverError(f"{path} is no torch checkpoint, or damaged: {said}") from None


def load_weights(model: nn.Module, path: Path) -> Transfer:
    """Load a released file into `model`. Only a classifier of other classes may be left behind and initialised anew.

    Args:
        model: Has `convert`, which renames the file's tensors, and `fresh`, which names what may be new.
        path: The weights file.

    Raises:
        HandoverError: If any other key is missing or left over, or a shape differs.
    """
    (weights, arguments), wanted, left = read_checkpoint(path), model.state_dict(), list[str]()
    if isinstance(model, VisionMamba) and "cls_token" in weights:
        _check_form(model, arguments, path)
    if isinstance(model, TimmModel):
        layout, weights, left = timm_names(weights, [name.removeprefix(INSIDE) for name in wanted])
        logger.info("%s has the layout of %s", path, layout)
    weights = _converted(model, weights, wanted)
    fresh: tuple[str, ...] = model.fresh()  # type: ignore[operator]
    dropped = [k for k, v in weights.items() if k.startswith(fresh) and (k not in wanted or wanted[k].shape != v.shape)]
    weights = {k: v for k, v in weights.items() if k not in dropped}
    problems = [f"{k} is missing" for k in wanted if k not in weights and not _may_lack(k, fresh)]
    problems += [f"{k} has no place here" for k in weights if k not in wanted]
    problems += misshapen(weights, wanted)
    problems += [
        f"{k} holds {v.dtype}, not {wanted[k].dtype}"
        for k, v in weights.items()
        if k in wanted and v.is_floating_point() != wanted[k].is_floating_point()
    ]
    if not problems:
        problems = [
            f"{k} holds NaN or infinity" for k, v in weights.items() if not v.to(wanted[k].dtype).isfinite().all()
        ]
    if problems:
        raise HandoverError(
            f"{path} does not fit this model: {'; '.join(problems[:3])} ({len(problems)} such problems); set model.* to the"
            " model that the file was made for"
        )
    model.load_state_dict(weights, strict=False)
    report = Transfer(
        loaded=[k for k in wanted if k in weights],
        fresh=[k for k in wanted if k not in weights],
        dropped=[*dropped, *left],
    )
    logger.info("weights %s: %s", path, report)
    return report


def _check_form(model: VisionMamba, arguments: Mapping[str, Any], path: Path) -> None:
    """Compare what no shape tells with what the file says of itself; warn if it says nothing.

    Raises:
        HandoverError: They differ.
    """
    told = told_by(arguments)
    for field, ours in (("cls_token", model.cls_position), ("combine", model.combine)):
        words = CHOICES[field].words
        if field not in told:
            logger.warning(
                "%s does not say how its model is built; taken is that %s (model.%s=%s)", path, words[ours], field, ours
            )
        elif told[field].value != ours:
            raise HandoverError(
                f"{path} was made by another model: {told[field]}, but here {words[ours]}; set model.{field}={told[field].value}"
            )


def _converted(model: nn.Module, stored: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a file's tensors for a model.

    Lightning and others keep the network in an attribute, so that all its names begin with `model.`, `net.` or the like.
    If no name fits as it is, such an attribute is left out.
    """
    renamed: dict[str, Tensor] = model.convert(stored)  # type: ignore[operator]
    if renamed.keys() & wanted.keys():
        return renamed
    for attribute in sorted({name.partition(".")[0] for name in stored}):
        head = f"{attribute}."
        inner = {_WRAPPED.sub("", name.removeprefix(head)): v for name, v in stored.items() if name.startswith(head)}
        found: dict[str, Tensor] = model.convert(inner)  # type: ignore[operator]
        if found.keys() & wanted.keys():
            others = len(stored) - len(inner)
            logger.info("names of tensors begin with %r, which is left out; %d others are not used", head, others)
            return found
    return renamed


def _may_lack(key: str, fresh: tuple[str, ...]) -> bool:
    return key.startswith(fresh) or key.endswith("num_batches_tracked")
