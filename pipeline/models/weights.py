"""Weights from outside: a file somebody released, into a model of ours or of timm. Nothing is ever downloaded.

An export of ours is not read here but by `export.load_export`, which knows and proves more.
"""

import logging
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.errors import HandoverError
from pipeline.models.export import Transfer

logger = logging.getLogger(__name__)

# Training checkpoints wrap the weights; the averaged ones are those that were reported.
ENVELOPES = ("model_ema", "model", "state_dict")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a safetensors file or in one that torch loads with weights_only. Raises HandoverError."""
    if not path.is_file():
        raise HandoverError(f"no weights at {path}; put the file there: nothing is downloaded")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise HandoverError(
            f"{path} is no safetensors file and no plain state dict ({str(error).splitlines()[0]}); a checkpoint that holds"
            " other objects must be opened where it is trusted and its state dict saved as safetensors"
        ) from None
    for envelope in ENVELOPES:
        if isinstance(state, dict) and isinstance(state.get(envelope), dict):
            state = state[envelope]
            break
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise HandoverError(f"{path} holds no state dict (names of tensors); known wrappings: {', '.join(ENVELOPES)}")
    return {name.removeprefix("module."): value for name, value in state.items()}


def load_weights(model: nn.Module, path: Path) -> Transfer:
    """Load a released file into `model`. Its classifier may be left behind and made anew, nothing else.

    The model's `convert` gives the file's tensors its own names, `fresh` names what may be new.
    Raises HandoverError for any other key or shape that does not fit.
    """
    weights, wanted = model.convert(read_weights(path)), model.state_dict()  # type: ignore[operator]
    fresh: tuple[str, ...] = model.fresh()  # type: ignore[operator]
    dropped = [k for k, v in weights.items() if k.startswith(fresh) and (k not in wanted or wanted[k].shape != v.shape)]
    weights = {k: v for k, v in weights.items() if k not in dropped}
    problems = [f"{k} is missing" for k in wanted if k not in weights and not _may_lack(k, fresh)]
    problems += [f"{k} has no place here" for k in weights if k not in wanted]
    problems += [
        f"{k} is {tuple(weights[k].shape)} there and {tuple(v.shape)} here"
        for k, v in wanted.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if problems:
        raise HandoverError(
            f"{path} does not fit this model: {problems[0]} ({len(problems)} such); choose the model it was made for"
        )
    model.load_state_dict(weights, strict=False)
    report = Transfer(
        loaded=[k for k in wanted if k in weights], fresh=[k for k in wanted if k not in weights], dropped=dropped
    )
    logger.info("weights %s: %s", path, report)
    return report


def _may_lack(key: str, fresh: tuple[str, ...]) -> bool:
    return key.startswith(fresh) or key.endswith("num_batches_tracked")
