"""The models by name; importing this is cheap, since torch is loaded only when a model is built."""

from typing import TYPE_CHECKING, Any

from pipeline.config import validate
from pipeline.errors import ConfigError
from pipeline.models.config import FAMILIES, family_of
from pipeline.models.family import FamilyConfig

if TYPE_CHECKING:
    from torch import nn

# Name -> config of its family. timm's models are not listed; their names begin with `timm/`.
MODELS = {name: family for family in FAMILIES for name in family.variants}


def build_model(name: str, **overrides: Any) -> "nn.Module":
    """Build a model by its name, for example with `"vim_small", image_size=384`.

    It works under `torch.device("meta")` too.

    Args:
        name: A name of `MODELS`, or `timm/NAME`.
        **overrides: Fields of the family's config that differ from the variant's values.

    Returns:
        A freshly initialised model.

    Raises:
        ConfigError: The name or a field is unknown, or a value is not allowed.
    """
    try:
        family = family_of(name)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return build_from_config(validate(family, {"name": name, **overrides}, f"model {name}"))


def build_from_config(config: FamilyConfig, *, trained: bool = False) -> "nn.Module":
    """Build the model that a validated config describes.

    Args:
        config: The model's config.
        trained: Whether it will be trained, which takes more memory than inference.

    Raises:
        ConfigError: It does not fit in this machine's memory.
    """
    from pipeline.models.memory import build_within_memory
    from pipeline.models.registry import MODEL_CLASSES

    family = MODEL_CLASSES[type(config)]
    return build_within_memory(lambda: family(**config.arguments()), f"model {config.name}", trained=trained)
