"""How long a step takes on this machine, and what it keeps in memory: a few real forward and backward passes.

Only the networks and the views are timed, in this process. What the engine, the loaders and the log add is OVERHEAD.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import psutil
import torch

from launchers.plan.profile import Profile, build, profile
from pipeline.images import Pixels
from pipeline.streaming.config import AugmentConfig
from pipeline.streaming.transforms import train_views
from pipeline.train.config import OptimConfig
from pipeline.train.optim import Trainable, make_optimizer
from stages import spec_of
from stages.check import Pending, parent_models
from stages.configs.base import StageConfig
from stages.spec import Network

MOST_IMAGES = 64  # images in a timed pass; a larger step is scaled from it
SECONDS = 1.5  # a measurement repeats its call for so long, after a first one
OVERHEAD = 1.3  # seconds of a real step over those of its networks and views, on two cores


class Timing(NamedTuple):
    """What a stage needs on this machine.

    Attributes:
        cost: Of an optimizer step of the global batch, on one process: seconds, or 10^12 FLOPs where they are counted.
        bytes_per_sample: Activations per sample of the first stream, those of the other streams included.
        free: Bytes of the device's free memory.
    """

    cost: float
    bytes_per_sample: int
    free: int


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    return torch.cuda.is_available()


def time_stage(
    config: StageConfig,
    num_classes: int,
    pending: Pending,
    pictures: Sequence[Pixels],
    drawn: Sequence[tuple[AugmentConfig, int]],
) -> Timing:
    """Measure a stage.

    Args:
        config: Its config; the number of steps does not matter.
        num_classes: Classes of the dataset.
        pending: The configs of the stages before it, by the folder of the export that each will write.
        pictures: Decoded images to make views of.
        drawn: The augmentations of a step, each with its number of views per sample of the first stream.
    """
    workload = spec_of(config).workload(config, num_classes, parent_models(config, num_classes, pending))
    body, size = profile(config, num_classes, pending), workload.student.model.image_size
    global_batch = config.loop.global_batch
    per_step = _train(workload.student, workload.student.trained_images * global_batch, config.optim)
    for network in workload.networks:
        if network.inferred_images:
            per_step += _infer(network, network.inferred_images * global_batch)
    for augment, number in drawn:
        per_step += _view(augment, size, config, pictures) * number * global_batch / min(2, psutil.cpu_count() or 1)
    return _timing(OVERHEAD * per_step, body)


def count_stage(config: StageConfig, num_classes: int, pending: Pending) -> Timing:
    """Count the work of a stage, the same on every machine: that of its networks, not of views and of the optimizer.

    Args:
        config: Its config; the number of steps does not matter.
        num_classes: Classes of the dataset.
        pending: As for `time_stage`.
    """
    body = profile(config, num_classes, pending)
    return _timing(1e-12 * body.work.flops * config.loop.global_batch, body)


def _timing(cost: float, body: Profile) -> Timing:
    free = torch.cuda.mem_get_info()[0] if has_gpu() else psutil.virtual_memory().available
    weights = 16 * sum(p.numel for p in body.parameters) * (1 + len(body.workload.averages))
    return Timing(cost, body.image_activations * body.workload.images, max(0, free - weights - body.fixed_activations))


def _device() -> torch.device:
    return torch.device("cuda" if has_gpu() else "cpu")


def _train(network: Network, images: int, optim: OptimConfig) -> float:
    """Seconds of an optimizer step of so many images."""
    device, number = _device(), min(images, MOST_IMAGES)
    model = build(network).to(device).train()
    optimizer = make_optimizer(cast(Trainable, model), optim)
    batch = torch.randn(number, 3, *network.model.image_size, device=device)

    def passes() -> None:
        output = model(batch)
        first = output[0] if isinstance(output, tuple) else output
        optimizer.zero_grad()
        first.float().square().mean().backward()

    # The update costs the same for any number of images, Muon's products above all.
    return _seconds(passes) * images / number + _seconds(optimizer.step)


@torch.no_grad()
def _infer(network: Network, images: int) -> float:
    """Seconds of a forward pass of so many images."""
    device, number = _device(), min(images, MOST_IMAGES)
    model = build(network).to(device).eval()
    batch = torch.randn(number, 3, *network.model.image_size, device=device)
    return _seconds(lambda: model(batch)) * images / number


def _view(augment: AugmentConfig, size: tuple[int, int], config: StageConfig, pictures: Sequence[Pixels]) -> float:
    """Seconds of one training view."""
    views = train_views(size, augment, config.data.mean, config.data.std, config.data.decoding)
    some = pictures[:32]
    return _seconds(lambda: [views.pixels(p, seed) for seed, p in enumerate(some)]) / len(some)


def _seconds(call: Callable[[], object]) -> float:
    """Median seconds of a call, after a first one that may compile and allocate."""
    call()
    taken: list[float] = []
    while not taken or (sum(taken) < SECONDS and len(taken) < 20):
        if has_gpu():
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if has_gpu():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)
