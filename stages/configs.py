"""The stages' configs side by side (torch-free, so that a typing error costs a blink).

A parent (`init_from`, `teacher.export`) is a folder, or the name of a stage: its export in the same experiment.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config import Strict
from pipeline.evaluate.config import ProbeConfig
from pipeline.exports.card import Preprocessing
from pipeline.models.config import (
    DecoderConfig,
    ModelConfig,
    PseudoLabelRule,
    SSMixupConfig,
    VisionMambaConfig,
    check_clusters,
    check_taps,
)
from pipeline.models.variants import PRETRAINING_FORM
from pipeline.streaming.config import AugmentConfig, LoaderConfig, derive_virtual_readers
from pipeline.train.config import EngineConfig, LoopConfig, LyapEMAConfig, OptimConfig, RunConfig


class DataConfig(Strict):
    """Which images. `split` says which of `train` are labelled, unlabelled and for validation; without one all are labelled."""

    train: Path = Field(description="folder of shards with a manifest")
    split: Path | None = None
    test: Path | None = Field(None, description="folder with a manifest; evaluated once, after the last step")
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    loader: LoaderConfig = LoaderConfig()
    eval_batch: PositiveInt = Field(256, description="samples per process and step of an evaluation")

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(mean=self.mean, std=self.std)


class StageConfig(Strict):
    run: RunConfig
    data: DataConfig
    optim: OptimConfig
    engine: EngineConfig = EngineConfig()
    loop: LoopConfig

    @model_validator(mode="after")
    def _batches(self) -> Self:
        given = self.data.loader.virtual_readers
        if given and self.loop.global_batch % given:
            raise ValueError(
                f"loop.global_batch {self.loop.global_batch} must be a multiple of data.loader.virtual_readers {given};"
                " leave virtual_readers out and it fits"
            )
        rest = self.loop.steps - self.optim.cooldown_steps
        if self.optim.warmup_steps >= rest:
            less = " minus optim.cooldown_steps" if self.optim.cooldown_steps else ""
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} must be below loop.steps {rest}{less}")
        return self

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        """Refuse a lone image: it would be mixed with itself, since partners are found inside a virtual reader."""
        batch, given = self.loop.global_batch, self.data.loader.virtual_readers
        for what, ratio in self.mixing().items():
            times = f"{ratio} x " if ratio > 1 else ""
            if given and ratio * batch < 2 * given:
                raise ValueError(
                    f"{what} needs two images in each virtual reader: {times}loop.global_batch {batch} must be at least"
                    f" twice data.loader.virtual_readers {given}; leave virtual_readers out"
                )
            if ratio == 1 and 1 in (batch, self.engine.micro_batch):
                key = "loop.global_batch" if batch == 1 else "engine.micro_batch"
                raise ValueError(f"{what} needs two images at once: {key} is 1; set 2 or more")
        return self

    def mixing(self) -> dict[str, int]:
        """What is mixed in pairs -> images of that stream per image of `loop.global_batch`."""
        return {}

    def virtual_readers(self, samples: Iterable[int]) -> int:
        """Number of virtual readers: as given, or derived for streams of that many `samples`."""
        mixed = 1 in self.mixing().values()
        return self.data.loader.virtual_readers or derive_virtual_readers(
            self.loop.global_batch, min(samples), mixed=mixed
        )

    def parents(self) -> dict[str, Path]:
        """role -> folder of the export that this stage consumes."""
        return {}

    def claimed_labels(self) -> bool:
        """Whether the result may only have seen the labels of `data.split`."""
        return True

    def _parent(self, name: str) -> Path:
        return self.run.folder(name) / "export" if name in ("arm", "distill", "semi") else Path(name)


class ArmConfig(StageConfig):
    """Stage 1: autoregressive pretraining; only `probe` reads labels. The first stream is `unlabelled`: all training images."""

    model: VisionMambaConfig
    decoder: DecoderConfig = DecoderConfig()
    augment: AugmentConfig = AugmentConfig(crop_scale=(0.2, 1.0))
    probe: ProbeConfig | None = Field(
        ProbeConfig(), description="needs data.split with labelled and validation parts; null = no probes"
    )

    @model_validator(mode="before")
    @classmethod
    def _form(cls, values: Any) -> Any:
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict):
            return values
        for name, decided in PRETRAINING_FORM.items():
            if model.get(name, decided) != decided:
                raise ValueError(
                    f"model.{name} = {model[name]!r}: pretraining decides it ({decided!r}); leave it out here"
                )
        return {**values, "model": {"order": "cluster", **model, **PRETRAINING_FORM}}

    @model_validator(mode="after")
    def _clusters(self) -> Self:
        check_clusters(self.model)
        check_taps(self.decoder, self.model)
        return self

    @model_validator(mode="after")
    def _cadence(self) -> Self:
        every = self.probe.every if self.probe else None
        if every and every % (self.loop.eval_every or self.loop.steps):
            raise ValueError(
                f"probe.every {every} must be a multiple of loop.eval_every {self.loop.eval_every}: probes are evaluations"
            )
        return self


class TeacherConfig(Strict):
    """A frozen network whose answers the student also learns from: an export of ours, or a timm model."""

    export: str | None = Field(None, description="folder, or stage name")
    timm: str | None = Field(None, description="timm model name, for example regnety_160.deit_in1k")
    weights: Path | None = Field(
        None, description="its weights file (safetensors or a plain state dict): nothing is downloaded"
    )
    kind: Literal["hard", "soft"] = "hard"
    weight: float = Field(0.5, ge=0, le=1, description="share of the teacher's loss; the labels have the rest")
    temperature: float = Field(1.0, gt=0, description="of soft targets")
    unlabelled_ratio: NonNegativeInt = Field(
        0, description="unlabelled images of data.split per labelled one in a step, which only the teacher teaches"
    )
    cache: Path | None = Field(
        None, description="folder that keeps its answers by what it saw: a second run does not pay for them again"
    )
    cache_gb: float = Field(50.0, gt=0, description="GB on disk that teacher.cache may grow to; more is not kept")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.export is None) == (self.timm is None):
            raise ValueError("give exactly one of teacher.export and teacher.timm")
        if (self.timm is None) != (self.weights is None):
            raise ValueError("teacher.timm and teacher.weights belong together: give the path of the weights file")
        return self


class AverageConfig(Strict):
    """An average of the weights and running statistics, which is judged and exported in place of the student."""

    decay: float = Field(0.9995, gt=0, lt=1, description="a step; constant")


class MesaConfig(Strict):
    """Self-distillation: the average's answers are a second target (MESA as EfficientViM and VSSD have it)."""

    weight: float = Field(1.0, gt=0, description="of the cross-entropy with the average's answers")
    start: float = Field(0.25, ge=0, le=1, description="share of loop.steps, without cool-down, before it begins")


