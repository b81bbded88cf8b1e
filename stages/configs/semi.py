"""Stage 3, semi: the config and the spec of semi-supervised fine-tuning (torch-free)."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import NonNegativeInt, PathText, Strict
from pipeline.errors import ConfigError, HandoverError
from pipeline.identity import FREE
from pipeline.models.backbone.config import WHOLE, BackboneConfig
from pipeline.models.config import ModelConfig, SSMixupConfig, VisionMambaConfig
from pipeline.models.family import FamilyConfig
from pipeline.ssl.config import BalancedHeadConfig, LyapEMAConfig, PseudoLabelRule
from pipeline.streaming.config import AugmentConfig
from stages.configs.base import ClassWeightsConfig, StageConfig, refuse_two_corrections
from stages.spec import Network, ParentModel, StageSpec, Stream, Subsets, Workload


class PseudoLabelConfig(PseudoLabelRule):
    """Which predictions of the teacher the student learns, and with what weight."""

    labeller: Literal["teacher", "student"] = Field(
        "teacher",
        description="the network that gives pseudo-labels; student: FixMatch, where the teacher is only an average to be"
        " evaluated",
    )
    weight: float = Field(
        5.0, ge=0, le=1e6, description="weight of the unlabelled loss; 0 = supervised only, no unlabelled image is read"
    )
    ramp_steps: NonNegativeInt = Field(0, description="steps over which the weight rises from 0 (half a cosine)")
    normalise: Literal["batch", "accepted"] = Field(
        "batch",
        description="the unlabelled loss is a mean over the whole batch, or over the accepted pseudo-labels of a process's"
        " micro-batch",
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing of pseudo-labels (Semi-ViT: 0.1)")
    fairness: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="weight of FreeMatch's self-adaptive fairness on the strong views; 0 = off (FreeMatch: 0.01 to 0.05)",
    )


class MixupConfig(Strict):
    """Mixing of two images. The ratios of labelled pairs are drawn; those of unlabelled pairs follow the confidences."""

    labelled_mixup: float = Field(
        0.0, ge=0, le=1000, description="a of Beta(a, a) for mixup of labelled images; 0 = off (Semi-ViT: 0.8)"
    )
    labelled_cutmix: float = Field(
        0.0, ge=0, le=1000, description="a of Beta(a, a) for CutMix of labelled images; 0 = off (Semi-ViT: 1)"
    )
    pseudo: bool = Field(False, description="Semi-ViT's probabilistic pseudo-mixup of the strong views")
    cut_share: float = Field(
        0.5, ge=0, le=1, description="share of the pseudo-mixed images that are cut instead of averaged"
    )


class StageSSMixupConfig(SSMixupConfig):
    """SSMixup in this stage: the model's settings, and where psi comes from. Supplement and README leave most of it open."""

    psi: Literal["pair", "self", "fixed"] = Field(
        "pair",
        description="c / (c + c of the partner), c itself, or ssmixup.fixed_psi, where c is the pseudo-label's confidence",
    )
    fixed_psi: float = Field(0.5, ge=0, le=1, description="psi of every image, if ssmixup.psi is fixed")
    axis: Literal["direction", "sample", "both", "logits"] = Field(
        "direction",
        description="what psi mixes: the two directions in a block, the images with their targets, or both; logits: an additional"
        " loss on mixed images and their mirror images, for every model (the released code)",
    )

    @model_validator(mode="after")
    def _nothing_unread(self) -> Self:
        fields = type(self).model_fields
        given = [name for name in ("layers", "readout", "everywhere") if getattr(self, name) != fields[name].default]
        if self.axis == "logits" and given:
            raise ValueError(f"ssmixup.axis=logits changes no block of the model; leave out {', '.join(given)}")
        if self.axis == "logits" and self.nu == "learned":
            raise ValueError("ssmixup.axis=logits needs a number for ssmixup.nu; the released code has nu=1.0")
        return self

    @property
    def in_model(self) -> bool:
        """Whether the term is in the model's blocks."""
        return self.axis in ("direction", "both")


class AlarmConfig(Strict):
    """Limits below which a semi-supervised run counts as collapsing. An alarm is logged and reported as an incident."""

    after_steps: NonNegativeInt = Field(100, description="optimizer steps before the first alarm")
    mask_rate: float = Field(0.005, ge=0, le=1, description="least share of pseudo-labels that are accepted")
    class_entropy: float = Field(
        0.3, ge=0, le=1, description="least entropy of the mean prediction; 1 = all classes alike, 0 = a single class"
    )
    agreement: float = Field(
        0.1, ge=0, le=1, description="least share of accepted pseudo-labels that the student predicts too"
    )


