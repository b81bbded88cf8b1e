"""Stage 2, distill: the config and the spec of supervised training with or without a teacher (torch-free)."""

from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from pipeline.config import PathText, Strict
from pipeline.errors import ConfigError, HandoverError
from pipeline.exports.prefetch import missing_weights
from pipeline.identity import FREE
from pipeline.models.backbone.config import WHOLE, BackboneConfig
from pipeline.models.config import TIMM_PREFIX, ModelConfig, TimmConfig
from pipeline.models.family import FamilyConfig
from pipeline.streaming.config import AugmentConfig
from stages.configs.base import ClassWeightsConfig, StageConfig, refuse_two_corrections
from stages.configs.teacher import GuessConfig, TeacherConfig, teacher_size
from stages.spec import Network, ParentModel, StageSpec, Stream, Subsets, Workload


class AverageConfig(Strict):
    """An average of the weights and running statistics, which is evaluated and exported in place of the student."""

    decay: float = Field(0.9995, gt=0, lt=1, description="share of the average that remains after a step; constant")


class MesaConfig(Strict):
    """Self-distillation: the average's predictions are a second target (MESA, as EfficientViM and VSSD use it)."""

    weight: float = Field(1.0, gt=0, le=1e6, description="weight of the cross-entropy with the average's predictions")
    start: float = Field(0.25, ge=0, le=1, description="share of loop.steps, without the cool-down, before it begins")


class MixConfig(Strict):
    """Mixing of two labelled images of one virtual reader. If both kinds are on, each has an even chance."""

    mixup: float = Field(0.0, ge=0, le=1000, description="a of Beta(a, a) for the ratio of mixup; 0 = off")
    cutmix: float = Field(0.0, ge=0, le=1000, description="a of Beta(a, a) for the ratio of CutMix; 0 = off")


class WeightsConfig(Strict):
    """A file of released weights to start from. Nothing is downloaded. `model: {weights: FILE}` is short for `path`.

    For a model of timm, `data.mean`, `data.std` and `model.image_size` are those of its `pretrained_cfg` unless they are given.
    """

    path: Path = Field(
        description="safetensors or a plain state dict, also in a release's wrapper", json_schema_extra=FREE
    )
    saw_labels: bool = Field(
        True, description="false: pretrained without any label, for example as a masked autoencoder"
    )


