"""One step of every stage, made without data on any device: the stage's own Task, driven by the loop's own `train_step`."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models import build_from_config, build_model
from pipeline.models.arm import ARM
from pipeline.models.classifier_layers import add_balanced_head
from pipeline.ssl.pseudo_labels import PseudoLabeller
from pipeline.streaming.batch import Batch
from pipeline.train.distributed import World
from pipeline.train.engine import Engine
from pipeline.train.meter import Meter
from pipeline.train.optim import moments_of, parameter_groups
from pipeline.train.recorder import Recorder
from pipeline.train.task import Task
from pipeline.train.training import StepResult, Training, train_step
from stages import spec_of
from stages.arm import ArmTask
from stages.configs.arm import ArmConfig
from stages.configs.base import StageConfig
from stages.configs.distill import DistillConfig
from stages.configs.semi import SemiConfig
from stages.distill import DistillTask
from stages.semi import SemiTask

CLASSES, BATCH, SIZE = 5, 4, 32
SHARED = {
    "run": {"experiment": "steps"},
    "data": {"train": "none"},
    "optim": {"lr": 1e-3, "clip_norm": 1.0},
    "engine": {"zero_stage": 0},
    "loop": {"steps": 4, "global_batch": BATCH},
}
VIM = {"name": "vim_nano", "embed_dim": 32, "depth": 2, "image_size": SIZE}
# Every family, as stage 2 trains it.
FAMILIES: dict[str, dict[str, Any]] = {
    "vision_mamba": VIM,
    "efficientvim": {"name": "efficientvim_m1", "image_size": 64},
    "vssd": {"name": "vssd_micro", "image_size": 64},
    "wide_resnet": {"name": "wrn_28_2", "image_size": SIZE},
    "resnet": {"name": "timm/resnet18", "image_size": SIZE},
}
MIX = {"mixup": 0.8, "cutmix": 1.0}
# Names of the runs -> what their config adds.
DISTILL: dict[str, dict[str, Any]] = {name: {"model": model, "mix": MIX} for name, model in FAMILIES.items()} | {
    "teacher": {
        "model": VIM,
        "teacher": {"timm": "resnet18", "weights": "none", "kind": "soft", "unlabelled_ratio": 1},
        "average": {"decay": 0.99},
        "mesa": {"start": 0.0},
        "class_weights": {"kind": "inverse"},
    },
}
SEMI: dict[str, dict[str, Any]] = {
    "lyapema": {
        "ssmixup": {"nu": "learned"},
        "ema": {"mode": "guarded", "pull": 1e-3},
        "pseudo": {"normalise": "accepted"},
    },
    "released": {"ssmixup": {"axis": "logits", "nu": 1.0}, "ema": {"preset": "released", "gamma": 1.0, "pull": 1e-3}},
    "semivit": {
        "mixup": {"pseudo": True, "labelled_mixup": 0.8, "labelled_cutmix": 1.0},
        "ema": {"mode": "ema"},
        "pseudo": {"thresholds": "class_balanced", "alignment": "labelled", "smoothing": 0.1},
    },
    "freematch": {"pseudo": {"thresholds": "freematch", "fairness": 0.01, "labeller": "student"}},
    "softmatch": {
        "pseudo": {"thresholds": "softmatch", "alignment": "uniform", "aligned": "confidence"},
        "logit_adjustment": 1.0,
    },
    "abc": {"balanced_head": {}},
    "resnet": {"model": FAMILIES["resnet"]},
    "efficientvim": {"model": FAMILIES["efficientvim"]},
    "vssd": {"model": FAMILIES["vssd"]},
}
NAMES = ["arm", *(f"distill-{name}" for name in DISTILL), *(f"semi-{name}" for name in SEMI)]


class Fused(torch.optim.Optimizer):
    """Plain descent that reads its rate on the device, as torch's fused optimizers do."""

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * group["lr"])


