"""How a stage's models are judged: on its validation part while it trains, on its test set once, by one table of answers."""

from collections.abc import Iterator, Mapping

import numpy as np
from torch import nn

from pipeline.datasets.imbalance import class_groups
from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.datasets.splits import Split
from pipeline.evaluate import metrics
from pipeline.evaluate.open_set import with_outside
from pipeline.evaluate.predictions import Predictions, predict
from pipeline.streaming.loader import Batch, evaluation_batches
from pipeline.streaming.transforms import eval_views
from pipeline.train.distributed import World
from pipeline.train.run import Run
from stages.configs.base import DataConfig
from stages.spec import Subsets


class Evaluator:
    """Of the models of one stage, on `image_size` (H, W) views. Its answers are those of the export (fp32)."""

    def __init__(
        self, config: DataConfig, manifest: Manifest, split: Split | None, subsets: Subsets, world: World, run: Run
    ) -> None:
        self.config, self.manifest, self.split, self.subsets = config, manifest, split, subsets
        self.world, self.run = world, run
        self.confidence: dict[str, np.ndarray] = {}  # of each model in the last validation

    def evaluation(
        self, manifest: Manifest, sample_indices: np.ndarray, image_size: tuple[int, int]
    ) -> Iterator[Batch]:
        """Every sample once over the ranks, as many batches on each."""
        views = eval_views(image_size, mean=self.config.mean, std=self.config.std)
        return evaluation_batches(
            manifest,
            sample_indices,
            batch_size=self.config.eval_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            views=views,
            workers=self.config.loader.workers,
            remote=self.config.loader.remote,
        )

    def answers(
        self, model: nn.Module, manifest: Manifest, sample_indices: np.ndarray, image_size: tuple[int, int]
    ) -> Predictions:
        """Of a classifier to samples of a manifest (collective), in fp32: what an export will say."""
        return predict(model, self.evaluation(manifest, sample_indices, image_size), self.world.device)

    def groups(self) -> dict[str, np.ndarray]:
        """Head, medium and tail by the images that follow the split's tail; classes that it leaves out stand apart.

        Unlabelled images count too, by their hidden labels: a tenth of the labels alone is full of ties. No loss sees them.
        """
        num_classes = len(self.manifest.classes)
        if self.split is None:
            return class_groups(self.class_counts())
        header, counts = self.split.header, self.split.counts("labelled")
        if header["config"]["scope"] == "both":
            counts = counts + self.split.counts("unlabelled")
        seen = np.setdiff1d(np.arange(num_classes), header["ood_classes"])
        return with_outside(class_groups(counts[seen], ranks=np.array(header["class_ranks"])[seen]), seen, num_classes)

    def class_counts(self) -> np.ndarray:
        """(C,) labelled images of each class."""
        return np.bincount(self.manifest.labels[self.subsets.labelled], minlength=len(self.manifest.classes))

    def validate(self, models: Mapping[str, nn.Module], image_size: tuple[int, int]) -> dict[str, float]:
        """val/top1, val/tail, ... of each model on the validation part; names other than `student` are prefixed."""
        row = {}
        if len(self.subsets.validation):
            for name, model in models.items():
                answers = self.answers(model, self.manifest, self.subsets.validation, image_size)
                prefix = "" if name == "student" else f"{name}_"
                self.confidence[f"{prefix}confidence"] = answers.confidence
                found = metrics.summary(answers, len(self.manifest.classes), self.groups())
                row.update({f"val/{prefix}{k}": v for k, v in found.items()})
        return row

    def test(self, models: Mapping[str, nn.Module], image_size: tuple[int, int]) -> dict[str, float]:
        """Evaluator once on the test set, or on the validation part if there is none; writes evaluation.json and every answer.

        Returns the test set's top1 of each model, for the card.
        """
        if self.config.test is not None:
            test, evaluated_on = read_manifest(self.config.test), "test images"
            sample_indices = np.arange(test.num_samples)
        else:
            test, evaluated_on, sample_indices = (
                self.manifest,
                "validation images (there is no test set)",
                self.subsets.validation,
            )
        if not len(sample_indices):
            return {}
        results = {}
        for name, model in models.items():
            answers = self.answers(model, test, sample_indices, image_size)
            results[name] = metrics.report(answers, self.groups(), test.classes)
            if self.world.is_main:
                answers.save(self.run.folder / f"predictions-{name}.npz")
        protocol = {
            "dataset": test.hash,
            "evaluated_on": evaluated_on,
            "split": self.split.hash if self.split else None,
            "protocol": self.split.protocol if self.split else "all labelled",
        }
        counts = dict(zip(self.manifest.classes, self.class_counts().tolist(), strict=True))
        self.run.write_json("evaluation.json", {**protocol, "labelled_per_class": counts, "models": results})
        if self.config.test is None:
            return {}
        return {f"test/{name}_top1": result["top1"] for name, result in results.items()}