class DistillConfig(StageConfig):
    """Stage 2: supervised training from an export, a file of weights or nothing, with or without a teacher."""

    stage: ClassVar[str] = "distill"

    model: ModelConfig = Field(description="the model to train; its number of classes comes from the data")
    init_from: PathText | None = Field(
        None,
        description="export to start from: its folder, or the name of a stage of the same experiment; null = none",
        json_schema_extra=FREE,
    )
    weights: WeightsConfig | None = Field(None, description="file of weights from outside, in place of init_from")
    backbone: BackboneConfig = Field(WHOLE, description="which part of the model trains")
    teacher: TeacherConfig | None = Field(None, description="the distillation teacher; null = none")
    guess: GuessConfig | None = Field(
        None, description="guessed labels for the unlabelled images, for very few labels; null = none"
    )
    augment: AugmentConfig = Field(AugmentConfig(), description="augmentation of training images")
    mix: MixConfig = Field(MixConfig(), description="mixing of labelled images")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of a label that is spread over all classes")
    class_weights: ClassWeightsConfig | None = Field(
        None, description="weights of the classes in the loss on labels; null = all alike"
    )
    head_std: float | None = Field(
        None,
        gt=0,
        le=1,
        description="standard deviation of a fresh classifier's weights, a truncated normal; null = as the model has it (0.02)."
        " ARM, MAE and Semi-ViT fine-tune from 2e-5",
    )
    average: AverageConfig | None = Field(None, description="average of the weights, exported beside the student")
    mesa: MesaConfig | None = Field(
        None, description="self-distillation from the average; null = off, as in the released script beside a teacher"
    )
    allow_more_labels: bool = Field(
        False, description="accept parents that saw labels outside data.split; the result is marked"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_pretrained(cls, values: Any) -> Any:
        """Read `model.weights: FILE` as `weights.path`, and fill in how timm says the images of the weights were prepared."""
        model = values.get("model") if isinstance(values, dict) else None
        if not isinstance(model, dict):
            return values
        values = {**values, "model": {key: value for key, value in model.items() if key != "weights"}}
        if model.get("weights") is not None:
            if values.get("weights") is not None:
                raise ValueError(
                    "model.weights and weights are both given, but a model starts from one place; remove one"
                )
            given = model["weights"]
            values["weights"] = given if isinstance(given, dict) else {"path": given}
        return with_timm_input(values) if values.get("weights") else values

    @model_validator(mode="after")
    def _mesa(self) -> Self:
        if self.mesa and self.average is None:
            raise ValueError("mesa learns from the average of the weights; give average={decay: 0.9995} too")
        return self

    @model_validator(mode="after")
    def _one_source_for_unlabelled(self) -> Self:
        if self.guess and self.teacher and self.teacher.unlabelled_ratio:
            raise ValueError(
                "guess and teacher.unlabelled_ratio both give targets to the unlabelled images; set guess=null or"
                " teacher.unlabelled_ratio=0"
            )
        return self

    @model_validator(mode="after")
    def _one_correction(self) -> Self:
        balanced = self.data.loader.sampling == "class_balanced"
        refuse_two_corrections({"class_weights": self.class_weights, "data.loader.sampling=class_balanced": balanced})
        return self

    @model_validator(mode="after")
    def _cached(self) -> Self:
        if self.backbone.cached_views and (self.mix.mixup or self.mix.cutmix or self.teacher or self.guess):
            raise ValueError(
                f"backbone.cached_views={self.backbone.cached_views} trains on features of the labelled images, but mix, teacher"
                " and guess need others; set mix={}, teacher=null and guess=null, or cached_views=0"
            )
        return self

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.init_from and self.weights:
            raise ValueError("init_from and weights are both given, but a model starts from one place; remove one")
        if self.backbone.train != "whole" and not (self.init_from or self.weights):
            raise ValueError(
                f"backbone.train={self.backbone.train} keeps the backbone's weights, but none are given; give weights or"
                " init_from, or set backbone.train=whole"
            )
        return self

    def mixing(self) -> dict[str, int]:
        """Labelled images are mixed if `mix` says so."""
        return {"mix": 1} if self.mix.mixup or self.mix.cutmix else {}

    def claimed_labels(self) -> bool:
        """Whether the result may only have seen the labels of `data.split`."""
        return not self.allow_more_labels


class DistillSpec(StageSpec[DistillConfig]):
    """Stage 2 trains any model on labelled images, and on unlabelled ones if it has a teacher or guesses for them."""

    config = DistillConfig
    module = "stages.distill"
    produces = "classifier"

    def streams(self, config: DistillConfig, subsets: Subsets) -> dict[str, Stream]:
        """The labelled images; and unlabelled ones, if `teacher.unlabelled_ratio` or `guess` asks for them."""
        batch = config.loop.global_batch
        streams = {"labelled": Stream(subsets.labelled, batch)}
        if ratio := _unlabelled_ratio(config):
            streams["unlabelled"] = Stream(subsets.unlabelled, ratio * batch, hide_labels=True)
        return streams

    def model_config(self, config: DistillConfig, num_classes: int, parent: ParentModel) -> FamilyConfig:
        """The config's model, with the data's number of classes."""
        return config.model.model_copy(update={"num_classes": num_classes})

    def workload(self, config: DistillConfig, num_classes: int, parent: ParentModel) -> Workload:
        """The student, its average and the frozen teacher, as far as the config has them."""
        model, images = self.model_config(config, num_classes, parent), 1 + _unlabelled_ratio(config)
        networks = [Network("student", "trained", model, backbone=config.backbone, trained_images=images)]
        if config.average:
            # MESA's forward pass through the average is not counted: it begins within the run.
            networks.append(Network("average", "averaged", model))
        if config.teacher:
            timm = config.teacher.timm
            teacher = (
                parent("teacher")
                if timm is None
                else TimmConfig(
                    name=TIMM_PREFIX + timm, num_classes=num_classes, image_size=teacher_size(config.teacher, model)
                )
            )
            networks.append(Network("teacher", "frozen", teacher, inferred_images=images))
        return Workload(tuple(networks))

    def references(self, config: DistillConfig) -> dict[str, str]:
        """The export to start from and the teacher, if they are exports."""
        given = {"init_from": config.init_from, "teacher.export": config.teacher.export if config.teacher else None}
        return {key: reference for key, reference in given.items() if reference}

    def foreign_files(self, config: DistillConfig) -> dict[str, Path]:
        """The weights to start from and those of a timm teacher."""
        files = {"weights.path": config.weights.path} if config.weights else {}
        if config.teacher and config.teacher.weights:
            files["teacher.weights"] = config.teacher.weights
        return files

    def exports(self, config: DistillConfig) -> tuple[str, ...]:
        """The average with the student beside it, or the student."""
        return ("export", "export-student") if config.average else ("export",)

    def other_paths(self, config: DistillConfig) -> dict[str, Path]:
        """The caches of the teacher's predictions and of the backbone's features."""
        paths = {
            "teacher.cache": config.teacher.cache if config.teacher else None,
            "backbone.cache": config.backbone.cache,
        }
        return {key: path for key, path in paths.items() if path}

    def check_data(self, config: DistillConfig, num_classes: int) -> None:
        """Refuse another number of classes, missing files of weights, and labels that the result may not have seen."""
        if "num_classes" in config.model.model_fields_set and config.model.num_classes != num_classes:
            raise ConfigError(
                f"model.num_classes is {config.model.num_classes}, but {config.data.train_names} has {num_classes} classes;"
                " remove model.num_classes from the config: the data gives it"
            )
        for key, path in self.foreign_files(config).items():
            start = key == "weights.path"
            name = config.model.name if start else f"{TIMM_PREFIX}{config.teacher.timm if config.teacher else ''}"
            if not path.is_file():
                raise missing_weights(path, name)
            without_labels = start and config.weights is not None and not config.weights.saw_labels
            if config.data.split is not None and not config.allow_more_labels and not without_labels:
                raise HandoverError(
                    f"{key} = {path}: {name} was trained on labels outside those of {config.data.split};"
                    " set allow_more_labels=true to accept it and mark the result"
                )

    def check_parent(self, config: DistillConfig, role: str, folder: Path, kind: str, model: FamilyConfig) -> None:
        """Refuse a teacher that is no classifier or sees other images, and a start from another model."""
        if role == "teacher":
            self.need_classifier(role, folder, kind)
        there, here = model.model_dump(), config.model.model_dump()
        for name in _must_agree(role, kind, model, config.model):
            if there.get(name) != here.get(name):
                raise HandoverError(
                    f"{folder} has model.{name} = {there.get(name)!r}, this config {here.get(name)!r}; set model.{name} to"
                    f" that value, or name another export in {'teacher.export' if role == 'teacher' else role}"
                )


def _unlabelled_ratio(config: DistillConfig) -> int:
    return config.guess.ratio if config.guess else config.teacher.unlabelled_ratio if config.teacher else 0


def with_timm_input(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in `model.image_size`, `data.mean` and `data.std` by timm's `pretrained_cfg`, as far as they are not given.

    timm, and with it torch, is imported here: only for a timm model with weights of which one of the three is missing.
    """
    model, data = values["model"], values.get("data")
    name = str(model.get("name", ""))
    missing = [key for key, given in (("mean", data), ("std", data), ("image_size", model)) if key not in (given or ())]
    if not missing or not name.startswith(TIMM_PREFIX) or not isinstance(data, dict):
        return values
    from pipeline.exports.timm_teacher import timm_input

    known = timm_input(name.removeprefix(TIMM_PREFIX))
    if known is None:
        return values
    prepared = {"mean": known.preprocessing.mean, "std": known.preprocessing.std}
    own = {} if "image_size" not in missing else {"image_size": known.image_size}
    return {**values, "model": {**own, **model}, "data": {**prepared, **data}}


def _must_agree(role: str, kind: str, there: FamilyConfig, here: FamilyConfig) -> tuple[str, ...]:
    """Fields of the model in which a parent and a student must not differ."""
    if role == "teacher":
        return ()  # it sees the student's images, prepared as its own were
    if type(there) is not type(here):
        return ("name",)
    if kind == "classifier":
        # Every timm name is a model of its own; the other families say what they are in their fields.
        free = set(there.free) - ({"name"} if isinstance(there, TimmConfig) else set())
        return tuple(name for name in type(there).model_fields if name not in free)
    return ("embed_dim", "depth", "d_state", "d_conv", "expand", "mlp", "norm", "patch_size", "in_chans")
