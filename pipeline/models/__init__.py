"""The models by name. Light to import: torch is loaded when a model is built."""

from typing import TYPE_CHECKING, Any

from pipeline.models.config import VISION_MAMBA_VARIANTS, VisionMambaConfig

if TYPE_CHECKING:
    from torch import nn

# name -> the family's config; a family's module turns the config into a model.
MODELS = dict.fromkeys(VISION_MAMBA_VARIANTS, VisionMambaConfig)


def build_model(name: str, **overrides: Any) -> "nn.Module":
    """The model `name`, with any field of its config overridden: build_model("vim_small", image_size=384).

    Runs under `torch.device("meta")` too. Raises ConfigError for an unknown name or field.
    """
    from pipeline.config import choose, validate

    config = validate(choose("model", name, MODELS), {"name": name, **overrides}, f"model {name}")
    return build_from_config(config)


def build_from_config(config: VisionMambaConfig) -> "nn.Module":
    """The model that a validated config describes."""
    from pipeline.models.vision_mamba import VisionMamba

    return VisionMamba(**{name: value for name, value in config if name != "name"})
