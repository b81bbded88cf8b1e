"""A Task moves, saves and restores the teacher that it holds (in a process of its own, since DeepSpeed keeps global state)."""

import subprocess
import sys

from tests.conftest import ENVIRONMENT, ROOT

CODE = """
import copy
import torch
from pipeline.models import build_model
from pipeline.ssl.config import LyapEMAConfig
from pipeline.ssl.teacher import Teacher
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import Engine
from pipeline.train.task import Task

world = distributed.start(60)
torch.manual_seed(0)
model, images = build_model("vim_nano", num_classes=4, depth=1), torch.randn(2, 3, 32, 32)
first = copy.deepcopy(model.state_dict())
average = copy.deepcopy(model)
engine = Engine(model, world, optim=OptimConfig(lr=1e-2), config=EngineConfig(), micro_batch=2, accumulation=1)
task = Task()
alone = task.fingerprint(engine.model, images)
task.teacher = Teacher(engine, average, LyapEMAConfig(mode="ema", base_decay=0.5, warmup_steps=0))
print("two networks", abs(task.fingerprint(engine.model, images) - 2 * alone) < 1e-6)

def step():
    engine.backward(engine.model(images).square().mean())
    engine.step(1e-2)
    return task.after_step(torch.tensor(1.0))

print("reports", {"ema/V", "ema/alpha", "ema/W"} <= set(step()))
student, teacher = engine.full_weights(), task.teacher.full_weights()
print("the mean", all(torch.allclose(teacher[n], (first[n] + student[n]) / 2, atol=1e-6) for n in student))
shards = {flat: t.clone() for flat, t in task.sharded_state()["teacher"].items()}
state, saved = task.state_dict(), task.teacher.fingerprint(images)
step()
moved = task.teacher.fingerprint(images)
for flat, t in task.sharded_state()["teacher"].items():
    t.copy_(shards[flat])
task.load_state_dict(state)
print("restored", task.teacher.fingerprint(images) == saved != moved, task.teacher.updates == 1)
engine.close()
distributed.stop()
"""


def test_a_task_moves_saves_and_restores_its_teacher() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    want = ["two networks True", "reports True", "the mean True", "restored True True"]
    assert done.stdout.splitlines() == want, done.stderr
