"""Stage 1, ARM: autoregressive pretraining of a Vision Mamba on unlabelled images.

Method: Ren et al., "Autoregressive Pretraining with Mamba in Vision": the model predicts the pixels of each cluster of
patches from the clusters before it.
Command: python -m stages arm configs/arm/demo.yaml
Input: shards; only the linear probe and k-NN, which report, read labels. Output: a pretrainer's export, whose backbone stage 2
starts from.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pipeline.errors import ConfigError
from pipeline.evaluate.features import evaluate_features, features_of
from pipeline.evaluate.metrics import mean_loss
from pipeline.models.arm import ARM, pixel_loss
from pipeline.models.memory import build_within_memory
from pipeline.report.pictures import write_grid
from pipeline.report.tensorboard import Board
from pipeline.streaming.loader import Batch
from pipeline.streaming.transforms import train_views
from pipeline.train.task import StepOutput, Task, mean_of
from stages.configs.arm import ArmConfig
from stages.context import StageContext
from stages.drivers import Prepared
from stages.handover import export
from stages.spec import Held

NUM_PICTURES = 8


class ArmTask(Task):
    """Squared error of the predicted clusters against their standardised pixels.

    Args:
        arm: Makes the targets, which use no weights.
        by_probe: Whether the result is chosen by the linear probe instead of the loss.
    """

    names_classes = False

    def __init__(self, arm: ARM, *, by_probe: bool = False) -> None:
        self.arm, self.by_probe = arm, by_probe

    def criteria(self) -> dict[str, int]:
        """A pretrainer is selected by its loss, or by the linear probe on its features."""
        return ({"val/linear": 1} if self.by_probe else {}) | {"val/loss": -1}

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        """Return the mean error over images and predicted clusters, and the error of each cluster."""
        errors = arm_loss(self.arm, model(batch["unlabelled"].images), batch["unlabelled"].images)
        clusters = {f"cluster_loss/{k:02d}": mean_of(error) for k, error in enumerate(errors.unbind(1), start=1)}
        return StepOutput(loss=errors.mean(), metrics=clusters)


def arm_loss(arm: ARM, predictions: Tensor, images: Tensor) -> Tensor:
    """Return each image's loss on each predicted cluster, (B, K - 1)."""
    return pixel_loss(predictions, arm.targets(images), arm.num_clusters - 1)


def prepare(s: StageContext[ArmConfig]) -> Prepared[ArmTask]:
    """Build the backbone with its decoder, and say how they are evaluated and exported."""
    config = s.config
    by_probe = config.select_by == "linear" and config.loop.compares
    if by_probe and not len(s.subsets.labelled):
        raise ConfigError(
            "select_by=linear needs labelled images for its linear probe, but there are none; set select_by=loss"
        )
    size = config.model.image_size
    arm = build_within_memory(lambda: ARM(config.model, config.decoder), f"model {config.model.name}", trained=True)
    held_out, streamed = s.data.held_out, Held(s.manifest, s.streams["unlabelled"].sample_indices)
    pictured = s.pictures(held_out if len(held_out.sample_indices) else streamed, NUM_PICTURES, size)

    def evaluate(step: int, board: Board) -> dict[str, float]:
        pictures = reconstructions(s.engine.module, arm, pictured)
        if s.world.is_main:
            path = s.run.folder / "report" / "reconstructions.png"
            grid = write_grid(path, pictures, mean=config.data.mean, std=config.data.std)
            board.image("input, means alone, prediction", grid, step)
        if not len(held_out.sample_indices):
            return {}
        batches = s.evaluator.evaluation(*held_out, size)
        loss = mean_loss(s.engine.module, batches, lambda p, x: arm_loss(arm, p, x).mean(1), s.world.device)
        return {"val/loss": loss} | quality_of_features(s, arm, step)

    def finish(task: ArmTask) -> None:
        if by_probe:
            s.ancestry.saw_own_labels()
        export(s, s.engine.full_weights(), model=config.model, decoder=config.decoder, measured=s.measured)

    return Prepared(
        model=arm,
        make_task=lambda engine: ArmTask(arm, by_probe=by_probe),
        views={
            "unlabelled": train_views(
                size, config.augment, mean=config.data.mean, std=config.data.std, decoding=config.data.decoding
            )
        },
        image_size=size,
        flops=s.flops({"student": arm}, size),
        evaluate=evaluate,
        finish=finish,
    )


def quality_of_features(s: StageContext[ArmConfig], arm: ARM, step: int) -> dict[str, float]:
    """Evaluate the features that the decoder reads, at the steps of `linear_probe.every` and after the last step.

    Returns:
        val/linear (linear probe) and val/knn in percent; nothing at other steps.
    """
    config, asked = s.config, s.config.linear_probe
    if asked is None or not len(s.subsets.labelled) or (step % (asked.every or step) and step < config.loop.steps):
        return {}
    learnt_from = s.subsets.labelled[:: -(-len(s.subsets.labelled) // asked.samples)]
    bank, queries = (
        features_of(
            s.engine.module,
            arm.to_decoder,
            s.evaluator.evaluation(*samples, config.model.image_size),
            s.world.device,
        )
        for samples in (Held(s.manifest, learnt_from), s.data.held_out)
    )
    return {f"val/{name}": accuracy for name, accuracy in evaluate_features(bank, queries, asked).items()}


@torch.no_grad()
def reconstructions(model: nn.Module, arm: ARM, images: Tensor) -> Tensor:
    """Put images beside what the patches' own means show and what the predictions add to them.

    Args:
        model: The network that computes.
        arm: Makes and draws the targets.
        images: (n, C, H, W).

    Returns:
        (3, n, C, H, W): images; patches without contrast, which is what predicting nothing gives; predictions.
    """
    model.eval()
    predicted = model(images)
    model.train()
    return torch.stack([images, arm.draw(torch.zeros_like(predicted), images), arm.draw(predicted, images)])