class MixConfig(Strict):
    """Two labelled images in one, each with its partner in the virtual reader; even chances if both are on."""

    mixup: float = Field(0.0, ge=0, description="a of Beta(a, a); 0 = off")
    cutmix: float = Field(0.0, ge=0, description="a of Beta(a, a); 0 = off")


class WeightsConfig(Strict):
    """A file of released weights to start from. Nothing is downloaded."""

    path: Path = Field(description="safetensors, or a plain state dict; wrapped as released is fine")
    saw_labels: bool = Field(True, description="false: pretrained without any label, as a masked autoencoder is")


class DistillConfig(StageConfig):
    """Stage 2: supervised training on the `labelled` stream, from an export, a file or nothing, with or without a teacher."""

    model: ModelConfig
    init_from: str | None = Field(None, description="folder, or stage name; none = from scratch")
    weights: WeightsConfig | None = Field(None, description="in place of init_from: a file from outside")
    teacher: TeacherConfig | None = None
    augment: AugmentConfig = AugmentConfig()
    mix: MixConfig = MixConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    average: AverageConfig | None = Field(None, description="null = the student itself is judged and exported")
    mesa: MesaConfig | None = Field(None, description="the released script leaves it off beside a teacher")
    allow_more_labels: bool = Field(
        False, description="accept parents that saw labels outside data.split; marks the result"
    )

    @model_validator(mode="after")
    def _unlabelled(self) -> Self:
        if self.teacher and self.teacher.unlabelled_ratio and self.data.split is None:
            raise ValueError(
                "teacher.unlabelled_ratio needs data.split, which says what is unlabelled; give it or set 0"
            )
        return self

    @model_validator(mode="after")
    def _mesa(self) -> Self:
        if self.mesa and self.average is None:
            raise ValueError("mesa learns from the average of the weights: give average={decay: 0.9995} too")
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.init_from and self.weights:
            raise ValueError("give init_from or weights, not both: a model starts from one place")
        return self

    def mixing(self) -> dict[str, int]:
        return {"mix": 1} if self.mix.mixup or self.mix.cutmix else {}

    def parents(self) -> dict[str, Path]:
        found = {}
        if self.init_from:
            found["init_from"] = self._parent(self.init_from)
        if self.teacher and self.teacher.export:
            found["teacher"] = self._parent(self.teacher.export)
        return found

    def claimed_labels(self) -> bool:
        return not self.allow_more_labels


