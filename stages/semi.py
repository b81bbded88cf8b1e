"""Stage 3, semi: semi-supervised fine-tuning with a teacher that LyapEMA moves (Semi-ViM).

Method: Semi-ViM (ICCV 2025): the teacher labels weak views of unlabelled images, the student learns strong views of those
it is confident of, beside the labelled ones; loss and views as in Semi-ViT, the teacher's rule as in `train/lyapema.py`,
SSMixup as in `models/vision_mamba/ssmixup.py`. Supervised training, FixMatch and Semi-ViT are configs of the same Task.
Command: python -m stages semi configs/semi/demo.yaml
Input: labelled and unlabelled shards, a classifier's export.  Output: the teacher's (or student's) export.
"""

import copy
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.evaluate.pseudo import count_pseudo_labels, pseudo_summary
from pipeline.exports.export import transfer
from pipeline.models import build_from_config
from pipeline.models.config import FamilyConfig, SSMixupConfig, VisionMambaConfig
from pipeline.models.flops import TRAINING, forward_flops
from pipeline.models.losses import one_hot, soft_cross_entropy
from pipeline.report.tensorboard import Board
from pipeline.ssl.inference_copy import InferenceCopy
from pipeline.ssl.lyapema import LyapEMA
from pipeline.ssl.pseudo_labels import PseudoLabeller, PseudoLabels
from pipeline.streaming.loader import Batch
from pipeline.streaming.mixup import mix, mix_at_random, mix_by_confidence, pair_ratio
from pipeline.streaming.transforms import pair_views, train_views
from pipeline.train.engine import Engine
from pipeline.train.replay import Replay
from pipeline.train.task import Mean, StepOutput, Task, mean_of, probe_answer
from stages.configs import SemiConfig
from stages.context import StageContext


