"""Stage 2, distil: supervised training of any model on the labelled split, with an optional distillation teacher.

Method: fine-tuning as in ARM and Semi-ViT (layer decay, label smoothing, mixup, CutMix). Distillation is that of DeiT (hard)
or Hinton et al. (soft), into separate heads if the model has them. The average of the weights and MESA are EfficientViM's.
Command: python -m stages distill configs/distill/demo.yaml
Input: labelled shards; an export, a file of weights or nothing; a teacher or none. Output: a classifier's export.
"""

import logging
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.evaluate.guesses import kept_guesses
from pipeline.exports.card import Preprocessing
from pipeline.exports.prediction_cache import PredictionCache
from pipeline.exports.teacher_input import TeacherInput
from pipeline.exports.timm_teacher import timm_input, timm_teacher
from pipeline.exports.transfer import transfer
from pipeline.exports.weights import load_weights
from pipeline.files import sha256_of
from pipeline.models import build_from_config
from pipeline.models.backbone.adapt import adapt, copy_of
from pipeline.models.backbone.lora import merged
from pipeline.models.family import FamilyConfig
from pipeline.models.layers import init_classifier
from pipeline.models.losses import distillation_loss, one_hot, soft_cross_entropy, weigh
from pipeline.ssl.config import LyapEMAConfig
from pipeline.ssl.teacher import Teacher
from pipeline.streaming.loader import Batch
from pipeline.streaming.mixup import mix_at_random
from pipeline.streaming.transforms import train_views
from pipeline.train.distributed import from_main
from pipeline.train.engine import Engine
from pipeline.train.task import Mean, StepOutput, Task, mean_of
from stages.configs.distill import DistillConfig
from stages.configs.teacher import GuessConfig, TeacherConfig, teacher_size
from stages.context import StageContext
from stages.drivers import Prepared
from stages.handover import export

logger = logging.getLogger(__name__)

FrozenTeacher = Callable[[Tensor], Tensor]


class DistillTask(Task):
    """Cross-entropy with the labels, with guessed ones, with a frozen teacher's outputs, and with the average's (MESA).

    Args:
        engine: The student under training.
        config: The stage's config.
        num_classes: Classes of the dataset.
        frozen_teacher: Images (B, 3, H, W) -> logits (B, C), or none.
        average: A copy of the student that becomes the average of the weights, or none.
        weights: (C,) of the classes in the loss on labels, or none.
    """

    def __init__(
        self,
        engine: Engine,
        config: DistillConfig,
        num_classes: int,
        frozen_teacher: FrozenTeacher | None,
        average: nn.Module | None,
        weights: Tensor | None,
    ) -> None:
        self.config, self.num_classes, self.frozen_teacher = config, num_classes, frozen_teacher
        self.weights = weights
        self.teacher: Teacher | None = None
        if average is not None and config.average is not None:
            decay = config.average.decay
            rule = LyapEMAConfig(mode="ema", base_decay=decay, max_decay=decay, warmup_steps=0, buffers="average")
            self.teacher, self.exported = Teacher(engine, average, rule), "average"
        mesa_steps = config.loop.steps - config.optim.cooldown_steps
        self.mesa_from = int(config.mesa.start * mesa_steps) if config.mesa else None

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        """Return the loss of a micro-batch; images of `unlabelled` learn from guesses or the frozen teacher only."""
        c, labelled = self.config, batch["labelled"]
        truth = one_hot(labelled.labels, self.num_classes)
        images, targets = mix_at_random(
            labelled.images, truth, labelled.partner(), mixup=c.mix.mixup, cutmix=c.mix.cutmix
        )
        if "unlabelled" in batch:
            images = torch.cat([images, batch["unlabelled"].images])
        output = model(images)
        logits, distilled = output if isinstance(output, tuple) else (output, output)
        logits, of_unlabelled = logits[: len(targets)], logits[len(targets) :]
        loss = weigh(soft_cross_entropy(logits, targets, c.label_smoothing), targets, self.weights).mean()
        metrics = {"train/top1": mean_of(100.0 * (logits.argmax(-1) == labelled.labels))}
        if c.guess is not None:
            guessed = one_hot(batch["unlabelled"].labels, self.num_classes)
            taught = soft_cross_entropy(of_unlabelled, guessed, c.label_smoothing).mean()
            loss = (1 - c.guess.weight) * loss + c.guess.weight * taught
            metrics["train/guess_loss"] = Mean(taught.detach(), 1.0)
        if self.frozen_teacher is not None and c.teacher is not None:
            with torch.no_grad():
                teacher_logits = self.frozen_teacher(images)
            taught = distillation_loss(
                distilled, teacher_logits, kind=c.teacher.kind, temperature=c.teacher.temperature
            )
            loss = (1 - c.teacher.weight) * loss + c.teacher.weight * taught
            metrics["train/teacher_loss"] = Mean(taught.detach(), 1.0)
        if c.mesa is not None and self.teacher is not None and self.teacher.updates >= (self.mesa_from or 0):
            with torch.no_grad():
                average = self.teacher.module(images[: len(targets)]).float().softmax(-1)
            consistent = soft_cross_entropy(logits, average).mean()
            loss = loss + c.mesa.weight * consistent
            metrics["train/mesa"] = Mean(consistent.detach(), 1.0)
        return StepOutput(loss=loss, metrics=metrics)

    def after_step(self, loss: Tensor) -> dict[str, Mean]:
        """Move the average; its numbers are not logged, since its decay is constant."""
        super().after_step(loss)
        return {}


