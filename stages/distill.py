"""Stage 2, distil: supervised training of a Vision Mamba on the labelled split, with an optional distillation teacher.

Method: fine-tuning as in ARM (layer decay, label smoothing); distillation as in DeiT (hard) or Hinton et al. (soft).
Command: python -m stages distill configs/distill/demo.yaml
Input: labelled shards, a pretrainer's or classifier's export (or none), a teacher (or none).  Output: a classifier's export.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from pipeline.data.loader import Batch
from pipeline.data.transforms import train_views
from pipeline.models import build_from_config
from pipeline.models.export import transfer
from pipeline.models.flops import TRAINING, forward_flops
from pipeline.models.losses import distillation_loss
from pipeline.models.teachers import timm_teacher
from pipeline.models.weights import load_weights
from pipeline.observe.tensorboard import Board
from pipeline.train.replay import Replay
from pipeline.train.task import Mean, StepOutput, Task, mean_of
from stages.configs import DistillConfig, TeacherConfig
from stages.setting import Setting


class DistillTask(Task):
    """Cross-entropy with the labels, shared with a frozen teacher's answers if there is one."""

    def __init__(self, config: DistillConfig, teacher: nn.Module | None) -> None:
        self.label_smoothing, self.teacher, self.teaching = config.label_smoothing, teacher, config.teacher

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        images, labels = batch["labelled"].images, batch["labelled"].labels
        logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)
        metrics = {"train/top1": mean_of(100.0 * (logits.argmax(-1) == labels))}
        if self.teacher is not None and self.teaching is not None:
            with torch.no_grad():
                answers = self.teacher(images)
            taught = distillation_loss(logits, answers, kind=self.teaching.kind, temperature=self.teaching.temperature)
            loss = (1 - self.teaching.weight) * loss + self.teaching.weight * taught
            metrics["train/teacher_loss"] = Mean(taught.detach(), 1.0)
        return StepOutput(loss=loss, metrics=metrics)


def run(config: DistillConfig, replay: Replay | None = None) -> None:
    with Setting("distill", config, replay) as s:
        config = config.model_copy(
            update={"model": config.model.model_copy(update={"num_classes": len(s.manifest.classes)})}
        )
        size = config.model.image_size
        model = build_from_config(config.model)
        if config.init_from:
            transfer(s.parent("init_from"), model, config.parents()["init_from"])
        if config.weights:
            load_weights(model, config.weights.path)
            if config.weights.saw_labels:
                s.saw_external_labels(config.weights.path.name)
        teacher = frozen_teacher(s, config.teacher, size) if config.teacher else None
        views = train_views(size, config.augment, mean=config.data.mean, std=config.data.std)
        streams = {"labelled": s.loader(s.parts.labelled, views, global_batch=config.loop.global_batch)}

        def evaluate(step: int, board: Board) -> dict[str, float]:
            return s.validate({"student": s.engine.model}, size)

        flops = TRAINING * forward_flops(model, size) + (forward_flops(teacher, size) if teacher else 0)
        s.train(model, lambda engine: DistillTask(config, teacher), streams, evaluate, size, flops)
        measured = s.measured | s.test({"student": s.engine.model}, size)
        s.export(s.engine.full_weights(), model=config.model, uses_labels=True, measured=measured)


def frozen_teacher(s: Setting, config: TeacherConfig, image_size: tuple[int, int]) -> nn.Module:
    """In eval mode, without gradients, on this rank's device; its labels count as seen."""
    if config.timm is not None and config.weights is not None:
        teacher = timm_teacher(config.timm, config.weights, len(s.manifest.classes), image_size)
        s.saw_external_labels(config.timm)
    else:
        teacher = s.parent("teacher")
    return teacher.to(s.world.device).eval().requires_grad_(False)
