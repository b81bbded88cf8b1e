"""Models that take turns on a CPU: what the benchmarks of inference share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import turns
from pipeline.exports.onnx import write_onnx

THREADS = 2
# Seconds of rest before each turn. The threads of ONNX Runtime and of OpenMP spin for a while after their work and would slow
# the next model by a third.
REST = 0.25
Run = Callable[[], Any]


def medians(rivals: dict[str, Run], rounds: int, budget: float = turns.BUDGET) -> dict[str, float]:
    """Return the median seconds of each rival, with a rest before each turn and two calls to warm up."""
    return turns.medians(rivals, rounds, rest=REST, warm_up=2, budget=budget)


def onnx_run(model: nn.Module, images: Tensor, folder: Path, name: str) -> Run:
    """Export a model to `folder` and return a run of it in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    path = write_onnx(model, folder / f"{name}.onnx", tuple(images.shape[-2:]))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"images": images.numpy()}
    return lambda: session.run(None, feed)