class NoDeepSpeed:
    """What Engine asks of DeepSpeed at ZeRO 0 on one process."""

    skipped_steps = 0

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def is_gradient_accumulation_boundary(self) -> bool:
        return True

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class BareEngine(Engine):
    """An Engine at ZeRO 0 on any device; DeepSpeed, which cannot run on the meta device, is left out."""

    def __init__(self, model: nn.Module, config: StageConfig, device: torch.device, fused: bool) -> None:
        precision = "fp32" if device.type == "meta" else "bf16"  # there is no autocast on the meta device
        self.world = World(0, 1, device)
        self.config = config.engine.model_copy(update={"precision": precision})
        groups = parameter_groups(model, config.optim)  # type: ignore[arg-type]
        if fused:
            self.base_optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
        else:
            self.base_optimizer = Fused(groups)
        self._optimizer = self.base_optimizer
        self._deepspeed: Any = NoDeepSpeed(model, self.base_optimizer)
        self.model, self._clip_norm = model, config.optim.clip_norm
        self.moments = moments_of(model, self.base_optimizer)
        self.base_optimizer.register_step_pre_hook(self._clip)
        self.named_parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.shards, self.replicated = self._find_shards(), True
        self._norm, self._layout = torch.zeros((), device=device), None


@dataclass
class Steps:
    """A run whose steps can be taken one by one.

    Args:
        training: The run, without streams.
        drawn: The batches of each step, on the device.
    """

    training: Training
    drawn: dict[str, Batch]

    def __post_init__(self) -> None:
        self.meter = Meter(self.training.engine.world, 1.0, 1.0)

    def take(self, step: int) -> StepResult:
        """Do what `fit` does between two log lines."""
        done = train_step(self.training, self.drawn, step=step, data_step=step)
        self.meter.add(done.metrics)
        self.meter.count(images=sum(map(len, self.drawn.values())), moved=done.moved)
        self.training.recorder.note(step, step, self.drawn, done.loss)
        return done


def steps_of(name: str, device: torch.device) -> Steps:
    """Build the run of this name, of NAMES, with random weights and batches."""
    stage, _, variant = name.partition("-")
    with torch.device(device):
        config, model, make_task, streams = {"arm": _arm, "distill": _distill, "semi": _semi}[stage](variant)
        recorder = Recorder(50)
        recorder.watch(model.to(device))
        engine = BareEngine(model, config, device, fused=device.type == "cuda")
        task = make_task(engine)
        size: tuple[int, int] = config.model.image_size  # type: ignore[attr-defined]
        drawn = {stream: _batch(size, strong) for stream, strong in streams.items()}
    training = Training(
        task=task,
        engine=engine,
        streams={},
        loop=config.loop,
        lr_at=lambda step: 1e-3,
        accumulation=1,
        seed=0,
        datasets=(),
        inputs={},
        recorder=recorder,
        fingerprint_images=drawn[next(iter(drawn))].images,
        flops=1.0,
    )
    return Steps(training, drawn)


Made = tuple[StageConfig, nn.Module, Callable[[Engine], Task], dict[str, bool]]


def _arm(variant: str) -> Made:
    config = ArmConfig.model_validate(
        SHARED | {"model": VIM | {"image_size": 64}, "decoder": {"width": 32, "depth": 1, "num_heads": 2}}
    )
    arm = ARM(config.model, config.decoder)
    return config, arm, lambda engine: ArmTask(arm), {"unlabelled": False}


def _distill(variant: str) -> Made:
    config = DistillConfig.model_validate(SHARED | DISTILL[variant])
    shape = config.model.model_copy(update={"num_classes": CLASSES})
    model = build_from_config(shape)
    average = copy.deepcopy(model) if config.average else None
    teacher = build_model("timm/resnet18", num_classes=CLASSES, image_size=SIZE).eval() if config.teacher else None
    weights = torch.ones(CLASSES) if config.class_weights else None
    streams = {"labelled": False} | ({"unlabelled": False} if config.teacher else {})
    return config, model, lambda engine: DistillTask(engine, config, CLASSES, teacher, average, weights), streams


def _semi(variant: str) -> Made:
    config = SemiConfig.model_validate({"model": VIM} | SHARED | SEMI[variant] | {"unlabelled_ratio": 1})
    model = build_from_config(spec_of(config).model_config(config, CLASSES, lambda role: None))  # type: ignore[arg-type,return-value]
    if config.balanced_head:
        add_balanced_head(model, CLASSES)
    teacher, prior = copy.deepcopy(model), torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    labeller = PseudoLabeller(prior, config.pseudo)
    return (
        config,
        model,
        lambda engine: SemiTask(engine, teacher, labeller, config, prior, None),
        {"labelled": False, "unlabelled": True},
    )


def _batch(size: tuple[int, int], strong: bool) -> Batch:
    images = torch.randn(BATCH, 3, *size)
    return Batch(
        images=images,
        strong=images.clone() if strong else None,
        labels=torch.full((BATCH,), -1 if strong else 1),
        indices=torch.arange(BATCH),
        virtual_readers=2,
    )
