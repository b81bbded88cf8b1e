"""Vision Mambas and ViTs of the same size side by side on a GPU, at growing resolutions: what linear cost is worth there.

`make gpu-check` calls `times`; `python -m benchmarks.gpu_models` prints its JSON object.
"""

import json
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import nn

from pipeline.models import build_model
from pipeline.ops.arithmetic import choose_arithmetic

SIZES = {224: 128, 448: 32, 896: 8}  # pixels -> batch: about as many tokens each
MODELS = {"vim_small": "vim_small", "vit_small": "timm/vit_small_patch16_224"}
PASSES, ROUNDS = 3, 7


def times(device: torch.device, sizes: Mapping[int, int] = SIZES) -> dict[str, float]:
    """Return the median milliseconds of an inference and of a training step in bf16, forward and backward.

    The models take turns. The weights are bf16, as the engine keeps them.

    Args:
        device: A GPU.
        sizes: Image sizes and the batch of each.
    """
    choose_arithmetic(device)
    found: dict[str, float] = {}
    for size, batch in sizes.items():
        images = torch.randn(batch, 3, size, size, device=device, dtype=torch.bfloat16)
        runs: dict[str, Callable[[], object]] = {}
        for name, model_name in MODELS.items():
            model = build_model(model_name, image_size=size, num_classes=1000).to(device, torch.bfloat16)
            runs[f"{name}_{size}_inference_ms"], runs[f"{name}_{size}_train_ms"] = _runs(model, images)
        for run in runs.values():
            for _ in range(3):
                run()  # compiles and chooses kernels
        rounds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                rounds[name].append(_milliseconds(run) / PASSES)
        found |= {name: statistics.median(values) for name, values in rounds.items()}
    return found


def _runs(model: nn.Module, images: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    def inference() -> None:
        with torch.inference_mode():
            model(images)

    def train() -> None:
        model(images).square().mean().backward()
        model.zero_grad()

    return inference, train


def _milliseconds(run: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(PASSES):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


if __name__ == "__main__":
    print(json.dumps(times(torch.device("cuda"))))
