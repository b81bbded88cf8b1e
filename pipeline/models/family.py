"""What every family of models has in its config (torch-free)."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config import Strict, nearest
from pipeline.identity import FROM_DATA

Depth = Annotated[int, Field(gt=0, le=512)]  # blocks; published models have a tenth
Width = Annotated[int, Field(gt=0, le=2**15)]  # channels, states, pixels on a side
Ratio = Annotated[float, Field(gt=0, le=64)]


class FamilyConfig(Strict):
    """Fields that every family has. A field left out takes the value of the variant `name`, then its default.

    Attributes:
        variants: Values of the family's named models.
        free: Fields that may differ between a classifier's export and a model that starts from it, which is fitted.
    """

    variants: ClassVar[dict[str, dict[str, Any]]] = {}
    free: ClassVar[tuple[str, ...]] = ("name", "image_size", "drop_path", "num_classes")

    name: str = Field(description="name of a variant, or timm/NAME for a model of timm; it also chooses the family")
    image_size: tuple[Width, Width] = Field(
        (224, 224), description="(height, width) of the images in pixels; a single number means square"
    )
    in_chans: Literal[3] = Field(3, description="channels of the images: red, green, blue; greyscale is converted")
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="probability of dropping a residual branch in training; reached in the last block"
    )
    num_classes: int = Field(
        1000, ge=0, le=10**6, description="classes of the head; 0 means no head", json_schema_extra=FROM_DATA
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_variant(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        name = values.get("name")
        if name is not None and not cls.knows(str(name)):
            elsewhere = any(family.knows(str(name)) for family in FamilyConfig.__subclasses__())
            raise ValueError(
                f"model name {name!r} {'belongs to a family that this stage does not take' if elsewhere else 'is unknown'};"
                f" known: {', '.join(nearest(str(name), list(cls.variants)))}"
            )
        values = {**cls.variants.get(str(name), {}), **values}
        if isinstance(values.get("image_size"), int):
            values["image_size"] = (values["image_size"], values["image_size"])
        return values

    @classmethod
    def knows(cls, name: str) -> bool:
        """Whether `name` is a model of this family."""
        return name in cls.variants

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the class that builds this family's models."""
        return {field: value for field, value in self if field != "name"}