def prepare(s: StageContext[DistillConfig]) -> Prepared[DistillTask]:
    """Build the student, its average and its teacher, and say how they are evaluated and exported."""
    config, shape = s.config, s.model_config()
    size, num_classes = shape.image_size, len(s.manifest.classes)
    model = build_from_config(shape, trained=config.backbone.train == "whole")
    if config.head_std is not None:
        init_classifier(model.get_classifier(), config.head_std)  # type: ignore[operator]
    new: list[str] = []
    if config.init_from:
        new = transfer(s.ancestry.load("init_from"), model, s.ancestry.folder("init_from")).fresh
    if config.weights:
        new = load_weights(model, config.weights.path).fresh
        if config.weights.saw_labels:
            s.ancestry.saw_external_labels(config.weights.path.name)
    adapt(model, config.backbone, size, new)
    # The copy is made before the engine may shard the weights.
    average = copy_of(model, share=config.engine.zero_stage < 3) if config.average else None
    built: dict[str, nn.Module] = {"student": model}
    teacher: FrozenTeacher | None = None
    if config.teacher:
        built["teacher"] = network = frozen_teacher(s, config.teacher, shape)
        teacher = with_cache(s, config.teacher, network) if config.teacher.cache else network
    weights = s.class_weights(config.class_weights)
    flops = s.flops(built, size)
    if config.teacher and hasattr(model, "set_distilled_training"):
        model.set_distilled_training()  # type: ignore[operator] # its second heads are the teacher's
    guesses = guessed(s, config.guess) if config.guess else None
    views = train_views(size, config.augment, mean=config.data.mean, std=config.data.std, decoding=config.data.decoding)

    def models() -> dict[str, nn.Module]:
        return {"student": s.engine.module} | ({"average": average} if average is not None else {})

    def finish(task: DistillTask) -> None:
        s.evaluator.calibrate(models(), size)
        measured = s.measured | s.evaluator.test(models(), size)
        trained = {"student": s.engine.full_weights()}
        if task.teacher:
            trained["average"] = task.teacher.full_weights()
        trained = {name: merged(weights, s.engine.module) for name, weights in trained.items()}
        chosen = trained.pop(task.exported)
        export(s, chosen, model=shape, measured=measured, name=task.exported, companions=trained)

    return Prepared(
        model=model,
        make_task=lambda engine: DistillTask(engine, config, num_classes, teacher, average, weights),
        views=dict.fromkeys(s.streams, views),
        image_size=size,
        flops=flops,
        evaluate=lambda step, board: s.evaluator.validate(models(), size),
        finish=finish,
        backbone=config.backbone,
        starts_trained=bool(config.init_from or config.weights) and not new,
        guesses=guesses,
    )


def guessed(s: StageContext[DistillConfig], config: GuessConfig) -> np.ndarray:
    """Let rank 0 guess the labels of the unlabelled images, and return those of all samples on every rank."""
    found = None
    if s.world.is_main:
        samples = s.subsets.labelled, s.subsets.unlabelled, s.data.held_out
        found = kept_guesses(s.run.folder, s.manifest, *samples, config.learner, decoding=s.config.data.decoding)
    labels = from_main(found, s.world)
    assert labels is not None
    return labels


def frozen_teacher(s: StageContext[DistillConfig], config: TeacherConfig, student: FamilyConfig) -> TeacherInput:
    """Load the teacher, in eval mode and without gradients, on this rank's device. The labels that it saw count as seen.

    It sees the student's images as its own were prepared: by its card, or for timm by its `pretrained_cfg` and the config.
    """
    seen = s.config.data.preprocessing
    if config.timm is not None and config.weights is not None:
        size = teacher_size(config, student)
        network: nn.Module = timm_teacher(config.timm, config.weights, len(s.manifest.classes), size)
        s.ancestry.saw_external_labels(config.timm)
        known = timm_input(config.timm)
        usual = known.preprocessing if known else seen
        own = Preprocessing(mean=config.mean or usual.mean, std=config.std or usual.std)
    else:
        network = s.ancestry.load("teacher")
        card = s.ancestry.card("teacher")
        own, size = card.preprocessing, card.model.image_size
    logger.info("the teacher sees images of %d x %d pixels, mean %s and std %s", *size, own.mean, own.std)
    return TeacherInput(network, seen, own, size).to(s.world.device).eval().requires_grad_(False)


def with_cache(s: StageContext[DistillConfig], config: TeacherConfig, teacher: TeacherInput) -> PredictionCache:
    """Keep the teacher's predictions in `teacher.cache`, in a file for its weights, its input and its precision."""
    assert config.cache is not None
    weights = sha256_of(config.weights) if config.weights else s.ancestry.card("teacher").weights_sha256
    path = (
        config.cache
        / f"{weights[:16]}-{teacher.digest(s.config.data.preprocessing)}-{s.config.engine.precision}.sqlite"
    )
    return PredictionCache(teacher, path, gigabytes=config.cache_gb)
