"""Stage 3, semi: semi-supervised fine-tuning with a teacher that LyapEMA moves (Semi-ViM).

Method: Semi-ViM (ICCV 2025): the teacher labels weak views of unlabelled images, the student learns strong views of those
it is confident of, beside the labelled ones; loss and views as in Semi-ViT, the teacher's rule as in `train/lyapema.py`.
Command: python -m stages semi configs/semi/demo.yaml
Input: labelled and unlabelled shards, a classifier's export.  Output: the teacher's (or student's) export.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.data.loader import Batch
from pipeline.data.transforms import pair_views, train_views
from pipeline.models import build_from_config
from pipeline.models.export import transfer
from pipeline.models.flops import TRAINING, forward_flops
from pipeline.models.losses import pseudo_labels
from pipeline.observe.tensorboard import Board
from pipeline.train.engine import Engine
from pipeline.train.lyapema import LyapEMA
from pipeline.train.replay import Replay
from pipeline.train.task import Mean, StepOutput, Task, mean_of, probe_answer
from stages.configs import SemiConfig
from stages.setting import Setting


class SemiTask(Task):
    """Cross-entropy on labels, plus cross-entropy on the teacher's confident pseudo-labels."""

    def __init__(self, engine: Engine, teacher: nn.Module, config: SemiConfig) -> None:
        self.config = config
        self.ema = LyapEMA(engine.masters, engine.base_optimizer, config.ema, engine.all_reduce)
        # The working copy that answers; the teacher itself lies in fp32 beside the optimizer's shards.
        self.teacher = teacher.to(engine.world.device).eval().requires_grad_(False)
        engine.copy_weights(self.ema.teacher, self.teacher)

    def loss(self, model: nn.Module, batch: Mapping[str, Batch]) -> StepOutput:
        labelled, unlabelled = batch["labelled"], batch["unlabelled"]
        assert unlabelled.strong is not None
        with torch.no_grad():
            pseudo, confidence, accepted = pseudo_labels(self.teacher(unlabelled.images), self.config.threshold)
        # One forward pass for both streams.
        logits = model(torch.cat([labelled.images, unlabelled.strong])).float()
        known, guessed = logits.split([len(labelled), len(unlabelled)])
        supervised = F.cross_entropy(known, labelled.labels, label_smoothing=self.config.label_smoothing)
        each = F.cross_entropy(guessed, pseudo, reduction="none")
        consistency = (each * accepted).mean()
        return StepOutput(
            loss=supervised + self.config.unlabelled_weight * consistency,
            metrics={
                "train/supervised": mean_of(supervised[None]),
                "train/consistency": mean_of(each, accepted),
                "train/top1": mean_of(100.0 * (known.argmax(-1) == labelled.labels)),
                "ssl/mask_rate": mean_of(accepted),
                "ssl/confidence": mean_of(confidence),
            },
        )

    def after_step(self, engine: Engine, step: int) -> dict[str, Mean]:
        report = self.ema.update()
        engine.copy_weights(self.ema.teacher, self.teacher)
        return report

    def probe(self, model: nn.Module, images: Tensor) -> float:
        return probe_answer(model, images) + probe_answer(self.teacher, images)

    def sharded_state(self) -> dict[str, dict[Tensor, Tensor]]:
        return {"teacher": self.ema.teacher}

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict()

    def load_state_dict(self, state: dict[str, Any], engine: Engine) -> None:
        self.ema.load_state_dict(state)
        engine.copy_weights(self.ema.teacher, self.teacher)


def run(config: SemiConfig, replay: Replay | None = None) -> None:
    with Setting("semi", config, replay) as s:
        parent, card = s.parent("init_from"), s.parent_card("init_from")
        shape = (
            card.model if config.drop_path is None else card.model.model_copy(update={"drop_path": config.drop_path})
        )
        size, data = shape.image_size, config.data
        model = build_from_config(shape)
        transfer(parent, model, config.parents()["init_from"])
        teacher = copy.deepcopy(model)  # before the engine may cut the weights
        weak, strong = (train_views(size, a, mean=data.mean, std=data.std) for a in (config.weak, config.strong))
        labelled, ratio = config.loop.global_batch, config.unlabelled_ratio
        streams = {
            "labelled": s.loader(s.parts.labelled, strong, global_batch=labelled),
            "unlabelled": s.loader(
                s.parts.unlabelled, pair_views(weak, strong), global_batch=ratio * labelled, hide_labels=True
            ),
        }

        def evaluate(step: int, board: Board) -> dict[str, float]:
            return s.validate({"student": s.engine.model, "teacher": teacher}, size)

        flops = (TRAINING * (1 + ratio) + ratio) * forward_flops(model, size)  # the teacher sees the unlabelled
        task = s.train(model, lambda engine: SemiTask(engine, teacher, config), streams, evaluate, size, flops)
        measured = s.measured | s.test({"student": s.engine.model, "teacher": teacher}, size)
        student_weights = s.engine.full_weights()
        weights = (
            student_weights
            if config.export == "student"
            else {k: v.cpu() for k, v in task.teacher.state_dict().items()}
        )
        s.export(weights, model=shape, uses_labels=True, measured=measured)