class PseudoLabelConfig(PseudoLabelRule):
    """Which answers of the teacher the student learns, and how much."""

    labeller: Literal["teacher", "student"] = Field(
        "teacher", description="who labels; student: FixMatch, the teacher is then only an average to be judged"
    )
    weight: float = Field(
        5.0, ge=0, description="of the unlabelled loss; 0 = supervised only, without unlabelled images"
    )
    ramp_steps: NonNegativeInt = Field(0, description="steps over which the weight rises from 0 (half a cosine)")
    normalise: Literal["batch", "accepted"] = Field(
        "batch", description="mean over the whole unlabelled batch, or over what counts of a process's micro-batch"
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of pseudo-labels (Semi-ViT: 0.1)")


class MixupConfig(Strict):
    """Two images in one. Ratios of labelled pairs are drawn, those of unlabelled pairs follow the confidences."""

    labelled_mixup: float = Field(0.0, ge=0, description="a of Beta(a, a); 0 = off (Semi-ViT: 0.8)")
    labelled_cutmix: float = Field(0.0, ge=0, description="a of Beta(a, a); 0 = off (Semi-ViT: 1)")
    pseudo: bool = Field(False, description="Semi-ViT's probabilistic pseudo-mixup of the strong views")
    cut_share: float = Field(0.5, ge=0, le=1, description="of pseudo-mixed images that are cut instead of averaged")


class StageSSMixupConfig(SSMixupConfig):
    """SSMixup in this stage: what the model has of it, and where psi comes from. The sources leave most of it open."""

    psi: Literal["pair", "self", "fixed"] = Field(
        "pair", description="c / (c + c of the partner), c itself, or `fixed_psi`; c the pseudo-label's confidence"
    )
    fixed_psi: float = Field(0.5, ge=0, le=1)
    axis: Literal["direction", "sample", "both"] = Field(
        "direction", description="what psi mixes: the two directions in a block, the images with their targets, or both"
    )


class AlarmConfig(Strict):
    """When a semi-supervised run is said to collapse; an alarm is told, counted as an incident, and stops nothing."""

    after_steps: NonNegativeInt = 100
    mask_rate: float = Field(0.005, ge=0, le=1, description="least share of pseudo-labels that count")
    class_entropy: float = Field(
        0.3, ge=0, le=1, description="least entropy of the mean answer, 1 = all classes alike, 0 = a single one"
    )
    agreement: float = Field(
        0.1, ge=0, le=1, description="least share of accepted pseudo-labels that the student answers too"
    )


class SemiConfig(StageConfig):
    """Stage 3: the parent's model, on `labelled` and `unlabelled` streams, with a LyapEMA teacher (Semi-ViM)."""

    init_from: str = Field(description="folder, or stage name, of a classifier's export")
    ema: LyapEMAConfig = LyapEMAConfig()
    weak: AugmentConfig = AugmentConfig(color_jitter=0.4)
    strong: AugmentConfig = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erase=0.25)
    labelled: AugmentConfig | None = Field(None, description="views of labelled images; none = strong")
    drop_path: float | None = Field(None, ge=0, lt=1, description="none = the parent's")
    unlabelled_ratio: PositiveInt = Field(5, description="unlabelled samples per labelled one in a step (mu)")
    pseudo: PseudoLabelConfig = PseudoLabelConfig()
    mixup: MixupConfig = MixupConfig()
    ssmixup: StageSSMixupConfig | None = None
    alarms: AlarmConfig = AlarmConfig()
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="of labels")
    logit_adjustment: float = Field(
        0.0, ge=0, description="tau of Menon et al.: both losses see logits + tau log(share of the class among labels)"
    )
    watched_samples: NonNegativeInt = Field(
        1024, description="unlabelled images whose pseudo-labels an evaluation compares with the hidden truth"
    )
    export: Literal["teacher", "student"] = "teacher"
    allow_more_labels: bool = Field(
        False, description="accept parents that saw labels outside data.split; marks the result"
    )

    @model_validator(mode="after")
    def _split(self) -> Self:
        if self.data.split is None:
            raise ValueError("data.split is missing: stage 3 needs to know which samples are unlabelled")
        return self

    @model_validator(mode="after")
    def _one_remedy(self) -> Self:
        if self.logit_adjustment and self.data.loader.sampling == "class_balanced":
            raise ValueError(
                "logit_adjustment and data.loader.sampling=class_balanced correct the same imbalance twice; choose one"
            )
        if self.ssmixup and self.ssmixup.axis != "direction" and self.mixup.pseudo:
            raise ValueError(f"ssmixup.axis={self.ssmixup.axis} and mixup.pseudo both mix the images; choose one")
        if self.ssmixup and not self.pseudo.weight:
            raise ValueError("ssmixup works on unlabelled images, and pseudo.weight=0 leaves them out")
        return self

    def mixing(self) -> dict[str, int]:
        labelled = self.mixup.labelled_mixup or self.mixup.labelled_cutmix
        ssmixup = self.ssmixup and (self.ssmixup.psi == "pair" or self.ssmixup.axis != "direction")
        found = {"mixing labelled images": 1} if labelled else {}
        return found | ({"mixing unlabelled images": self.unlabelled_ratio} if self.mixup.pseudo or ssmixup else {})

    def parents(self) -> dict[str, Path]:
        return {"init_from": self._parent(self.init_from)}

    def claimed_labels(self) -> bool:
        return not self.allow_more_labels