class SemiConfig(StageConfig):
    """Stage 3: the parent's model on labelled and unlabelled images, with a LyapEMA teacher (Semi-ViM)."""

    stage: ClassVar[str] = "semi"

    init_from: PathText | None = Field(
        None,
        description="a classifier's export to start from: its folder, or the name of a stage of the same experiment; null ="
        " none, and model says what is trained",
        json_schema_extra=FREE,
    )
    teacher_from: PathText | None = Field(
        None,
        description="a classifier's export whose weights the teacher starts from, as init_from; null = the student's. With an"
        " average in stage 2, init_from=distill/export-student teacher_from=distill is Semi-ViT Huge's scheme",
        json_schema_extra=FREE,
    )
    model: ModelConfig | None = Field(
        None, description="a model to train from random weights, in place of init_from, as FixMatch and USB do"
    )
    backbone: BackboneConfig = Field(WHOLE, description="which part of the model trains, and the teacher averages")
    ema: LyapEMAConfig = Field(LyapEMAConfig(), description="how the teacher follows the student")
    weak: AugmentConfig = Field(
        AugmentConfig(color_jitter=0.4), description="augmentation of the unlabelled views that get a pseudo-label"
    )
    strong: AugmentConfig = Field(
        AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erase=0.25),
        description="augmentation of the unlabelled views that the student learns",
    )
    labelled: AugmentConfig | None = Field(None, description="augmentation of labelled images; null = as strong")
    drop_path: float | None = Field(None, ge=0, lt=1, description="drop path rate of the student; null = the parent's")
    unlabelled_ratio: int = Field(5, gt=0, le=1024, description="unlabelled images per labelled image in a step (mu)")
    pseudo: PseudoLabelConfig = Field(PseudoLabelConfig(), description="pseudo-labels and their weight")
    mixup: MixupConfig = Field(MixupConfig(), description="mixing of images")
    ssmixup: StageSSMixupConfig | None = Field(
        None, description="SSMixup, for Vision Mambas of two or four directions; null = off"
    )
    alarms: AlarmConfig = Field(AlarmConfig(), description="when a run counts as collapsing")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of a label that is spread over all classes")
    logit_adjustment: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="tau of Menon et al.: both losses see logits + tau log(share of the class among labels); 0 = off",
    )
    class_weights: ClassWeightsConfig | None = Field(
        None, description="weights of the classes in the loss on labels; null = all alike"
    )
    balanced_head: BalancedHeadConfig | None = Field(
        None, description="ABC's second head, which is evaluated and exported in place of the first; null = none"
    )
    watched_samples: NonNegativeInt = Field(
        1024,
        description="unlabelled images whose pseudo-labels an evaluation compares with their hidden labels, where those"
        " are known; 0 = none",
    )
    export: Literal["teacher", "student"] = Field(
        "teacher", description="the network written to export/; the other goes to export-student/ or export-teacher/"
    )
    allow_more_labels: bool = Field(
        False, description="accept parents that saw labels outside data.split; the result is marked"
    )

    @property
    def unlabelled_per_labelled(self) -> int:
        """Unlabelled images that a step reads per labelled image: none, if the unlabelled loss has no weight."""
        return self.unlabelled_ratio if self.pseudo.weight else 0

    @model_validator(mode="after")
    def _cached(self) -> Self:
        if self.backbone.cached_views and self.mixing():
            raise ValueError(
                f"backbone.cached_views={self.backbone.cached_views} trains on features, but mixup and ssmixup need images; set"
                " mixup={} and ssmixup=null, or cached_views=0"
            )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if (self.init_from is None) == (self.model is None):
            raise ValueError(
                "give init_from, a classifier's export to start from, or model, to train from random weights; one of the two"
            )
        if self.model and self.backbone.train != "whole":
            raise ValueError("model starts from random weights, so all of them must train; set backbone.train=whole")
        if self.teacher_from and (self.model or self.backbone.train != "whole" or self.balanced_head):
            raise ValueError(
                "teacher_from gives the teacher all of its weights, so the student's must come from init_from and all train: give"
                " init_from, backbone.train=whole and balanced_head=null, or leave teacher_from out"
            )
        return self

    @model_validator(mode="after")
    def _one_remedy(self) -> Self:
        refuse_two_corrections(
            {
                "logit_adjustment": self.logit_adjustment,
                "class_weights": self.class_weights,
                "balanced_head": self.balanced_head,
                "data.loader.sampling=class_balanced": self.data.loader.sampling == "class_balanced",
            }
        )
        if self.balanced_head and (self.mixup.pseudo or (self.ssmixup and self.ssmixup.axis != "direction")):
            raise ValueError(
                "balanced_head learns from each strong view alone; set mixup.pseudo=false and ssmixup.axis=direction"
            )
        if self.ssmixup and self.ssmixup.axis in ("sample", "both") and self.mixup.pseudo:
            raise ValueError(f"ssmixup.axis={self.ssmixup.axis} and mixup.pseudo both mix the images; choose one")
        if self.ssmixup and not self.pseudo.weight:
            raise ValueError(
                "ssmixup works on unlabelled images, but pseudo.weight=0 leaves them out; set ssmixup=null or give"
                " pseudo.weight"
            )
        return self

    def mixing(self) -> dict[str, int]:
        """Labelled and unlabelled images are mixed if `mixup` or `ssmixup` says so."""
        labelled = self.mixup.labelled_mixup or self.mixup.labelled_cutmix
        ssmixup = self.ssmixup and (self.ssmixup.psi == "pair" or self.ssmixup.axis != "direction")
        found = {"mixing labelled images": 1} if labelled else {}
        return found | ({"mixing unlabelled images": self.unlabelled_ratio} if self.mixup.pseudo or ssmixup else {})

    def claimed_labels(self) -> bool:
        """Whether the result may only have seen the labels of `data.split`."""
        return not self.allow_more_labels