class SemiTask(Task):
    """Cross-entropy on labels, plus cross-entropy on confident pseudo-labels. `prior` (C,): the classes' shares of the labels."""

    def __init__(
        self, engine: Engine, teacher: nn.Module, labeller: PseudoLabeller, config: SemiConfig, prior: Tensor
    ) -> None:
        self.config, self.labeller = config, labeller
        self.ema = LyapEMA(
            engine.masters, engine.base_optimizer, config.ema, engine.all_reduce, num_weights=engine.num_weights
        )
        average = config.ema.buffers == "average"
        self.copy = InferenceCopy(engine, teacher, self.ema.teacher, average_buffers=average)
        # A class without labels is as rare as one with half a label.
        rarest = prior[prior > 0].min() / 2
        self.adjustment = config.logit_adjustment * prior.clamp(min=rarest).log().float()

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        c, labelled, unlabelled = self.config, batch["labelled"], batch.get("unlabelled")
        truth = one_hot(labelled.labels, len(self.adjustment))
        images, targets = mix_at_random(
            labelled.images, truth, labelled.partner(), mixup=c.mixup.labelled_mixup, cutmix=c.mixup.labelled_cutmix
        )
        if unlabelled is None:
            logits = model(images).float()
            supervised = soft_cross_entropy(logits + self.adjustment, targets, c.label_smoothing).mean()
            return StepOutput(loss=supervised, metrics=_supervised_metrics(supervised, logits, labelled))
        pseudo = self.labeller.label(
            answers(self.copy.module if c.pseudo.labeller == "teacher" else model, unlabelled.images)
        )
        strong, guesses, accepted, blend = self._mixed(unlabelled, pseudo)
        # One forward pass for both streams; labelled images have a share in SSMixup only where every image has.
        everything = torch.cat([images, strong])
        if blend is None:
            logits = model(everything).float()
        else:
            alone = blend.new_full((len(images), 2), 0.5 if c.ssmixup and c.ssmixup.everywhere else 0.0)
            logits = model(everything, torch.cat([alone, blend])).float()
        known, guessed = logits.split([len(images), len(strong)])
        supervised = soft_cross_entropy(known + self.adjustment, targets, c.label_smoothing).mean()
        each = soft_cross_entropy(guessed + self.adjustment, guesses, c.pseudo.smoothing)
        count = accepted.sum().clamp(min=1.0) if c.pseudo.normalise == "accepted" else len(each)
        weight = self.weight()
        metrics = {
            **_supervised_metrics(supervised, known, labelled),
            "train/consistency": mean_of(each, accepted),
            "ssl/weight": Mean(torch.tensor(weight), 1.0),
            "ssl/mask_rate": mean_of(pseudo.accepted),
            "ssl/confidence": mean_of(pseudo.confidence),
            "ssl/class_entropy": Mean(self.labeller.class_entropy(), 1.0),
            "ssl/agreement": mean_of(guessed.argmax(-1) == guesses.argmax(-1), accepted),
        }
        return StepOutput(loss=supervised + weight * (each * accepted).sum() / count, metrics=metrics)

    def _mixed(self, batch: Batch, pseudo: PseudoLabels) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Strong views, their targets, which of them count, and SSMixup's blend (B, 2) if the model has it."""
        assert batch.strong is not None
        c, partner = self.config, batch.partner()
        images, targets, accepted = batch.strong, pseudo.targets, pseudo.accepted
        if c.mixup.pseudo:
            images, targets = mix_by_confidence(images, targets, pseudo.confidence, partner, c.mixup.cut_share)
            accepted = torch.maximum(accepted, accepted[partner])
        if c.ssmixup is None:
            return images, targets, accepted, None
        psi = {
            "pair": pair_ratio(pseudo.confidence, partner),
            "self": pseudo.confidence,
            "fixed": torch.full_like(pseudo.confidence, c.ssmixup.fixed_psi),
        }[c.ssmixup.psi]
        if c.ssmixup.axis != "direction":
            nowhere = torch.zeros_like(psi, dtype=torch.bool)
            images, targets, _ = mix(images, targets, partner, psi, nowhere)
            accepted = accepted * accepted[partner]  # as released: both must be confident
        return images, targets, accepted, None if c.ssmixup.axis == "sample" else torch.stack([psi, 1 - psi], dim=1)

    def weight(self) -> float:
        """Of the unlabelled loss at this step."""
        p = self.config.pseudo
        risen = min(1.0, self.ema.updates / p.ramp_steps) if p.ramp_steps else 1.0
        return p.weight * (1 - math.cos(math.pi * risen)) / 2

    def after_step(self, engine: Engine, loss: Tensor) -> dict[str, Mean]:
        report = self.ema.update(loss)
        self.labeller.update()
        self.copy.refresh(self.ema.one_minus_alpha)
        return report

    def alarms(self, row: dict[str, float]) -> list[str]:
        limits = self.config.alarms
        if self.ema.updates < limits.after_steps:
            return []
        watched = {
            "ssl/mask_rate": (limits.mask_rate, "hardly a pseudo-label counts: lower pseudo.threshold"),
            "ssl/class_entropy": (
                limits.class_entropy,
                "the pseudo-labels collapse to few classes: try pseudo.alignment",
            ),
            "ssl/agreement": (
                limits.agreement,
                "the student does not follow its teacher: lower optim.lr or the views' strength",
            ),
        }
        return [
            f"{name} is {row[name]:.3g}, below {least:g}; {advice}"
            for name, (least, advice) in watched.items()
            if row.get(name, 1.0) < least
        ]

    def probe(self, model: nn.Module, images: Tensor) -> float:
        return probe_answer(model, images) + probe_answer(self.copy.module, images)

    def captions(self, model: nn.Module, batch: Batch) -> list[str] | None:
        """The pseudo-label of each weak view, its confidence, and whether it counts."""
        if batch.strong is None:
            return None
        who = self.copy.module if self.config.pseudo.labeller == "teacher" else model
        images = batch.images.to(next(who.parameters()).device)
        pseudo = self.labeller.label(answers(who, images), watch=False)
        rows = zip(pseudo.labels.tolist(), pseudo.confidence.tolist(), pseudo.accepted.tolist(), strict=True)
        return [f"{c} {100 * share:.0f}% {'✓' if counts else '–'}" for c, share, counts in rows]

    def sharded_state(self) -> dict[str, dict[Tensor, Tensor]]:
        return {"teacher": self.ema.teacher}

    def buffers(self) -> dict[str, Tensor]:
        return self.copy.averaged_buffers()

    def state_dict(self) -> dict[str, Any]:
        return {"ema": self.ema.state_dict(), "labeller": self.labeller.state_dict()}

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        self.ema.load_state_dict(state["ema"])
        self.labeller.load_state_dict(state["labeller"])
        self.copy.refresh()


