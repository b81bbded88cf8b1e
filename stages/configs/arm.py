"""Stage 1, arm: the config and the spec of autoregressive pretraining (torch-free)."""

from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from pipeline.evaluate.config import LinearProbeConfig
from pipeline.models.config import DecoderConfig, VisionMambaConfig, check_clusters, check_taps
from pipeline.models.family import FamilyConfig
from pipeline.models.variants import PRETRAINING_FORM
from pipeline.streaming.config import AugmentConfig
from stages.configs.base import StageConfig
from stages.spec import Network, ParentModel, StageSpec, Stream, Subsets, Workload


class ArmConfig(StageConfig):
    """Stage 1: autoregressive pretraining on all training images. Only the linear probe and k-NN read labels."""

    stage: ClassVar[str] = "arm"

    model: VisionMambaConfig = Field(description="the backbone; pretraining decides the form of its head and scan")
    decoder: DecoderConfig = Field(DecoderConfig(), description="the decoder, which pretraining alone uses")
    augment: AugmentConfig = Field(AugmentConfig(crop_scale=(0.2, 1.0)), description="augmentation of training images")
    linear_probe: LinearProbeConfig | None = Field(
        LinearProbeConfig(),
        description="linear probe and k-NN on the features; needs data.split with labelled and validation subsets;"
        " null = none",
    )

    select_by: Literal["loss", "linear"] = Field(
        "loss",
        description="what loop.select=best and loop.patience compare: val/loss, or the accuracy of the linear probe (val/linear),"
        " which tells when more pretraining stops paying; it reads labels, so they count as seen",
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
                    f"model.{name} = {model[name]!r}, but pretraining needs {decided!r}; remove model.{name} from this config"
                )
        return {**values, "model": {"order": "cluster", **model, **PRETRAINING_FORM}}

    @model_validator(mode="after")
    def _clusters(self) -> Self:
        check_clusters(self.model)
        check_taps(self.decoder, self.model)
        return self

    @model_validator(mode="after")
    def _cadence(self) -> Self:
        every = self.linear_probe.every if self.linear_probe else None
        if every and every % (self.loop.eval_every or self.loop.steps):
            raise ValueError(
                f"linear_probe.every {every} must be a multiple of loop.eval_every {self.loop.eval_every}:"
                " it is part of an evaluation"
            )
        if self.select_by == "linear" and (self.linear_probe is None or every not in (None, self.loop.eval_every)):
            raise ValueError(
                "select_by=linear compares the linear probe of every validation; give linear_probe without every"
            )
        return self


class ArmSpec(StageSpec[ArmConfig]):
    """Stage 1 trains a backbone and its decoder on one stream of unlabelled images."""

    config = ArmConfig
    module = "stages.arm"
    produces = "pretrainer"

    def streams(self, config: ArmConfig, subsets: Subsets) -> dict[str, Stream]:
        """All training images, labelled or not, without their labels."""
        everything = np.sort(np.concatenate([subsets.labelled, subsets.unlabelled]))
        return {"unlabelled": Stream(everything, config.loop.global_batch, hide_labels=True)}

    def model_config(self, config: ArmConfig, num_classes: int, parent: ParentModel) -> FamilyConfig:
        """The backbone of the config."""
        return config.model

    def minimises(self, config: ArmConfig) -> bool:
        """The loss decides, unless the linear probe does."""
        return config.select_by != "linear"

    def workload(self, config: ArmConfig, num_classes: int, parent: ParentModel) -> Workload:
        """The backbone with its decoder."""
        return Workload((Network("student", "trained", config.model, config.decoder, trained_images=1),))
