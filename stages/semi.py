"""Stage 3, semi: semi-supervised fine-tuning with a teacher that LyapEMA moves (Semi-ViM).

Method: Semi-ViM (ICCV 2025). The teacher labels weak views of unlabelled images. The student learns the strong views of
those with a confident label, beside the labelled images. Loss and views are those of Semi-ViT, the teacher's rule is in
`pipeline/ssl/lyapema.py`, SSMixup in `pipeline/models/vision_mamba/ssmixup.py`.
Supervised training, FixMatch and Semi-ViT are configs of the same Task.
Command: python -m stages semi configs/semi/demo.yaml
Input: labelled and unlabelled shards, and a classifier's export or nothing. Output: the export of the teacher (or the student).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.evaluate.pseudo import count_pseudo_labels, pseudo_summary
from pipeline.exports.transfer import transfer
from pipeline.models import build_from_config
from pipeline.models.backbone.adapt import adapt, copy_of
from pipeline.models.backbone.lora import merged
from pipeline.models.classifier_layers import FirstOutputs, add_balanced_head, keep_balanced_head
from pipeline.models.losses import one_hot, soft_cross_entropy, weigh
from pipeline.report.tensorboard import Board
from pipeline.ssl.acceptance import fairness
from pipeline.ssl.balanced_head import BalancedHeadLoss
from pipeline.ssl.pseudo_labels import PseudoLabeller, PseudoLabels
from pipeline.ssl.ssmixup import MirroredPairs, mirrored_pairs
from pipeline.ssl.teacher import Teacher
from pipeline.streaming.loader import Batch
from pipeline.streaming.mixup import mix, mix_at_random, mix_by_confidence, pair_ratio
from pipeline.streaming.transforms import pair_views, train_views
from pipeline.train.engine import Engine
from pipeline.train.task import Mean, StepOutput, Task, mean_of
from stages.configs.semi import SemiConfig, exported_model
from stages.context import StageContext
from stages.drivers import Prepared
from stages.handover import export


class SemiTask(Task):
    """Cross-entropy on labels, plus cross-entropy on confident pseudo-labels.

    Args:
        engine: The student under training.
        teacher: A copy of the student that becomes the teacher; its weights are those of `teacher_from`, if that is given.
        labeller: Turns the teacher's logits into pseudo-labels.
        config: The stage's config.
        prior: (C,) the classes' shares of the labelled samples.
        weights: (C,) of the classes in the loss on labels, or none.
    """

    teacher: Teacher

    def __init__(
        self,
        engine: Engine,
        teacher: nn.Module,
        labeller: PseudoLabeller,
        config: SemiConfig,
        prior: Tensor,
        weights: Tensor | None,
    ) -> None:
        self.config, self.labeller, self.weights = config, labeller, weights
        self.exported = config.export
        self.balanced = BalancedHeadLoss(prior, config.balanced_head) if config.balanced_head else None
        self.teacher = Teacher(engine, teacher, config.ema, own_start=config.teacher_from is not None)
        # A class without labels is as rare as one with half a label.
        rarest = prior.masked_fill(prior == 0, math.inf).min() / 2
        self.adjustment = config.logit_adjustment * prior.clamp(min=rarest).log().float()

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        """Return the loss of a micro-batch of both streams, or of `labelled` alone."""
        c, labelled, unlabelled = self.config, batch["labelled"], batch.get("unlabelled")
        truth = one_hot(labelled.labels, len(self.adjustment))
        images, targets = mix_at_random(
            labelled.images, truth, labelled.partner(), mixup=c.mixup.labelled_mixup, cutmix=c.mixup.labelled_cutmix
        )
        if unlabelled is None:
            logits, balanced = self.heads(model(images).float())
            supervised = self._on_labels(logits, targets)
            output = StepOutput(loss=supervised, metrics=_supervised_metrics(supervised, logits, labelled))
            return output if self.balanced is None else self._with_balanced(output, balanced, targets, None)
        labelling, weak = self.heads(eval_logits(self._labelling_network(model), unlabelled.images))
        pseudo = self.labeller.label(labelling)
        strong, guesses, accepted, blend = self._mixed(unlabelled, pseudo)
        pairs = self._mirrored_pairs(unlabelled, pseudo)
        mirrored = [] if pairs is None else [pairs.images, pairs.images.flip(-1)]
        # One forward pass for both streams; labelled images have a share in SSMixup only where every image has.
        parts = [images, strong, *mirrored]
        everything = torch.cat(parts)
        if blend is None:
            output = model(everything).float()
        else:
            alone = blend.new_full((len(images), 2), 0.5 if c.ssmixup and c.ssmixup.everywhere else 0.0)
            output = model(everything, torch.cat([alone, blend])).float()
        logits, balanced = self.heads(output)
        known, guessed, *seen = logits.split([len(part) for part in parts])
        supervised = self._on_labels(known, targets)
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
        loss = supervised + weight * (each * accepted).sum() / count
        if pairs is not None:
            mixed = pairs.loss(*(seen_logits + self.adjustment for seen_logits in seen))
            loss = loss + weight * mixed
            metrics["train/ssmixup"] = mean_of(mixed[None])
        if c.pseudo.fairness:
            fair = fairness(guessed, accepted, self.labeller.means)
            loss = loss + c.pseudo.fairness * fair
            metrics["train/fairness"] = mean_of(fair[None])
        done = StepOutput(loss=loss, metrics=metrics)
        return done if self.balanced is None else self._with_balanced(done, balanced, targets, weak)

    def heads(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Cut the model's output into the logits (B, C) of its own head and of the balanced one, which may be absent."""
        classes = len(self.adjustment)
        return logits[:, -classes:], logits[:, :-classes]

    def _on_labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        each = soft_cross_entropy(logits + self.adjustment, targets, self.config.label_smoothing)
        return weigh(each, targets, self.weights).mean()

    def _with_balanced(self, done: StepOutput, logits: Tensor, targets: Tensor, weak: Tensor | None) -> StepOutput:
        """Add the balanced head's losses; `logits` are those of all images, `weak` those of the weak views."""
        assert self.balanced is not None
        loss = self.balanced.labelled(logits[: len(targets)], targets)
        if weak is not None:
            progress = self.teacher.updates / self.config.loop.steps
            loss = loss + self.balanced.consistency(weak, logits[len(targets) :], progress)
        total = done.loss + self.balanced.config.weight * loss
        return StepOutput(loss=total, metrics=done.metrics | {"train/balanced": mean_of(loss[None])})

    def _labelling_network(self, model: nn.Module) -> nn.Module:
        return self.teacher.module if self.config.pseudo.labeller == "teacher" else model

    def _mixed(self, batch: Batch, pseudo: PseudoLabels) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Strong views, their targets, which are accepted, and SSMixup's blend (B, 2) if the model has it."""
        assert batch.strong is not None
        c, partner = self.config, batch.partner()
        images, targets, accepted = batch.strong, pseudo.targets, pseudo.accepted
        if c.mixup.pseudo:
            images, targets = mix_by_confidence(images, targets, pseudo.confidence, partner, c.mixup.cut_share)
            accepted = torch.maximum(accepted, accepted[partner])
        if c.ssmixup is None or c.ssmixup.axis == "logits":
            return images, targets, accepted, None
        psi = self._psi(pseudo, partner)
        if c.ssmixup.axis != "direction":
            nowhere = torch.zeros_like(psi, dtype=torch.bool)
            images, targets, _ = mix(images, targets, partner, psi, nowhere)
            accepted = accepted * accepted[partner]  # as released: both must be confident
        return images, targets, accepted, None if c.ssmixup.axis == "sample" else torch.stack([psi, 1 - psi], dim=1)

    def _psi(self, pseudo: PseudoLabels, partner: Tensor) -> Tensor:
        assert self.config.ssmixup is not None
        return {
            "pair": pair_ratio(pseudo.confidence, partner),
            "self": pseudo.confidence,
            "fixed": torch.full_like(pseudo.confidence, self.config.ssmixup.fixed_psi),
        }[self.config.ssmixup.psi]

    def _mirrored_pairs(self, batch: Batch, pseudo: PseudoLabels) -> MirroredPairs | None:
        """The mixed images of the released SSMixup, if that is on."""
        if self.config.ssmixup is None or self.config.ssmixup.axis != "logits":
            return None
        assert batch.strong is not None
        partner = batch.partner()
        psi, nu = self._psi(pseudo, partner), self.config.ssmixup.nu
        assert nu != "learned"
        return mirrored_pairs(batch.strong, pseudo, partner, psi, nu)

    def weight(self) -> float:
        """Return the weight of the unlabelled loss at this step."""
        p = self.config.pseudo
        risen = min(1.0, self.teacher.updates / p.ramp_steps) if p.ramp_steps else 1.0
        return p.weight * (1 - math.cos(math.pi * risen)) / 2

    def after_step(self, loss: Tensor) -> dict[str, Mean]:
        """Move the teacher, and let the labeller's running means see the step (collective)."""
        report = self.teacher.after_step(loss)
        self.labeller.update()
        return report

    def alarms(self, row: dict[str, float]) -> list[str]:
        """Return what in a logged row says that the run collapses, with advice."""
        limits, steps = self.config.alarms, self.teacher.updates
        nothing = row.get("ssl/mask_rate", 1.0) == 0 and steps >= self.config.loop.steps // 2
        early = steps < limits.after_steps
        watched = {
            "ssl/mask_rate": (
                limits.mask_rate,
                f"{'no' if nothing else 'hardly any'} pseudo-label is accepted, so the unlabelled images teach nothing: the mean"
                f" confidence is {row.get('ssl/confidence', math.nan):.2f}, pseudo.threshold {self.config.pseudo.threshold:g};"
                " lower pseudo.threshold, train stage 2 longer, or leave stage 3 out",
            ),
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
            if row.get(name, 1.0) < least and (not early or (nothing and name == "ssl/mask_rate"))
        ]

    def captions(self, model: nn.Module, batch: Batch) -> list[str] | None:
        """Return the pseudo-label of each weak view, its confidence, and whether it is accepted."""
        if batch.strong is None:
            return None
        network = self._labelling_network(model)
        images = batch.images.to(next(network.parameters()).device)
        pseudo = self.labeller.label(self.heads(eval_logits(network, images))[0], watch=False)
        rows = zip(pseudo.labels.tolist(), pseudo.confidence.tolist(), pseudo.accepted.tolist(), strict=True)
        return [f"{c} {100 * share:.0f}% {'✓' if counts else '–'}" for c, share, counts in rows]

    def state_dict(self) -> dict[str, Any]:
        """Return the small numbers of the teacher and the labeller."""
        return {**super().state_dict(), "labeller": self.labeller.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the small numbers of the teacher and the labeller."""
        super().load_state_dict(state)
        self.labeller.load_state_dict(state["labeller"])


@torch.no_grad()
def eval_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits (B, C) in eval mode: a labelling pass drops nothing and learns no statistics."""
    was_training = model.training
    model.eval()
    logits = model(images)
    model.train(was_training)
    return logits


def _supervised_metrics(loss: Tensor, logits: Tensor, labelled: Batch) -> dict[str, Mean]:
    right = logits.argmax(-1) == labelled.labels
    return {"train/supervised": mean_of(loss[None]), "train/top1": mean_of(100.0 * right)}


def prepare(s: StageContext[SemiConfig]) -> Prepared[SemiTask]:
    """Build student, teacher and labeller, and say how they are evaluated and exported."""
    config, data = s.config, s.config.data
    starts = {role: s.ancestry.load(role) for role in s.spec.parents(config)}
    shape = s.model_config()
    size = shape.image_size
    model = build_from_config(shape, trained=config.backbone.train == "whole")
    num_classes = len(s.manifest.classes)
    fresh: Sequence[str] = ()
    if config.init_from:
        parent = starts.pop("init_from")
        fresh = transfer(parent, model, s.ancestry.folder("init_from")).fresh
        if not fresh:
            s.evaluator.starts_from(parent, s.ancestry.card("init_from").temperature, size)
    wide = add_balanced_head(model, num_classes) if config.balanced_head else []
    adapt(model, config.backbone, size, fresh)
    teacher = copy_of(model, share=config.engine.zero_stage < 3)  # before the engine may shard the weights
    if config.teacher_from:
        transfer(starts.pop("teacher_from"), teacher, s.ancestry.folder("teacher_from"))
    weak, strong, views = (
        train_views(size, a, mean=data.mean, std=data.std, decoding=data.decoding)
        for a in (config.weak, config.strong, config.labelled or config.strong)
    )
    counts = np.bincount(s.manifest.labels[s.subsets.labelled], minlength=num_classes)
    prior = torch.from_numpy(counts / counts.sum()).to(s.world.device)
    labeller, weights = PseudoLabeller(prior, config.pseudo), s.class_weights(config.class_weights)

    def models() -> dict[str, nn.Module]:
        return {"student": s.engine.module, "teacher": teacher}

    def exported_outputs() -> dict[str, nn.Module]:
        """The models as they are exported: with a balanced head, its logits are the first."""
        return {name: FirstOutputs(model, num_classes) if wide else model for name, model in models().items()}

    def evaluate(step: int, board: Board) -> dict[str, float]:
        row = s.evaluator.validate(exported_outputs(), size)
        known = s.subsets.unlabelled[s.manifest.labels[s.subsets.unlabelled] >= 0]
        if "unlabelled" not in s.streams or not config.watched_samples or not len(known):
            return row
        labelling = models()[config.pseudo.labeller]
        watched = known[np.linspace(0, len(known) - 1, min(config.watched_samples, len(known))).astype(int)]
        batches = s.evaluator.evaluation(s.manifest, watched, size)
        label = partial(labeller.label, watch=False)
        counted = count_pseudo_labels(
            lambda images: label(eval_logits(labelling, images)[:, -num_classes:]),
            batches,
            num_classes,
            s.world.device,
        )
        board.class_counts("pseudo/classes", counted.accepted.sum(0), step)
        return row | {f"pseudo/{name}": v for name, v in pseudo_summary(counted, s.evaluator.groups()).items()}

    def finish(task: SemiTask) -> None:
        s.evaluator.calibrate(exported_outputs(), size)
        measured = s.measured | s.evaluator.test(exported_outputs(), size)
        exported = exported_model(shape)
        kept = build_from_config(exported).state_dict()
        trained = {"student": s.engine.full_weights(), "teacher": task.teacher.full_weights()}
        trained = {name: merged(w, s.engine.module) for name, w in trained.items()}
        trained = {name: {k: v for k, v in w.items() if k in kept} for name, w in trained.items()}
        trained = {name: keep_balanced_head(w, wide, num_classes) for name, w in trained.items()}
        chosen = trained.pop(config.export)
        export(s, chosen, model=exported, measured=measured, name=config.export, companions=trained)

    return Prepared(
        model=model,
        make_task=lambda engine: SemiTask(engine, teacher, labeller, config, prior, weights),
        views={"labelled": views, "unlabelled": pair_views(weak, strong)},
        image_size=size,
        flops=s.flops({"student": model}, size),
        evaluate=evaluate,
        finish=finish,
        backbone=config.backbone,
        starts_trained=bool(config.init_from) and not fresh,
    )