class SemiSpec(StageSpec[SemiConfig]):
    """Stage 3 trains its parent's model on a labelled and an unlabelled stream, beside an average of it, the teacher."""

    config = SemiConfig
    module = "stages.semi"
    produces = "classifier"

    def streams(self, config: SemiConfig, subsets: Subsets) -> dict[str, Stream]:
        """The labelled images; and unlabelled ones, unless their loss has no weight."""
        batch = config.loop.global_batch
        streams = {"labelled": Stream(subsets.labelled, batch)}
        if ratio := config.unlabelled_per_labelled:
            streams["unlabelled"] = Stream(subsets.unlabelled, ratio * batch, hide_labels=True)
        return streams

    def model_config(self, config: SemiConfig, num_classes: int, parent: ParentModel) -> FamilyConfig:
        """The parent's model or the config's own, with this stage's drop path and SSMixup."""
        model: FamilyConfig = self.own_model(config, num_classes) or parent("init_from")
        values = model.model_dump()
        if config.teacher_from:
            teacher = parent("teacher_from").model_dump()
            for key in (key for key in values | teacher if key != "drop_path" and values.get(key) != teacher.get(key)):
                raise HandoverError(
                    f"teacher_from = {config.teacher_from} has model.{key} = {teacher.get(key)!r}, init_from ="
                    f" {config.init_from} {values.get(key)!r}; the teacher averages the student, so give exports of one model"
                )
        if config.drop_path is not None:
            values["drop_path"] = config.drop_path
        if config.ssmixup and config.ssmixup.in_model:
            values["ssmixup"] = config.ssmixup.model_dump(include=set(SSMixupConfig.model_fields))
        return type(model).model_validate(values)

    def workload(self, config: SemiConfig, num_classes: int, parent: ParentModel) -> Workload:
        """The student, and the teacher that averages it. One of them labels the unlabelled images."""
        model, ratio = self.model_config(config, num_classes, parent), config.unlabelled_per_labelled
        labels = {config.pseudo.labeller: ratio}
        mirrored = 2 * ratio if config.ssmixup and config.ssmixup.axis == "logits" else 0
        student = Network(
            "student",
            "trained",
            model,
            backbone=config.backbone,
            trained_images=1 + ratio + mirrored,
            inferred_images=labels.get("student", 0),
        )
        return Workload((student, Network("teacher", "averaged", model, inferred_images=labels.get("teacher", 0))))

    @staticmethod
    def own_model(config: SemiConfig, num_classes: int) -> FamilyConfig | None:
        """The model that starts from random weights, with the data's number of classes; None if a parent gives it."""
        return config.model and config.model.model_copy(update={"num_classes": num_classes})

    def references(self, config: SemiConfig) -> dict[str, str]:
        """The classifier to start from and that of the teacher, if there are any."""
        given = {"init_from": config.init_from, "teacher_from": config.teacher_from}
        return {key: reference for key, reference in given.items() if reference}

    def exports(self, config: SemiConfig) -> tuple[str, ...]:
        """The teacher and the student; `export` says which is the result."""
        return ("export", "export-student" if config.export == "teacher" else "export-teacher")

    def check_data(self, config: SemiConfig, num_classes: int) -> None:
        """Refuse SSMixup for a model of its own without opposite directions."""
        if config.model:
            self._check_ssmixup(config, config.model, "model")

    def other_paths(self, config: SemiConfig) -> dict[str, Path]:
        """The cache of the backbone's features."""
        return {"backbone.cache": config.backbone.cache} if config.backbone.cache else {}

    def check_parent(self, config: SemiConfig, role: str, folder: Path, kind: str, model: FamilyConfig) -> None:
        """Refuse a pretrainer, and SSMixup for a model without opposite directions."""
        self.need_classifier(role, folder, kind)
        self._check_ssmixup(config, model, str(folder))

    @staticmethod
    def _check_ssmixup(config: SemiConfig, model: FamilyConfig, where: str) -> None:
        blends = config.ssmixup and config.ssmixup.axis != "logits"
        if blends and (not isinstance(model, VisionMambaConfig) or model.directions == 1):
            raise ConfigError(
                f"ssmixup blends the opposite directions of a Vision Mamba, but {model.name} of {where} has none; set"
                " ssmixup=null (LyapEMA works with every model), or mix images instead with ssmixup=null"
                " mixup.pseudo=true, or take the released code's form with ssmixup='{axis: logits, nu: 1.0}'"
            )


def exported_model(model: FamilyConfig) -> FamilyConfig:
    """Return the config of the exported model: without an SSMixup that is used in training only."""
    if isinstance(model, VisionMambaConfig) and model.ssmixup and not model.ssmixup.everywhere:
        return model.model_copy(update={"ssmixup": None})
    return model