@torch.no_grad()
def answers(model: nn.Module, images: Tensor) -> Tensor:
    """Logits in eval mode: who labels drops nothing and learns no statistics."""
    was_training = model.training
    model.eval()
    logits = model(images)
    model.train(was_training)
    return logits


def _supervised_metrics(loss: Tensor, logits: Tensor, labelled: Batch) -> dict[str, Mean]:
    right = logits.argmax(-1) == labelled.labels
    return {"train/supervised": mean_of(loss[None]), "train/top1": mean_of(100.0 * right)}


def run(config: SemiConfig, replay: Replay | None = None) -> None:
    with StageContext("semi", config, replay) as s:
        parent, card = s.parent("init_from"), s.parent_card("init_from")
        shape = student_of(card.model, config)
        size, data = shape.image_size, config.data
        model = build_from_config(shape)
        transfer(parent, model, config.parents()["init_from"])
        teacher = copy.deepcopy(model)  # before the engine may cut the weights
        weak, strong, views = (
            train_views(size, a, mean=data.mean, std=data.std)
            for a in (config.weak, config.strong, config.labelled or config.strong)
        )
        labelled = config.loop.global_batch
        ratio = config.unlabelled_ratio if config.pseudo.weight else 0
        streams = {"labelled": s.loader(s.parts.labelled, views, global_batch=labelled)}
        if ratio:
            streams["unlabelled"] = s.loader(
                s.parts.unlabelled, pair_views(weak, strong), global_batch=ratio * labelled, hide_labels=True
            )
        counts = np.bincount(s.manifest.labels[s.parts.labelled], minlength=len(s.manifest.classes))
        prior = torch.from_numpy(counts / counts.sum()).to(s.world.device)
        labeller = PseudoLabeller(prior, config.pseudo)

        def evaluate(step: int, board: Board) -> dict[str, float]:
            row = s.evaluator.validate({"student": s.engine.module, "teacher": teacher}, size)
            if not ratio or not config.watched_samples:
                return row
            who = teacher if config.pseudo.labeller == "teacher" else s.engine.module
            known = s.parts.unlabelled
            watched = known[np.linspace(0, len(known) - 1, min(config.watched_samples, len(known))).astype(int)]
            batches = s.evaluator.evaluation(s.manifest, watched, size)
            label = partial(labeller.label, watch=False)
            counted = count_pseudo_labels(
                lambda images: label(answers(who, images)), batches, len(counts), s.world.device
            )
            board.class_counts("pseudo/classes", counted.accepted.sum(0), step)
            return row | {f"pseudo/{name}": v for name, v in pseudo_summary(counted, s.evaluator.groups()).items()}

        flops = (TRAINING * (1 + ratio) + ratio) * forward_flops(model, size)  # the teacher sees the unlabelled
        task = s.train(model, lambda e: SemiTask(e, teacher, labeller, config, prior), streams, evaluate, size, flops)
        measured = s.measured | s.evaluator.test({"student": s.engine.module, "teacher": teacher}, size)
        lasting = lasting_form(shape)
        kept = build_from_config(lasting).state_dict()
        weights = {"student": s.engine.full_weights(), "teacher": task.copy.full_weights()}
        weights = {name: {k: v for k, v in w.items() if k in kept} for name, w in weights.items()}
        chosen = weights.pop(config.export)
        s.export(chosen, model=lasting, uses_labels=True, measured=measured, companions=weights)


def student_of(parent: FamilyConfig, config: SemiConfig) -> FamilyConfig:
    """The parent's model with this stage's drop path and SSMixup."""
    values = parent.model_dump()
    if config.drop_path is not None:
        values["drop_path"] = config.drop_path
    if config.ssmixup and config.ssmixup.axis != "sample":
        values["ssmixup"] = {name: getattr(config.ssmixup, name) for name in SSMixupConfig.model_fields}
    return type(parent).model_validate(values)


def lasting_form(shape: FamilyConfig) -> FamilyConfig:
    """Without an SSMixup that was only of training: it leaves nothing behind."""
    if isinstance(shape, VisionMambaConfig) and shape.ssmixup and not shape.ssmixup.everywhere:
        return shape.model_copy(update={"ssmixup": None})
    return shape
