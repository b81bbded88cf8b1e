"""python -m tests.unit.train.muon_ranks: what three steps of Muon make of a tiny model, a JSON object a ZeRO stage on rank 0.

All ranks see the same images, so the result is that of one process. Matrices of six numbers are so small that a rank of four owns
nothing of them.
"""

import json

import torch
from torch import Tensor, nn

from pipeline.cli import leave
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import Engine


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3, bias=False), nn.Conv1d(3, 10, 1)
        self.head = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).unsqueeze(-1)).flatten(1).relu())

    def no_weight_decay(self) -> set[str]:
        return set()

    def layer_of(self, name: str) -> int:
        return ("first", "second", "head").index(name.partition(".")[0])

    def fresh(self) -> tuple[str, ...]:
        return ("head.",)


def main() -> None:
    torch.set_num_threads(1)
    world = distributed.start(60)
    optim = OptimConfig(kind="muon", lr=0.1, layer_decay=0.5, weight_decay=0.1, clip_norm=1.0)
    for zero, offload in ((0, False), (1, False), (2, False), (3, False), (2, True)):
        torch.manual_seed(0)
        model, images = Tiny(), torch.randn(8, 2)
        config = EngineConfig(zero_stage=zero, offload_optimizer=offload, keep_whole=0)
        engine = Engine(model, world, optim=optim, config=config, micro_batch=8, accumulation=1)
        for step in range(3):
            engine.backward(engine.model(images).square().sum())
            engine.step(0.1, step)
        weights = {name: value.tolist() for name, value in engine.full_weights().items()}
        bare = distributed.any_rank(not any(shard.name == "first.weight" for shard in engine.shards), world)
        if world.is_main:
            print(json.dumps({"weights": weights, "a_rank_without": bare}), flush=True)
        engine.close()
    distributed.stop()


if __name__ == "__main__":
    main()
    leave(0)  # as the stages do: gloo's threads may outlive the group
