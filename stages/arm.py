"""Stage 1, ARM: autoregressive pretraining of a Vision Mamba on unlabelled images.

Method: Ren et al., "Autoregressive Pretraining with Mamba in Vision": predict the pixels of each next cluster of patches
from the clusters before it.
Command: python -m stages arm configs/arm/demo.yaml
Input: shards (labels are not read).  Output: a pretrainer's export, from which stage 2 takes the backbone.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.loader import Batch
from pipeline.data.transforms import train_views
from pipeline.evaluate.metrics import mean_loss
from pipeline.models.arm import ARM, pixel_loss
from pipeline.models.flops import TRAINING, forward_flops
from pipeline.observe.pictures import write_grid
from pipeline.observe.tensorboard import Board
from pipeline.train.replay import Replay
from pipeline.train.task import StepOutput, Task
from stages.configs import ArmConfig
from stages.setting import Setting

NUM_PICTURES = 8


class ArmTask(Task):
    """Squared error of the predicted clusters against their standardised pixels."""

    def __init__(self, arm: ARM) -> None:
        self.arm = arm  # for its targets, which use no weights

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        images = batch["unlabelled"].images
        return StepOutput(loss=pixel_loss(model(images), self.arm.targets(images)).mean())


def run(config: ArmConfig, replay: Replay | None = None) -> None:
    with Setting("arm", config, replay) as s:
        arm, size = ARM(config.model, config.decoder), config.model.image_size
        everything = np.sort(np.concatenate([s.parts.labelled, s.parts.unlabelled]))
        views = train_views(size, config.augment, mean=config.data.mean, std=config.data.std)
        streams = {"unlabelled": s.loader(everything, views, global_batch=config.loop.global_batch, hide_labels=True)}
        held_out = s.parts.validation

        def evaluate(step: int, board: Board) -> dict[str, float]:
            pictures = reconstructions(
                s.engine.model, arm, s.pictures(held_out if len(held_out) else everything, NUM_PICTURES, size)
            )
            if s.world.is_main:
                path = s.run.folder / "report" / "reconstructions.png"
                board.image(
                    "reconstructions", write_grid(path, pictures, mean=config.data.mean, std=config.data.std), step
                )
            if not len(held_out):
                return {}
            batches = s.evaluation(s.manifest, held_out, size)
            loss = mean_loss(s.engine.model, batches, lambda p, x: pixel_loss(p, arm.targets(x)), s.world.device)
            return {"val/loss": loss}

        s.train(arm, lambda engine: ArmTask(arm), streams, evaluate, size, flops=TRAINING * forward_flops(arm, size))
        s.export(
            s.engine.full_weights(), model=config.model, decoder=config.decoder, uses_labels=False, measured=s.measured
        )


@torch.no_grad()
def reconstructions(model: nn.Module, arm: ARM, images: Tensor) -> Tensor:
    """(2, n, 3, H, W): images, and what the model predicts of every cluster but the first."""
    model.eval()
    predicted = arm.reconstruct(images, model(images))
    model.train()
    return torch.stack([images, predicted])
