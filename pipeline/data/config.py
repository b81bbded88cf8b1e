"""What a config file may say about data. Imports nothing heavy: a misspelt key is refused before torch is loaded."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config import Strict

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


class RemoteConfig(Strict):
    """How shards behind http(s) or s3 are fetched; without effect on local ones."""

    cache: str = ""  # folder on a local disk, shared by the processes of a node
    cache_gb: Annotated[float, Field(gt=0.0)] = 50.0  # 10^9 bytes
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 30.0  # without a byte
    attempts: Positive = 8  # in a row that bring no byte
    backoff_seconds: Annotated[float, Field(ge=0.0)] = 0.5  # before the second attempt; doubles up to 30 s


class LoaderConfig(Strict):
    """How an epoch is ordered, and by how many hands it is read."""

    lanes: Positive = 8  # virtual readers: divides the global batch, a multiple of the world size
    window: Positive = 32_768  # reach of the shuffle, in samples over all lanes
    workers: Annotated[int, Field(ge=0)] = 2  # processes per rank; 0 reads and decodes in the training process
    prefetch: Positive = 2  # batches ahead, per worker
    sampling: Literal["uniform", "class_balanced", "repeat_factor"] = "uniform"
    repeat_threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.001  # repeat_factor: classes rarer than this repeat
    max_unreadable: Fraction = 0.001  # of the samples, before the run stops; those below it are replaced and named
    remote: RemoteConfig = RemoteConfig()


class SplitConfig(Strict):
    """Which samples are labelled, unlabelled and held out; semi-supervised papers leave most of this unsaid.

    Validation is taken first, then the imbalance, then the label fraction. Validation is for thresholds and the
    choice of models; a test set is a dataset of its own.
    """

    imbalance: Annotated[float, Field(ge=1.0)] = 1.0  # head class / tail class; 1 keeps every sample
    profile: Literal["exponential", "supplement"] = "exponential"  # the paper's formula, or its wording (10, 100, 1000)
    relative_to: Literal["largest", "own"] = "largest"  # what n_max is: the largest class, or each class's own size
    class_order: Literal["index", "frequency", "random"] = "index"  # head to tail
    scope: Literal["both", "labelled"] = "both"  # labelled: whatever is not labelled stays, as unlabelled
    ood_classes: Annotated[int, Field(ge=0)] = 0  # the last of the order, never labelled and not in validation
    ood_scope: Literal["all", "labelled"] = "all"  # all: not among the unlabelled either
    labelled: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # fraction of each class that keeps its label
    min_labelled_per_class: Annotated[int, Field(ge=0)] = 1
    rounding: Literal["random", "nearest"] = "random"  # of counts; random keeps their mean, seeded per class
    validation_per_class: Annotated[int, Field(ge=0)] = 0  # balanced
    labelled_list: str = ""  # file naming exactly the labelled samples, as ImageNet's published 1 % and 10 %
    pool_list: str = ""  # file naming all that may be trained on, as ImageNet-LT's

    @model_validator(mode="after")
    def _lists_stand_alone(self) -> "SplitConfig":
        if self.labelled_list and (self.imbalance > 1 or self.labelled < 1 or self.ood_classes):
            raise ValueError("labelled_list alone says which samples are labelled; leave out imbalance, labelled, ood")
        if self.profile == "supplement" and self.imbalance not in (1, 10, 100, 1000):
            raise ValueError(f"profile = supplement describes imbalance 10, 100 and 1000, not {self.imbalance:g}")
        return self
