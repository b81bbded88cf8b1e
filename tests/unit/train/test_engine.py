"""The seam with DeepSpeed, in a process of its own, since DeepSpeed changes the process group and autocast."""

import subprocess
import sys

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


CLIPPING = """
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from pipeline.models import build_model
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import Engine

class Reads(TorchDispatchMode):
    number = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function._schema.name == "aten::_local_scalar_dense"
        return function(*args, **(kwargs or {}))

world = distributed.start(60)
optim = OptimConfig(kind="sgd", momentum=0.0, nesterov=False, lr=1.0, weight_decay=0.0, layer_decay=0.9, clip_norm=0.01)
for zero in range(4):
    torch.manual_seed(0)
    model = build_model("vim_nano", num_classes=4, depth=2)
    engine = Engine(model, world, optim=optim, config=EngineConfig(zero_stage=zero), micro_batch=2, accumulation=1)
    before = engine.full_weights()
    for group in engine.base_optimizer.param_groups:
        group["lr_scale"] = 1.0
    engine.backward(engine.model(torch.ones(2, 3, 32, 32)).square().sum())
    with Reads() as reads:
        engine.step(1.0)
    moved = sum((value - before[name]).square().sum() for name, value in engine.full_weights().items()).sqrt()
    print(zero, f"{moved:.5f}", engine.grad_norm() > 0.1, reads.number)
    engine.close()
distributed.stop()
"""


def test_every_zero_stage_clips_to_the_norm_and_deepspeed_reads_one_number_for_an_update() -> None:
    """DeepSpeed reads the norm at ZeRO 1 to 3, to skip an update that is not finite; the engine clips, and reads nothing."""
    done = subprocess.run(
        [sys.executable, "-c", CLIPPING], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [
        "0 0.01000 True 0",
        "1 0.01000 True 1",
        "2 0.01000 True 1",
        "3 0.01000 True 1",
    ], done.stderr


ALIGNMENT = """
import torch
from pipeline.models import build_model
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import Engine

world = distributed.start(60)
for zero in range(4):
    torch.manual_seed(0)
    model = build_model("efficientvim_nano", num_classes=7)
    assert any(p.numel() % 4 for p in model.parameters())
    engine = Engine(model, world, optim=OptimConfig(lr=1e-3), config=EngineConfig(zero_stage=zero), micro_batch=2, accumulation=1)
    addresses = []
    for module in engine.module.modules():
        module.register_forward_pre_hook(lambda m, _: addresses.extend(p.data_ptr() for p in m.parameters(recurse=False)))
    for _ in range(2):
        loss = engine.model(torch.ones(2, 3, 32, 32, device=world.device)).square().mean()
        engine.backward(loss)
        engine.step(1.0)
    print(zero, len(addresses) > 200, sum(a % 16 > 0 for a in addresses), loss.isfinite().item())
    engine.close()
distributed.stop()
"""


def test_every_zero_stage_keeps_weights_where_a_gpu_can_read_four_numbers_at_once() -> None:
    """On a GPU this is no matter of speed: cuDNN ends with a misaligned address."""
    done = subprocess.run(
        [sys.executable, "-c", ALIGNMENT], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == [f"{zero} True 0 True" for zero in range(4)], done.stderr
