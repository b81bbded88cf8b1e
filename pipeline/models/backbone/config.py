"""Which part of a model trains, as values (torch-free)."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.config import Strict
from pipeline.identity import FREE

Target = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$", max_length=100)]
# Passes of the backbone that a training step computes, in forward passes: a backward pass costs one for the gradients of the
# activations and one for those of the weights.
PASSES = {"whole": 3, "lora": 2, "frozen": 1}


class LoRAConfig(Strict):
    """Low-rank updates (Hu et al. 2022): a linear layer computes W x + alpha / rank x B A x, and only A and B train."""

    rank: int = Field(8, gt=0, le=4096, description="rank of each update: rows of A, columns of B")
    alpha: float = Field(16.0, gt=0, le=1e6, description="strength of the updates: they are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of each update's input that is dropped in training")
    targets: tuple[Target, ...] | None = Field(
        None,
        description="linear layers to update, by the end of their names, for example [qkv]; null = every linear layer of the"
        " backbone",
    )


class BackboneConfig(Strict):
    """What trains: the whole model, low-rank updates and the classifier, or the classifier alone.

    Weights that are new, because neither the file nor the parent has them, always train.
    """

    train: Literal["whole", "lora", "frozen"] = Field(
        "whole",
        description="whole: all weights; lora: low-rank updates of the linear layers, and the classifier; frozen: the classifier"
        " alone. What does not train has no optimizer state, no gradient, and is in no checkpoint",
    )
    lora: LoRAConfig | None = Field(None, description="the low-rank updates of train=lora; null = its defaults")
    cached_views: int = Field(
        0,
        ge=0,
        le=1024,
        description="for train=frozen: compute the features of this many fixed augmented views of each training image once,"
        " before the first step, and train the classifier on them in turn, one view per epoch; 0 = a new view each time",
    )
    cache: Path | None = Field(
        None,
        description="folder that keeps the cached features for further runs; null = they live in memory only",
        json_schema_extra=FREE,
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_lora(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("train") == "lora" and values.get("lora") is None:
            return {**values, "lora": {}}
        return values

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.lora and self.train != "lora":
            raise ValueError(f"backbone.lora is for train=lora, not {self.train}; set backbone.train=lora or lora=null")
        if self.cached_views and self.train != "frozen":
            raise ValueError(
                f"backbone.cached_views needs features that do not change, but backbone.train is {self.train}; set"
                " backbone.train=frozen or cached_views=0"
            )
        if self.cache and not self.cached_views:
            raise ValueError("backbone.cache keeps cached features, but cached_views is 0; set it to 1 or more")
        return self

    @property
    def passes(self) -> int:
        """Forward passes' worth of work that a training step has per image."""
        return PASSES[self.train]


WHOLE = BackboneConfig()
