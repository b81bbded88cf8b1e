"""What timm has to know about our models: their names there, their first convolution and their classifiers (torch-free)."""

from pipeline.models import MODELS
from pipeline.models.config import EfficientViMConfig, VisionMambaConfig, VSSDConfig, WideResNetConfig
from pipeline.models.family import FamilyConfig
from pipeline.models.variants import EFFICIENTVIM_VARIANTS

# timm has models of its own under these names, with the same parameters.
IN_TIMM = {name for name in EFFICIENTVIM_VARIANTS if name.removesuffix("_dist")[-2:] in ("m1", "m2", "m3", "m4")}
NAMES = {name: family for name, family in MODELS.items() if name not in IN_TIMM}  # those that we register
FIRST_CONVOLUTION: dict[type[FamilyConfig], str] = {
    VisionMambaConfig: "patch_embed.proj",
    EfficientViMConfig: "patch_embed.conv.0.conv",
    VSSDConfig: "stem.first.0",
    WideResNetConfig: "stem",
}


def classifiers(family: FamilyConfig) -> list[str]:
    """Return the names of the linear layers that give the logits."""
    if not isinstance(family, EfficientViMConfig):
        return ["head"]
    number = {"hidden": len(family.widths) + 1, "map": len(family.widths), "none": 1}[family.fusion]
    return [f"heads{suffix}.{i}" for suffix in (("", "_dist") if family.distilled else ("",)) for i in range(number)]


def registered_name(config: FamilyConfig) -> str:
    """Return a name of this family that we register: the config's own, or another one whose values all get replaced."""
    return config.name if config.name in NAMES else next(n for n, family in NAMES.items() if family is type(config))
