"""The evaluation of a stage's models: on the validation subset during training, on the test set once at the end."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor, nn

from pipeline.datasets.imbalance import class_groups
from pipeline.datasets.manifest import Manifest
from pipeline.evaluate import metrics
from pipeline.evaluate.calibration import Calibration, calibrate
from pipeline.evaluate.open_set import with_outside
from pipeline.evaluate.predictions import Predictions, collect_logits, predict, predict_at
from pipeline.exports.selected import Selected
from pipeline.streaming.loader import Batch, evaluation_batches
from pipeline.streaming.transforms import eval_views
from pipeline.train.distributed import World
from pipeline.train.run import Run
from stages.check import open_labelled
from stages.configs.base import DataConfig
from stages.spec import StageData, in_words

logger = logging.getLogger(__name__)

MOST_FOR_CALIBRATION = 20_000  # validation images that the one number of a temperature is fitted on
ENOUGH_ALONE = 1000  # validation images beside which what the run started from counts for less than a hundredth


class Evaluator:
    """Evaluates the models of one stage in fp32, as its export will compute.

    Args:
        config: How images are read.
        data: The images.
        world: The processes that share the work.
        run: Receives evaluation.json and the predictions.

    Attributes:
        features: Maps images to a frozen backbone's features, which the models then get in place of images. They are
            computed once for each dataset.
        confidence: The confidences of the last validation, by the name of the model.
        calibrations: The temperature of each model that `calibrate` has seen, by name.
        selected: Which state of the run is evaluated; the driver sets it after the last step.
    """

    def __init__(self, config: DataConfig, data: StageData, world: World, run: Run) -> None:
        self.config, self.data = config, data
        self.manifest, self.split, self.subsets = data.manifest, data.split, data.subsets
        self.world, self.run = world, run
        self.confidence: dict[str, np.ndarray] = {}  # by model, in the last validation
        self.calibrations: dict[str, Calibration] = {}
        self.selected: Selected | None = None
        self.features: Callable[[Tensor], Tensor] | None = None
        self._kept: dict[tuple[str, bytes], list[Batch]] = {}
        self._start: np.ndarray | None = None

    def evaluation(
        self, manifest: Manifest, sample_indices: np.ndarray, image_size: tuple[int, int]
    ) -> Iterator[Batch]:
        """Iterate over samples of a manifest: each once over all ranks, and as many batches on every rank.

        Args:
            manifest: The dataset.
            sample_indices: The samples.
            image_size: (height, width) in pixels.
        """
        if self.features is not None:
            key = manifest.hash, np.asarray(sample_indices).tobytes()
            if key not in self._kept:
                batches = self._images(manifest, sample_indices, image_size)
                self._kept[key] = [replace(batch, images=self.features(batch.images).cpu()) for batch in batches]
            return iter(self._kept[key])
        return self._images(manifest, sample_indices, image_size)

    def _images(self, manifest: Manifest, sample_indices: np.ndarray, image_size: tuple[int, int]) -> Iterator[Batch]:
        views = eval_views(
            image_size, mean=self.config.mean, std=self.config.std, view=self.config.view, decoding=self.config.decoding
        )
        return evaluation_batches(
            manifest,
            sample_indices,
            batch_size=self.config.eval_batch,
            rank=self.world.rank,
            world_size=self.world.size,
            views=views,
            workers=self.config.loader.workers,
            remote=self.config.loader.remote,
            device=self.world.device,
        )

    def predictions(
        self, model: nn.Module, manifest: Manifest, sample_indices: np.ndarray, image_size: tuple[int, int]
    ) -> Predictions:
        """Let a classifier predict samples of a manifest in fp32 (collective). The arguments are those of `evaluation`."""
        return predict(model, self.evaluation(manifest, sample_indices, image_size), self.world.device)

    def groups(self, *, hidden: bool = True) -> dict[str, np.ndarray]:
        """Group the classes into head, medium and tail by their number of images; classes outside the split are apart.

        Where all classes have as many images there are no such groups.

        Unlabelled images count too, by their hidden labels, because a tenth of the labels alone has many ties. No loss sees
        these labels. An image without a label does not count.

        Args:
            hidden: Whether hidden labels count. They stay in the run's folder: an export carries only what its own labels
                say.
        """
        num_classes = len(self.manifest.classes)
        if self.split is None:
            return grouped(self.class_counts(), None)
        header, counts = self.split.header, self.split.counts("labelled")
        if hidden and header["config"]["scope"] == "both":
            counts = counts + self.split.counts("unlabelled")
        seen = np.setdiff1d(np.arange(num_classes), header["ood_classes"])
        # An order by frequency knows the hidden labels too.
        ranks = (
            np.array(header["class_ranks"])[seen] if hidden or header["config"]["class_order"] != "frequency" else None
        )
        return with_outside(grouped(counts[seen], ranks), seen, num_classes)

    def _without_split(self) -> str:
        if not len(self.subsets.unlabelled):
            return "all labelled"
        return f"{len(self.subsets.labelled)} images with a label, {len(self.subsets.unlabelled)} without one"

    def class_counts(self) -> np.ndarray:
        """Count the labelled images of each class: (C,)."""
        return np.bincount(self.manifest.labels[self.subsets.labelled], minlength=len(self.manifest.classes))

    def validate(self, models: Mapping[str, nn.Module], image_size: tuple[int, int]) -> dict[str, float]:
        """Evaluate models on the validation subset (collective).

        Args:
            models: The models by name.
            image_size: (height, width) in pixels.

        Returns:
            val/top1, val/tail, ...; the names of models other than `student` are prefixed. Nothing without the subset.
        """
        row = {}
        held_out = self.data.held_out
        if len(held_out.sample_indices):
            for name, model in models.items():
                found = self.predictions(model, *held_out, image_size)
                prefix = "" if name == "student" else f"{name}_"
                self.confidence[f"{prefix}confidence"] = found.confidence
                summary = metrics.summary(found, len(self.manifest.classes), self.groups())
                row.update({f"val/{prefix}{k}": v for k, v in summary.items()})
        return row

    def starts_from(self, model: nn.Module, temperature: float, image_size: tuple[int, int]) -> None:
        """Keep the probabilities of the classifier that the run starts from, which `calibrate` counts in (collective).

        Args:
            model: It, as it was exported.
            temperature: That of its card.
            image_size: (height, width) in pixels.
        """
        from scipy.special import softmax  # a fifth of a second, which stages 1 and 2 need not wait for

        manifest, sample_indices = self.data.held_out
        if 0 < len(sample_indices) < ENOUGH_ALONE:
            images = self._images(manifest, sample_indices, image_size)
            _, logits = collect_logits(model.to(self.world.device), images, self.world.device)
            self._start = softmax(logits / temperature, axis=1)

    def calibrate(self, models: Mapping[str, nn.Module], image_size: tuple[int, int]) -> None:
        """Fit the temperature of each model on the validation set (collective). `test` and the export apply it."""
        manifest, sample_indices = self.data.held_out
        chosen = sample_indices[:: max(1, -(-len(sample_indices) // MOST_FOR_CALIBRATION))]
        for name, model in models.items():
            if not len(chosen):
                self.calibrations[name] = Calibration(words="not calibrated: there are no validation images")
                continue
            labels, logits = collect_logits(model, self.evaluation(manifest, chosen, image_size), self.world.device)
            self.calibrations[name] = calibrate(logits, labels, self._start)
            logger.info("%s: %s", name, self.calibrations[name].words)

    def calibration(self, name: str) -> Calibration:
        """Return the calibration of a model; temperature 1 if it has none."""
        return self.calibrations.get(name, Calibration())

    def test(self, models: Mapping[str, nn.Module], image_size: tuple[int, int]) -> dict[str, float]:
        """Evaluate models on the test set, or on the validation subset if there is none (collective).

        Writes evaluation.json and all predictions into the run's folder. Probabilities are those of the calibrated models;
        `ece_raw` and `nll_raw` are those of temperature 1.

        Args:
            models: The models by name.
            image_size: (height, width) in pixels.

        Returns:
            The top-1 of each model on the test set, for the card; nothing without one.
        """
        if self.config.test is not None:
            test, sample_indices = open_labelled("data.test", self.config.test, self.manifest, self.config.opening)
            evaluated_on = "test images"
        else:
            test, sample_indices = self.data.held_out
            uses = "the temperature was fitted on them too"
            if self.selected is not None and self.selected.select == "best":
                uses = (
                    "they chose the exported state, and the temperature was fitted on them: new ones probably give less"
                )
            evaluated_on = f"validation images (there is no test set; {uses})"
        if not len(sample_indices):
            return {}
        results = {}
        for name, model in models.items():
            batches = self.evaluation(test, sample_indices, image_size)
            calibration = self.calibration(name)
            raw, found = predict_at(model, batches, self.world.device, [1.0, calibration.temperature])
            results[name] = metrics.report_calibrated(raw, found, self.groups(), test.classes, calibration)
            if self.world.is_main:
                found.save(self.run.folder / f"predictions-{name}.npz")
        labels = self.data.labels()
        protocol = {
            "dataset": test.hash,
            "evaluated_on": evaluated_on,
            "split": self.split.hash if self.split else None,
            "protocol": self.split.protocol if self.split else self._without_split(),
            "labels": labels,
            "labels_in_words": in_words(labels),
            "selected": "" if self.selected is None else str(self.selected),
        }
        counts = dict(zip(self.manifest.classes, self.class_counts().tolist(), strict=True))
        self.run.write_json("evaluation.json", {**protocol, "labelled_per_class": counts, "models": results})
        if self.config.test is None:
            return {}
        return {f"test/{name}_top1": result["top1"] for name, result in results.items()}


def grouped(counts: np.ndarray, ranks: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return `class_groups`, or no group where all classes have as many images."""
    return {} if len(set(counts.tolist())) < 2 else class_groups(counts, ranks=ranks)
