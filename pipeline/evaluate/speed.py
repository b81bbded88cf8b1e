"""What a model costs when it answers: parameters, multiply-adds, images per second, memory.

Protocol (SHViT's and VSSD's practice, since EfficientViM ships no script): eval mode, no gradients, warm-up, then rounds in
which the models take turns, so that a slow moment of the machine falls on all; the median round counts. A batch that does
not fit is halved until it does, as for the supplement's high resolutions.
"""

import logging
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import psutil
import torch
from torch import nn

from pipeline.errors import EnvironmentProblem
from pipeline.models.efficientvim.fused import FusedEfficientViM, fuse
from pipeline.models.efficientvim.model import EfficientViM
from pipeline.models.efficientvim.packed import pack
from pipeline.models.flops import forward_flops
from pipeline.models.timm_model import TimmModel

logger = logging.getLogger(__name__)

WARM_UP = 2


class Cost(NamedTuple):
    model: str
    size: int  # pixels a side
    batch: int
    images_per_second: float
    milliseconds: float  # an image
    parameters: int
    gmacs: float  # of one image; papers print it as FLOPs
    memory_gib: float | None  # peak allocated on a GPU; a process on a CPU cannot tell its models apart


def inference(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, int],
    *,
    batch: int,
    rounds: int,
    device: torch.device,
    as_shipped: bool = False,
) -> list[Cost]:
    """Each model on random pixels (batch, 3, size, size) of its size; `as_shipped`: in its deployed form; parameters are
    always those of the trained one. Raises torch's error if not even one image fits.
    """
    timed = {name: model.to(device).eval() for name, model in models.items()}
    if as_shipped:
        timed = {name: deployed(model) for name, model in timed.items()}
    flops = {name: forward_flops(model, (sizes[name], sizes[name])) for name, model in timed.items()}
    if device.type == "cpu":  # on compiled layers, which nothing can count any more
        timed = {name: _packed(model) for name, model in timed.items()}
    with _memory_that_can_run_out(device):
        fitting = {name: _fit(model, sizes[name], batch, device) for name, model in timed.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    memory: dict[str, float | None] = dict.fromkeys(models)
    for k in range(WARM_UP + rounds):
        for name, model in timed.items():
            images = torch.rand(fitting[name], 3, sizes[name], sizes[name], device=device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            with torch.no_grad():
                model(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                memory[name] = torch.cuda.max_memory_allocated(device) / 2**30
            if k >= WARM_UP:
                seconds[name].append(time.perf_counter() - began)
    found = []
    for name, model in models.items():
        took = median(seconds[name])
        found.append(
            Cost(
                model=name,
                size=sizes[name],
                batch=fitting[name],
                images_per_second=fitting[name] / took,
                milliseconds=1000 * took / fitting[name],
                parameters=sum(p.numel() for p in model.parameters()),
                gmacs=flops[name] / 2e9,
                memory_gib=memory[name],
            )
        )
    return found


def deployed(model: nn.Module) -> nn.Module:
    """The same function with fewer operations: ours fused, timm's reparameterised; any other as it is."""
    if isinstance(model, EfficientViM):
        return fuse(model)
    if isinstance(model, TimmModel):
        from timm.utils.model import reparameterize_model

        return reparameterize_model(model.model).eval()
    return model


def _packed(model: nn.Module) -> nn.Module:
    if not isinstance(model, FusedEfficientViM):
        return model
    try:
        return pack(model)
    except EnvironmentProblem as problem:
        logger.warning("timed fused, not packed: %s", problem)
        return model


@contextmanager
def _memory_that_can_run_out(device: torch.device) -> Iterator[None]:
    """On a CPU Linux promises memory that it has not, and kills the process later: inside, such an allocation fails."""
    if device.type != "cpu":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + psutil.virtual_memory().available
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _fit(model: nn.Module, size: int, batch: int, device: torch.device) -> int:
    """The batch, halved until it fits."""
    while True:
        try:
            with torch.no_grad():
                model(torch.rand(batch, 3, size, size, device=device))
            return batch
        except (RuntimeError, MemoryError) as error:
            # torch.OutOfMemoryError is a RuntimeError; a CPU's allocator has no class of its own.
            said = str(error).lower()
            if batch == 1 or not (isinstance(error, MemoryError) or "memory" in said or "bad_alloc" in said):
                raise
            batch //= 2
