"""What stage 2 may learn from beside the labels: the config of a distillation teacher and of guessed labels (torch-free)."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.config import PathText, PositiveInt, Strict
from pipeline.exports.card import Channels, Spreads
from pipeline.identity import FREE
from pipeline.models.family import FamilyConfig


class TeacherConfig(Strict):
    """A frozen network whose predictions the student also learns from: an export of ours, or a timm model."""

    export: PathText | None = Field(
        None, description="an export's folder, or the name of a stage of the same experiment", json_schema_extra=FREE
    )
    timm: PathText | None = Field(None, description="name of a timm model, for example regnety_160.deit_in1k")
    weights: Path | None = Field(
        None,
        description="weights file of the timm model (safetensors or a plain state dict); nothing is downloaded",
        json_schema_extra=FREE,
    )
    mean: Channels | None = Field(
        None,
        description="mean of red, green and blue, in [0, 1], of the images that the timm model was trained on; null = timm's"
        " own value for it",
    )
    std: Spreads | None = Field(
        None, description="standard deviation of these images; null = timm's own value for the model"
    )
    image_size: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="(height, width) in pixels of these images; null = timm's own value for the model. The teacher sees the"
        " student's images resized to it",
    )
    kind: Literal["hard", "soft"] = Field(
        "hard",
        description="targets: the teacher's most likely class (DeiT), or its softened distribution (Hinton et al.)",
    )
    weight: float = Field(
        0.5, ge=0, le=1, description="share of the teacher's loss; the loss on the labels has the rest"
    )
    temperature: float = Field(1.0, gt=0, le=1e6, description="temperature of soft targets")
    unlabelled_ratio: int = Field(
        0,
        ge=0,
        le=1024,
        description="unlabelled images per labelled image in a step, taken from the unlabelled subset; only the teacher gives"
        " them targets",
    )
    cache: Path | None = Field(
        None,
        description="folder that keeps the teacher's predictions by view, so that a second run need not compute them",
        json_schema_extra=FREE,
    )
    cache_gb: float = Field(
        50.0, gt=0, le=10**9, description="largest size of teacher.cache in GB (10^9 bytes)", json_schema_extra=FREE
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.export is None) == (self.timm is None):
            raise ValueError("give exactly one of teacher.export and teacher.timm")
        if (self.timm is None) != (self.weights is None):
            raise ValueError("teacher.timm and teacher.weights belong together: give the path of the weights file")
        if self.timm is None and (self.mean or self.std or self.image_size):
            raise ValueError(
                "teacher.mean, teacher.std and teacher.image_size are for teacher.timm; an export states its own, so leave"
                " them out"
            )
        return self


class GuessConfig(Strict):
    """Labels that a simple learner guesses for the unlabelled images from their pixels, once, before the training."""

    learner: Literal["best", "spreading", "neighbour", "logistic", "svm"] = Field(
        "best",
        description="label spreading, 1-nearest neighbour, logistic regression or RBF-SVM of scikit-learn; best = label"
        " spreading, unless another is better on the validation images by a standard error",
    )
    ratio: PositiveInt = Field(3, le=1024, description="unlabelled images per labelled image in a step")
    weight: float = Field(
        0.5, ge=0, le=1, description="share of the loss on guessed labels; the loss on the labels has the rest"
    )


def teacher_size(teacher: TeacherConfig, student: FamilyConfig) -> tuple[int, int]:
    """Return the size of the images that a timm teacher sees: as given, or timm's, or else the student's.

    timm, and with it torch, is imported here: only a run or a plan asks.
    """
    from pipeline.exports.timm_teacher import timm_input

    known = None if teacher.image_size or not teacher.timm else timm_input(teacher.timm)
    return teacher.image_size or (known.image_size if known else student.image_size)
