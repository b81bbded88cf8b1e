"""The part of a config that all stages share (torch-free, so that a typing error is refused at once)."""

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, PositiveInt, model_validator

from pipeline.config import FREE, Strict
from pipeline.exports.card import Preprocessing
from pipeline.streaming.config import LoaderConfig
from pipeline.train.config import EngineConfig, LoopConfig, OptimConfig, RunConfig


class DataConfig(Strict):
    """Which images a stage reads. `split` divides `train` into labelled, unlabelled and validation subsets."""

    train: Path = Field(description="folder of shards with a manifest", json_schema_extra=FREE)
    split: Path | None = Field(
        None,
        description="split file that says which samples of data.train are labelled, unlabelled and for validation;"
        " null = all are labelled",
        json_schema_extra=FREE,
    )
    test: Path | None = Field(
        None,
        description="folder with a manifest; evaluated once, after the last step; null = none",
        json_schema_extra=FREE,
    )
    mean: tuple[float, float, float] = Field(
        (0.485, 0.456, 0.406), description="mean of red, green and blue that is subtracted from pixels in [0, 1]"
    )
    std: tuple[float, float, float] = Field(
        (0.229, 0.224, 0.225), description="standard deviation of red, green and blue that pixels are divided by"
    )
    loader: LoaderConfig = Field(LoaderConfig(), description="order and speed of reading")
    eval_batch: PositiveInt = Field(
        256, description="samples per process in one batch of an evaluation", json_schema_extra=FREE
    )

    @property
    def preprocessing(self) -> Preprocessing:
        """The normalisation, as an export's card states it."""
        return Preprocessing(mean=self.mean, std=self.std)


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
        if self.loop.global_batch % self.data.loader.virtual_readers:
            raise ValueError(
                f"loop.global_batch {self.loop.global_batch} must be a multiple of"
                f" data.loader.virtual_readers {self.data.loader.virtual_readers}"
            )
        rest = self.loop.steps - self.optim.cooldown_steps
        if self.optim.warmup_steps >= rest:
            less = " minus optim.cooldown_steps" if self.optim.cooldown_steps else ""
            raise ValueError(f"optim.warmup_steps {self.optim.warmup_steps} must be below loop.steps {rest}{less}")
        return self

    def refuse_lone_images(self, mixing: str, ratio: int) -> None:
        """Refuse a batch in which an image would be mixed with itself.

        Partners are found among the images that one virtual reader adds to a micro-batch.

        Args:
            mixing: Names the mixing in the error message.
            ratio: Images of the mixed stream for each image of `loop.global_batch`; 0 = nothing is mixed.

        Raises:
            ValueError: A virtual reader adds one image only.
        """
        images, readers = ratio * self.loop.global_batch, self.data.loader.virtual_readers
        if 0 < images < 2 * readers:
            times = f"{ratio} x " if ratio > 1 else ""
            raise ValueError(
                f"{mixing} needs two images of each virtual reader: {times}loop.global_batch {self.loop.global_batch} must"
                f" be at least twice data.loader.virtual_readers {readers}; lower data.loader.virtual_readers"
            )
        if ratio == 1 and self.engine.micro_batch == 1:
            raise ValueError(f"{mixing} needs two images at once, but engine.micro_batch is 1; set it to 2 or more")

    def claimed_labels(self) -> bool:
        """Whether the result may only have seen the labels of `data.split`."""
        return True
