"""The part of a config that all stages share (torch-free, so that a typing error is refused at once)."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipeline.config import Strict
from pipeline.datasets.config import Opening
from pipeline.decoding import MAX_PIXELS, PILLOW_PIXELS, WHITE, Decoding
from pipeline.evaluation_view import USUAL, EvaluationView
from pipeline.exports.card import IMAGENET, Channels, Level, Preprocessing, Spreads
from pipeline.identity import FREE
from pipeline.streaming.config import LoaderConfig, derive_virtual_readers
from pipeline.train.config import EngineConfig, LoopConfig, OptimConfig, RunConfig


class DataConfig(Strict):
    """Which images a stage reads. `split` divides `train` into labelled, unlabelled and validation subsets."""

    train: Path | tuple[Path, ...] = Field(
        description="folder of shards with a manifest, or a list of such folders that are read as one dataset in this"
        " order; their classes are united by name",
        json_schema_extra=FREE,
    )
    split: Path | None = Field(
        None,
        description="split file that says which samples of data.train are labelled, unlabelled and for validation;"
        " null = samples with a label are labelled, the others are unlabelled",
        json_schema_extra=FREE,
    )
    validation: Path | None = Field(
        None,
        description="folder with a manifest whose labelled samples are the validation set, in place of a validation"
        " subset of data.split; its classes must be among those of data.train; null = none",
        json_schema_extra=FREE,
    )
    test: Path | None = Field(
        None,
        description="folder with a manifest; evaluated once, after the last step; null = none",
        json_schema_extra=FREE,
    )
    classes: Path | None = Field(
        None,
        description="file of class names, one a line in the order of the labels, or the folder of a dataset: the classes of"
        " those folders of images above that have no shards, some of which may then have no images; null = their class folders",
        json_schema_extra=FREE,
    )
    mean: Channels = Field(
        IMAGENET.mean, description="mean of red, green and blue that is subtracted from pixels in [0, 1]"
    )
    std: Spreads = Field(
        IMAGENET.std, description="standard deviation of red, green and blue that pixels are divided by"
    )
    ground: tuple[Level, Level, Level] = Field(
        WHITE,
        description="red, green and blue, 0 to 255, that transparent pixels are composed on; the default is white",
    )
    view: EvaluationView = Field(
        USUAL, description="how evaluations, not training, resize and crop an image; the export's card carries it"
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        le=PILLOW_PIXELS,
        description="most pixels of an image, width times height. A larger JPEG is decoded at a reduced scale; a larger image"
        " of another format is left out of training and counted, and is an error in an evaluation",
    )
    loader: LoaderConfig = Field(LoaderConfig(), description="order and speed of reading")
    eval_batch: int = Field(
        256, gt=0, le=2**20, description="samples per process in one batch of an evaluation", json_schema_extra=FREE
    )

    @field_validator("train", mode="after")
    @classmethod
    def _some_folders(cls, train: Path | tuple[Path, ...]) -> Path | tuple[Path, ...]:
        if not isinstance(train, tuple):
            return train
        if not train:
            raise ValueError("the list is empty; name at least one folder of shards with a manifest")
        if len(set(train)) < len(train):
            raise ValueError("a folder is listed twice, but its images would count twice; name each folder once")
        return train[0] if len(train) == 1 else train

    @property
    def train_folders(self) -> tuple[Path, ...]:
        """The folders of `train`."""
        return self.train if isinstance(self.train, tuple) else (self.train,)

    @property
    def train_names(self) -> str:
        """The folders of `train`, for people."""
        return ", ".join(map(str, self.train_folders))

    @property
    def preprocessing(self) -> Preprocessing:
        """The normalisation and the evaluation's view, as an export's card states them."""
        return Preprocessing(mean=self.mean, std=self.std, ground=self.ground, view=self.view)

    @property
    def opening(self) -> Opening:
        """How folders of images without shards are opened."""
        return Opening(self.classes, self.max_pixels)

    @property
    def decoding(self) -> Decoding:
        """How images are decoded."""
        return Decoding(ground=self.ground, max_pixels=self.max_pixels)


class ClassWeightsConfig(Strict):
    """Weights of the classes in the loss on labels. They sum to the number of classes that have labels."""

    kind: Literal["inverse", "effective"] = Field(
        "effective", description="one over the number of labels, or over their effective number (Cui et al. 2019)"
    )
    beta: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="kind=effective: the effective number of n labels is (1 - beta^n) / (1 - beta); the paper tries 0.9 to"
        " 0.9999",
    )


def refuse_two_corrections(given: Mapping[str, Any]) -> None:
    """Refuse more than one correction of the imbalance among the labels.

    Args:
        given: Key of the config -> its value, false if it is off.

    Raises:
        ValueError: Two are on.
    """
    on = [key for key, value in given.items() if value]
    if len(on) > 1:
        raise ValueError(f"{on[0]} and {on[1]} correct the same imbalance twice; choose one")


class StageConfig(Strict):
    """The config of a stage: base of `ArmConfig`, `DistillConfig` and `SemiConfig`."""

    stage: ClassVar[str]

    run: RunConfig = Field(description="where the run lives, and its seed")
    data: DataConfig = Field(description="which images it reads")
    optim: OptimConfig = Field(description="the optimizer and its schedule")
    engine: EngineConfig = Field(EngineConfig(), description="how the work is distributed over processes and memory")
    loop: LoopConfig = Field(description="how long it trains, and what happens how often")

    @property
    def folder(self) -> Path:
        """The run's folder: ROOT/EXPERIMENT/STAGE."""
        return self.run.folder(self.stage)

    @model_validator(mode="after")
    def _batches(self) -> Self:
        given = self.data.loader.virtual_readers
        if given and self.loop.global_batch % given:
            raise ValueError(
                f"loop.global_batch {self.loop.global_batch} must be a multiple of data.loader.virtual_readers {given};"
                " leave virtual_readers out and it fits"
            )
        rest = self.loop.steps - self.optim.cooldown_steps
        if self.optim.warmup_steps >= rest:
            less = " minus optim.cooldown_steps" if self.optim.cooldown_steps else ""
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} must be below loop.steps {rest}{less}")
        return self

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        """Refuse a lone image: it would be mixed with itself, since partners are found inside a virtual reader."""
        batch, given = self.loop.global_batch, self.data.loader.virtual_readers
        for what, ratio in self.mixing().items():
            times = f"{ratio} x " if ratio > 1 else ""
            if given and ratio * batch < 2 * given:
                raise ValueError(
                    f"{what} needs two images in each virtual reader: {times}loop.global_batch {batch} must be at least"
                    f" twice data.loader.virtual_readers {given}; leave virtual_readers out"
                )
            if ratio == 1 and 1 in (batch, self.engine.micro_batch):
                key = "loop.global_batch" if batch == 1 else "engine.micro_batch"
                raise ValueError(f"{what} needs two images at once, but {key} is 1; set it to 2 or more")
        return self

    def mixing(self) -> dict[str, int]:
        """Map what is mixed in pairs to the number of images of that stream per image of `loop.global_batch`."""
        return {}

    def virtual_readers(self, samples: Iterable[int]) -> int:
        """Return the number of virtual readers: as given, or derived.

        Args:
            samples: The number of samples of each stream.
        """
        mixed = 1 in self.mixing().values()
        return self.data.loader.virtual_readers or derive_virtual_readers(
            self.loop.global_batch, min(samples), mixed=mixed
        )

    def claimed_labels(self) -> bool:
        """Whether the result may only have seen the labels of `data.split`."""
        return True
