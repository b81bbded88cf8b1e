"""Autocast ends where an operator begins: it would compute an operator's inner products in bf16, whatever its inputs are."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate an operator, or the backward of one: inside, autocast is off on the device of its first tensor."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _off(next(argument.device.type for argument in args if isinstance(argument, Tensor))):
            return function(*args, **kwargs)

    return wrapped


def _off(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
