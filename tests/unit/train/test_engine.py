"""The seam with DeepSpeed, in a process of its own, since DeepSpeed changes the process group and autocast."""

import subprocess
import sys

import pytest
import torch

from pipeline.train.engine import _clip
from tests.conftest import ENVIRONMENT, ROOT

CODE = """
import torch
from pipeline.models import build_model
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import Engine

world = distributed.start(60)
model = build_model("vim_nano", num_classes=4, depth=1)
engine = Engine(model, world, optim=OptimConfig(lr=1e-3), config=EngineConfig(precision="bf16"), micro_batch=2, accumulation=1)
print(engine.module(torch.randn(2, 3, 32, 32)).dtype)
# DeepSpeed calls this function, which knows CUDA only: return what it returns on a GPU.
torch.is_autocast_enabled = lambda *_: True
with engine.precision():
    print(engine.model(torch.randn(2, 3, 32, 32)).dtype, next(engine.module.parameters()).dtype)
engine.close()
distributed.stop()
"""


def test_bf16_reaches_the_training_forward_while_weights_and_evaluations_stay_fp32() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["torch.float32", "torch.bfloat16", "torch.float32"], done.stderr


@pytest.mark.parametrize("largest", [0.5, 100.0, 0.0])
def test_gradients_are_clipped_as_torch_clips_them(largest: float) -> None:
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 2, 2))]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    ours = [weight.grad.clone() for weight in weights]
    norm = _clip(ours, largest)
    wanted = torch.nn.utils.clip_grad_norm_(weights, largest or float("inf"))
    assert float(norm) == pytest.approx(float(wanted), rel=1e-6)
    for own, weight in zip(ours, weights, strict=True):
        torch.testing.assert_close(own, weight.grad, rtol=1e-6, atol=0)
