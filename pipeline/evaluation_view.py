"""How an image becomes the view that an evaluation shows a model, as values (torch-free)."""

from typing import Literal

from pydantic import Field

from pipeline.config import Strict


class EvaluationView(Strict):
    """The resize before the centre crop. The defaults are those of most recipes: 256 for a view of 224 pixels."""

    resize: Literal["shorter", "squash"] = Field(
        "shorter",
        description="shorter: the shorter side becomes the view's side / crop, and the shape stays; squash: both sides do (ARM)",
    )
    crop: float = Field(
        0.875,
        ge=0.1,
        le=1,
        description="share of the resized image's side that the centre crop keeps (ARM and Semi-ViT: 1 above 224 px)",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bicubic", description="how pixels are interpolated when the image is resized"
    )

    @property
    def words(self) -> str:
        """The view in a few words, for people."""
        side = "the shorter side" if self.resize == "shorter" else "both sides"
        return f"resize {side} to the view's / {self.crop:g} ({self.interpolation}), centre crop"


USUAL = EvaluationView()
