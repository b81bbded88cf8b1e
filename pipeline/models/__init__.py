"""The models by name. Light to import: torch is loaded when a model is built."""

from typing import TYPE_CHECKING, Any

from pipeline.models.config import (
    FAMILIES,
    EfficientViMConfig,
    FamilyConfig,
    TimmConfig,
    VisionMambaConfig,
    VSSDConfig,
    family_of,
)

if TYPE_CHECKING:
    from torch import nn

# name -> the family's config; a family's module turns the config into a model. timm's names begin with `timm/`.
MODELS = {name: family for family in FAMILIES for name in family.variants}


def build_model(name: str, **overrides: Any) -> "nn.Module":
    """The model `name`, with any field of its config overridden: build_model("vim_small", image_size=384).

    Runs under `torch.device("meta")` too. Raises ConfigError for an unknown name or field.
    """
    from pipeline.config import validate
    from pipeline.errors import ConfigError

    try:
        family = family_of(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return build_from_config(validate(family, {"name": name, **overrides}, f"model {name}"))


def build_from_config(config: FamilyConfig) -> "nn.Module":
    """The model that a validated config describes."""
    values = {field: value for field, value in config if field != "name"}
    match config:
        case VisionMambaConfig():
            from pipeline.models.vision_mamba import VisionMamba

            return VisionMamba(**values)
        case EfficientViMConfig():
            from pipeline.models.efficientvim.model import EfficientViM

            return EfficientViM(**values)
        case VSSDConfig():
            from pipeline.models.vssd import VSSD

            return VSSD(**values)
        case TimmConfig():
            from pipeline.models.timm_model import TimmModel

            return TimmModel(name=config.name, **values)
    raise TypeError(f"no model is built from {type(config).__name__}")
