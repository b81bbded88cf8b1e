"""python -m tests.unit.launchers.zero_bytes ZERO_STAGE ...: what a rank really allocates, a JSON object a model and
stage on rank 0.

A real engine with LyapEMA takes one step; each rank counts the bytes of its tensors.
"""

import json
import sys
from typing import Any

import torch

from pipeline.cli import leave
from pipeline.models import build_model
from pipeline.ssl.config import LyapEMAConfig
from pipeline.ssl.lyapema import LyapEMA
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import Engine

OPTIM = OptimConfig(lr=1e-3, layer_decay=0.8)
# The parameters of the second model are not all multiples of four numbers. Muon keeps one moment of a matrix.
CASES = (
    ({"name": "vim_nano", "num_classes": 10}, OPTIM),
    ({"name": "efficientvim_nano", "num_classes": 7}, OPTIM),
    ({"name": "efficientvim_nano", "num_classes": 7}, OptimConfig(kind="muon", lr=1e-3, layer_decay=0.8)),
)


def count(
    model_values: dict[str, Any], optim: OptimConfig, zero_stage: int, world: distributed.World
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = build_model(**model_values)
    engine = Engine(
        model, world, optim=optim, config=EngineConfig(zero_stage=zero_stage), micro_batch=2, accumulation=1
    )
    ema = LyapEMA(engine.masters, engine.base_optimizer, LyapEMAConfig(), engine.all_reduce)
    engine.backward(engine.model(torch.randn(2, 3, 32, 32)).square().mean())
    engine.step(1e-3)
    state = engine.base_optimizer.state
    own = {id(p) for _, p in engine.named_parameters}
    found: dict[str, Any] = {
        "masters": sum(m.numel() * 4 for m in engine.masters if id(m) not in own),
        "moments": sum(
            value.numel() * 4 for m in engine.masters for k, value in state[m].items() if k in ("exp_avg", "exp_avg_sq")
        ),
        "averages": sum(t.numel() * 4 for t in ema.teacher.values()),
    }
    if engine.config.zero_stage == 3:
        found["parameters"] = sum(
            4 * (p.ds_tensor.numel() + (p.numel() if p.ds_persist else 0)) for p in engine.module.parameters()
        )
    else:
        found["parameters"] = sum(4 * p.numel() for p in engine.module.parameters())
    found["shards"] = [(shard.name, shard.start, shard.numel) for shard in engine.shards]
    engine.close()
    return found


def main(zero_stages: list[int]) -> None:
    torch.set_num_threads(1)
    world = distributed.start(60)
    for model_values, optim in CASES:
        for zero_stage in zero_stages:
            found = count(model_values, optim, zero_stage, world)
            if world.is_main:
                print(json.dumps(found), flush=True)
    distributed.stop()


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]])
    leave(0)  # as the stages do: gloo's threads may outlive the group
