"""Functions that run as ranks, in processes of their own."""

from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from pipeline.cli import leave


def run_ranks(function: Callable[..., None], *arguments: Any, number: int = 2) -> None:
    """Run `function(rank, *arguments)` in each of `number` ranks to its end; raises what a rank raises."""
    mp.spawn(_rank, (function, *arguments), nprocs=number)


def _rank(rank: int, function: Callable[..., None], *arguments: Any) -> None:
    """Ends as a stage's rank does: in the exit handlers of Python a thread of gloo may still run, and C++ aborts then."""
    function(rank, *arguments)
    leave(0)
