"""Measure what inference costs: parameters, multiply-adds, images per second, memory.

Protocol (that of SHViT and VSSD, since EfficientViM publishes no script): eval mode, no gradients, warm-up, then rounds in
which the models take turns, so that a slow moment of the machine slows them all. The median round counts. A batch that does
not fit in memory is halved until it does, as for the high resolutions of EfficientViM's supplement.
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
from pipeline.models.efficientvim import packed as efficientvim
from pipeline.models.efficientvim.fused import FusedEfficientViM, fuse
from pipeline.models.efficientvim.model import EfficientViM
from pipeline.models.flops import forward_flops
from pipeline.models.timm_model import TimmModel
from pipeline.models.vision_mamba import packed as vision_mamba
from pipeline.models.vision_mamba.model import VisionMamba

logger = logging.getLogger(__name__)

WARM_UP = 2  # rounds


class Cost(NamedTuple):
    """Cost of one model at one size.

    Attributes:
        model: Its name.
        size: Pixels on a side of the images.
        batch: Images in a batch.
        images_per_second: Throughput in the median round.
        milliseconds: Time for one image in the median round.
        parameters: Parameters of the trained model.
        gmacs: Multiply-adds for one image, in units of 1e9; papers print them as FLOPs.
        memory_gib: Peak memory allocated on a GPU; None on a CPU, where a process cannot tell its models apart.
    """

    model: str
    size: int
    batch: int
    images_per_second: float
    milliseconds: float
    parameters: int
    gmacs: float
    memory_gib: float | None


def measure_inference(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, int],
    *,
    batch: int,
    rounds: int,
    device: torch.device,
    deployed: bool = False,
) -> list[Cost]:
    """Measure each model on batches of random pixels, in turns.

    Args:
        models: Models by name.
        sizes: Pixels on a side of each model's square images.
        batch: Images in a batch, before any halving.
        rounds: Rounds that count, after `WARM_UP` others.
        device: Where the models run.
        deployed: Measure `deployed_form` of each model; on a CPU, its `packed_form`.

    Returns:
        One cost for each model, in order.

    Raises:
        RuntimeError: Not even one image fits in memory (or torch's `OutOfMemoryError`, or MemoryError).
    """
    timed = {name: model.to(device).eval() for name, model in models.items()}
    if deployed:
        timed = {name: deployed_form(model) for name, model in timed.items()}
    flops = {name: forward_flops(model, (sizes[name], sizes[name])) for name, model in timed.items()}
    if deployed and device.type == "cpu":  # after the FLOPs were counted: torch's counter does not see compiled layers
        timed = {name: packed_form(model) for name, model in timed.items()}
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


def deployed_form(model: nn.Module) -> nn.Module:
    """Rewrite a model to fewer operations: EfficientViM is fused, timm's models are reparameterised, others are unchanged."""
    if isinstance(model, EfficientViM):
        return fuse(model)
    if isinstance(model, TimmModel):
        from timm.utils.model import reparameterize_model

        return reparameterize_model(model.model).eval()
    return model


def packed_form(model: nn.Module) -> nn.Module:
    """Put a fused EfficientViM or a Vision Mamba on compiled layers; without a compiler, or of another kind, it is as given."""
    try:
        if isinstance(model, FusedEfficientViM):
            return efficientvim.pack(model)
        if isinstance(model, VisionMamba):
            return vision_mamba.pack(model)
    except EnvironmentProblem as problem:
        logger.warning("%s is timed without compiled layers: %s", type(model).__name__, problem)
    return model


@contextmanager
def _memory_that_can_run_out(device: torch.device) -> Iterator[None]:
    """Make an allocation that a CPU has no memory for fail; by default Linux grants it and kills the process later."""
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
    """Return the batch size, halved until a batch fits in memory."""
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
