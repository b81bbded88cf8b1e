"""What a config file may say about data. Imports nothing heavy: a misspelt key is refused before torch is loaded."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Strict
from pipeline.storage.config import RemoteConfig

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]


class AugmentConfig(Strict):
    """Train-time augmentation of one view, in the order of the fields."""

    crop_scale: tuple[float, float] = (0.08, 1.0)  # area of the random crop, as a fraction of the image's
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    horizontal_flip: Fraction = 0.5  # probability
    color_jitter: Annotated[float, Field(ge=0.0)] = 0.0  # brightness, contrast, saturation by a factor in 1 ± this
    rand_augment: str = ""  # timm's notation, for example "rand-m9-mstd0.5-inc1"; empty for none
    erase: Fraction = 0.0  # probability of one erased rectangle
    erase_fill: Literal["mean", "noise"] = "noise"

    @model_validator(mode="after")
    def _ranges_rise(self) -> "AugmentConfig":
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale = {self.crop_scale}: give 0 < smallest <= largest <= 1")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio = {self.crop_ratio}: give 0 < smallest <= largest")
        if self.rand_augment and not self.rand_augment.startswith("rand"):
            raise ValueError(f"rand_augment = {self.rand_augment!r}: timm's notation begins with rand, as in rand-m9")
        return self


# Semi-ViT's two views of an unlabelled image (its released settings).
WEAK = AugmentConfig(color_jitter=0.4)
STRONG = AugmentConfig(rand_augment="rand-m9-mstd0.5-inc1", erase=0.25)


class LoaderConfig(Strict):
    """How an epoch is ordered, and by how many hands it is read."""

    virtual_readers: Positive | None = Field(
        None,
        description="equal, independent shares into which the order of the samples is cut, each owned by one process; "
        "null = derived so that every number of processes fits that divides loop.global_batch. A number given must divide "
        "loop.global_batch and be a multiple of the number of processes",
    )
    window: Positive = 32_768  # reach of the shuffle, in samples over all virtual_readers
    workers: Annotated[int, Field(ge=0)] = 2  # processes per rank; 0 reads and decodes in the training process
    prefetch: Positive = 2  # batches ahead, per worker
    sampling: Literal["uniform", "class_balanced", "repeat_factor"] = "uniform"
    repeat_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.001  # repeat_factor: classes rarer than this repeat
    max_unreadable: Fraction = 0.001  # of the samples, before the run stops; those below it are replaced and named
    remote: RemoteConfig = RemoteConfig()


def derive_virtual_readers(global_batch: int, samples: int, *, mixed: bool = False) -> int:
    """Choose into how many virtual readers the order of a run is cut.

    The result is the largest divisor of `global_batch` that leaves every virtual reader at least one sample of the stream
    and, with `mixed`, at least two images of each batch, since partners are found inside a virtual reader. Usually it is
    `global_batch` itself, or half of it with `mixed`.

    A process owns whole virtual readers, so every number of processes that divides the result serves the same global
    batches. The rule knows the batch and the data but not the number of processes. So a run that is resumed with more
    or fewer processes has the same virtual readers, and with them the same order and the same mixed pairs.

    Args:
        global_batch: Samples per optimizer step over all processes.
        samples: Samples of the smallest stream of the run.
        mixed: Whether a stream with `global_batch` images per step mixes them in pairs.

    Returns:
        The number of virtual readers, at least 1.
    """
    most = min(samples, global_batch // 2 if mixed else global_batch)
    return max((d for d in range(1, most + 1) if global_batch % d == 0), default=1)
