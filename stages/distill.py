"""Stage 2, distil: supervised training of any model on the labelled split, with an optional distillation teacher.

Method: fine-tuning as in ARM and Semi-ViT (layer decay, label smoothing, mixup, cutmix); distillation as in DeiT (hard) or
Hinton et al. (soft), into heads of its own where the model has them; an average of the weights and MESA as in EfficientViM.
Command: python -m stages distill configs/distill/demo.yaml
Input: labelled shards; an export, a file of weights or nothing; a teacher or none.  Output: a classifier's export.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.exports.prediction_cache import PredictionCache
from pipeline.exports.timm_teacher import timm_teacher
from pipeline.exports.transfer import transfer
from pipeline.exports.weights import load_weights
from pipeline.files import sha256_of
from pipeline.models import build_from_config
from pipeline.models.flops import TRAINING, forward_flops
from pipeline.models.losses import distillation_loss, one_hot, soft_cross_entropy
from pipeline.report.tensorboard import Board
from pipeline.ssl.inference_copy import InferenceCopy
from pipeline.ssl.lyapema import LyapEMA
from pipeline.streaming.loader import Batch
from pipeline.streaming.mixup import mix_at_random
from pipeline.streaming.transforms import train_views
from pipeline.train.config import LyapEMAConfig
from pipeline.train.engine import Engine
from pipeline.train.replay import Replay
from pipeline.train.task import Mean, StepOutput, Task, mean_of, probe_answer
from stages.configs import DistillConfig, TeacherConfig
from stages.context import StageContext

Teacher = Callable[[Tensor], Tensor]


class DistillTask(Task):
    """Cross-entropy with the labels, shared with a frozen teacher's answers and the average's, where there are such."""

    def __init__(
        self,
        engine: Engine,
        config: DistillConfig,
        num_classes: int,
        teacher: Teacher | None,
        average: nn.Module | None,
    ) -> None:
        self.config, self.num_classes, self.teacher = config, num_classes, teacher
        self.ema: LyapEMA | None = None
        if average is not None and config.average is not None:
            rule = LyapEMAConfig(
                mode="ema", base_decay=config.average.decay, max_decay=config.average.decay, warmup_steps=0
            )
            self.ema = LyapEMA(
                engine.masters, engine.base_optimizer, rule, engine.all_reduce, num_weights=engine.num_weights
            )
            self.copy = InferenceCopy(engine, average, self.ema.teacher, average_buffers=True)
        mesa_steps = config.loop.steps - config.optim.cooldown_steps
        self.mesa_from = int(config.mesa.start * mesa_steps) if config.mesa else None

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        c, labelled = self.config, batch["labelled"]
        truth = one_hot(labelled.labels, self.num_classes)
        images, targets = mix_at_random(
            labelled.images, truth, labelled.partner(), mixup=c.mix.mixup, cutmix=c.mix.cutmix
        )
        if "unlabelled" in batch:
            images = torch.cat([images, batch["unlabelled"].images])
        answer = model(images)
        logits, for_teacher = answer if isinstance(answer, tuple) else (answer, answer)
        logits = logits[: len(targets)]  # the others only the teacher knows
        loss = soft_cross_entropy(logits, targets, c.label_smoothing).mean()
        metrics = {"train/top1": mean_of(100.0 * (logits.argmax(-1) == labelled.labels))}
        if self.teacher is not None and c.teacher is not None:
            with torch.no_grad():
                answers = self.teacher(images)
            taught = distillation_loss(for_teacher, answers, kind=c.teacher.kind, temperature=c.teacher.temperature)
            loss = (1 - c.teacher.weight) * loss + c.teacher.weight * taught
            metrics["train/teacher_loss"] = Mean(taught.detach(), 1.0)
        if c.mesa is not None and self.ema is not None and self.ema.updates >= (self.mesa_from or 0):
            with torch.no_grad():
                own = self.copy.module(images[: len(targets)]).float().softmax(-1)
            consistent = soft_cross_entropy(logits, own).mean()
            loss = loss + c.mesa.weight * consistent
            metrics["train/mesa"] = Mean(consistent.detach(), 1.0)
        return StepOutput(loss=loss, metrics=metrics)

    def after_step(self, engine: Engine, loss: Tensor) -> dict[str, Mean]:
        if self.ema is not None:
            self.ema.update(loss)
            self.copy.refresh(self.ema.one_minus_alpha)
        return {}

    def probe(self, model: nn.Module, images: Tensor) -> float:
        return probe_answer(model, images) + (probe_answer(self.copy.module, images) if self.ema else 0.0)

    def sharded_state(self) -> dict[str, dict[Tensor, Tensor]]:
        return {"average": self.ema.teacher} if self.ema else {}

    def buffers(self) -> dict[str, Tensor]:
        return self.copy.averaged_buffers() if self.ema else {}

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict() if self.ema else {}

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        if self.ema is not None:
            self.ema.load_state_dict(state)
            self.copy.refresh()


def run(config: DistillConfig, replay: Replay | None = None) -> None:
    with StageContext("distill", config, replay) as s:
        num_classes = len(s.manifest.classes)
        shape = config.model.model_copy(update={"num_classes": num_classes})
        size = shape.image_size
        model = build_from_config(shape)
        if config.init_from:
            transfer(s.parent("init_from"), model, config.parents()["init_from"])
        if config.weights:
            load_weights(model, config.weights.path)
            if config.weights.saw_labels:
                s.saw_external_labels(config.weights.path.name)
        average = copy.deepcopy(model) if config.average else None  # before the engine may cut the weights
        flops = TRAINING * forward_flops(model, size)
        teacher: Teacher | None = None
        if config.teacher:
            network = frozen_teacher(s, config.teacher, size)
            flops += forward_flops(network, size)
            teacher = with_cache(s, config.teacher, network) if config.teacher.cache else network
            if hasattr(model, "set_distilled_training"):
                model.set_distilled_training()  # type: ignore[operator] # its second heads are the teacher's
        views = train_views(size, config.augment, mean=config.data.mean, std=config.data.std)
        streams = {"labelled": s.loader(s.parts.labelled, views, global_batch=config.loop.global_batch)}
        if config.teacher and config.teacher.unlabelled_ratio:
            number = config.teacher.unlabelled_ratio * config.loop.global_batch
            streams["unlabelled"] = s.loader(s.parts.unlabelled, views, global_batch=number, hide_labels=True)
            flops *= 1 + config.teacher.unlabelled_ratio

        def models() -> dict[str, nn.Module]:
            return {"student": s.engine.module} | ({"average": average} if average is not None else {})

        def evaluate(step: int, board: Board) -> dict[str, float]:
            return s.evaluator.validate(models(), size)

        def task_of(engine: Engine) -> DistillTask:
            return DistillTask(engine, config, num_classes, teacher, average)

        task = s.train(model, task_of, streams, evaluate, size, flops)
        measured = s.measured | s.evaluator.test(models(), size)
        weights = task.copy.full_weights() if task.ema else s.engine.full_weights()
        s.export(weights, model=shape, uses_labels=True, measured=measured)


def frozen_teacher(s: StageContext, config: TeacherConfig, image_size: tuple[int, int]) -> nn.Module:
    """In eval mode, without gradients, on this rank's device; its labels count as seen."""
    if config.timm is not None and config.weights is not None:
        teacher: nn.Module = timm_teacher(config.timm, config.weights, len(s.manifest.classes), image_size)
        s.saw_external_labels(config.timm)
    else:
        teacher = s.parent("teacher")
    return teacher.to(s.world.device).eval().requires_grad_(False)


def with_cache(s: StageContext, config: TeacherConfig, teacher: nn.Module) -> PredictionCache:
    """Return the teacher with its predictions cached in `teacher.cache`, by the hash of its weights and its precision."""
    assert config.cache is not None
    weights = sha256_of(config.weights) if config.weights else s.parent_card("teacher").weights_sha256
    path = config.cache / f"{weights[:16]}-{s.config.engine.precision}.sqlite"
    return PredictionCache(teacher, path, gigabytes=config.cache_gb)
