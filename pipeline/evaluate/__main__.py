"""Evaluate an exported classifier on a dataset.

    python -m pipeline.evaluate EXPORT DATA [--train DATA --split FILE [--linear-probe]] [--out FOLDER]

DATA is a folder of shards with a manifest; --subset evaluates on one subset of a split of it. The command reports top-1 and
top-5; balanced, head, medium and tail accuracy; calibration and the accuracy of every class; and it keeps all predictions.

If the export's stage trained a student beside a teacher, both are evaluated. Probabilities are calibrated by the temperature
of the export's card; ece and ece_raw are the calibration error with and without it. With --train and --split a temperature
is fitted anew on the split's validation subset, and the metrics with it are added as "calibrated". With --linear-probe too,
a linear probe and nearest neighbours learn from the split's labelled subset, on the input of the model's head.

On several processes: make evaluate EXPORT=... DATA=... NPROC=N. The numbers do not depend on N.
Exit codes: those of `python -m stages`.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline import decoding
from pipeline.cli import guarded
from pipeline.datasets.config import add_classes, opening_of
from pipeline.datasets.joint import read_manifests, with_classes
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.opening import open_dataset
from pipeline.datasets.splits import read_split
from pipeline.errors import ConfigError, DataError, EnvironmentProblem, Interrupted, PipelineError
from pipeline.exports.card import CARD, Card
from pipeline.files import replace_text

if TYPE_CHECKING:
    from pipeline.streaming.loader import Batch
    from pipeline.train.distributed import World

STUDENT, TEACHER, AVERAGE = "student", "teacher", "average"


def main(arguments: Sequence[str]) -> int:
    """Run the command on this rank and return its exit code."""
    return guarded(_run, arguments)


def _run(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        _evaluate(_check(given), given)
    except (PipelineError, Interrupted) as error:
        if os.environ.get("RANK", "0") == "0":
            raise
        return error.exit_code  # rank 0 prints the sentence
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder of a classifier's export, with model.json")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with a manifest")
    parser.add_argument(
        "--subset", choices=("labelled", "unlabelled", "validation"), help="evaluate on this subset of --split only"
    )
    parser.add_argument(
        "--train",
        type=Path,
        nargs="+",
        metavar="DATA",
        help="dataset of --split, or several in the order of data.train (default: DATA)",
    )
    parser.add_argument("--split", type=Path, metavar="FILE", help="a split of --train")
    parser.add_argument(
        "--linear-probe", action="store_true", help="add a linear probe and nearest neighbours on the features"
    )
    parser.add_argument(
        "--batch", type=int, help="images per process and step (default: the evaluation batch of the export's run)"
    )
    decoding.add_options(parser, "that of the export")
    add_classes(parser)
    parser.add_argument("--out", type=Path, help="folder to write (default: evaluation-DATA beside the export)")
    return parser


class _Request(NamedTuple):
    """What to evaluate, checked before torch is loaded."""

    exports: dict[str, Path]
    data: Manifest
    sample_indices: np.ndarray  # rows of `data`
    train: Manifest
    held_out: np.ndarray  # rows of `train` that the temperature is fitted on
    bank: np.ndarray  # rows of `train` that the linear probe learns from; empty without --linear-probe
    split: str | None
    out: Path


def _check(given: argparse.Namespace) -> _Request:
    if given.batch is not None and given.batch < 1:
        raise ConfigError(f"--batch {given.batch}: give at least 1 image per step")
    if (given.subset or given.train or given.linear_probe) and not given.split:
        raise ConfigError("--subset, --train and --linear-probe need a split; give its file with --split")
    exports, data = companions(given.export), open_dataset(given.data, opening_of(given))
    train = read_manifests(given.train, opening_of(given)) if given.train else data
    for folder in exports.values():
        card = Card.read(folder)
        if card.kind != "classifier":
            raise ConfigError(f"{folder} holds a pretrainer, which predicts no classes; evaluate a classifier's export")
        if {*data.classes} <= {*card.classes}:  # the dataset may lack some, or have them in another order
            data, train = with_classes(data, card.classes), with_classes(train, card.classes)
        card.check_classes(data.classes, folder)
    split = read_split(given.split, train) if given.split else None
    if given.subset and train.hash != data.hash:
        raise ConfigError(
            f"--subset {given.subset} is a subset of {train}, but DATA is {given.data}; give the same folder for both"
        )
    sample_indices = split.subset(given.subset) if split and given.subset else np.arange(data.num_samples)
    if not len(sample_indices):
        raise ConfigError(f"{given.split} has no {given.subset} samples; give another --subset")
    sample_indices = sample_indices[data.labels[sample_indices] >= 0]
    if not len(sample_indices):
        raise DataError(f"none of these samples of {data} has a label, so no score can be computed; give another DATA")
    out = given.out or given.export.parent / f"evaluation-{given.data.name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    held_out = split.subset("validation") if split and given.subset != "validation" else np.empty(0, np.int64)
    bank = split.subset("labelled") if split and given.linear_probe else np.empty(0, np.int64)
    learnt_from = np.concatenate([held_out, bank])
    if train.hash == data.hash and (both := np.intersect1d(sample_indices, learnt_from)).size:
        raise ConfigError(
            f"the temperature or the linear probe would learn from {both.size} of the {len(sample_indices)} images to evaluate"
            " on; give --subset validation or unlabelled, or another DATA"
        )
    return _Request(exports, data, sample_indices, train, held_out, bank, split.hash if split else None, out)


def _evaluate(request: _Request, given: argparse.Namespace) -> None:
    from pipeline.train import distributed

    world = distributed.start(timeout_seconds=600)
    results: dict[str, Any] = {}
    weights = {}
    for name, folder in request.exports.items():
        found, weights[name] = _evaluate_model(name, folder, request, given, world)
        results |= found
    if world.is_main:
        origin = {
            "dataset": request.data.hash,
            "split": request.split,
            "images": len(request.sample_indices),
            "weights": weights,
        }
        replace_text(request.out / "evaluation.json", json.dumps({**origin, "models": results}, indent=1) + "\n")
        _print(results, request.out)
    distributed.stop()


def _evaluate_model(
    name: str, folder: Path, request: _Request, given: argparse.Namespace, world: "World"
) -> tuple[dict[str, Any], str]:
    """Return the metrics of one model, raw and calibrated, and the hash of its weights (collective)."""
    from pipeline.evaluate import metrics
    from pipeline.evaluate.calibration import Calibration, fit_temperature
    from pipeline.evaluate.config import LinearProbeConfig
    from pipeline.evaluate.features import evaluate_features, features_of, linear_head
    from pipeline.evaluate.predictions import collect_logits, predict, predict_at
    from pipeline.exports.export import load_export
    from pipeline.streaming.loader import evaluation_batches
    from pipeline.streaming.transforms import eval_views

    model, card = load_export(folder)
    model = model.to(world.device)
    views = eval_views(
        card.model.image_size,
        mean=card.preprocessing.mean,
        std=card.preprocessing.std,
        view=card.preprocessing.view,
        decoding=decoding.given(given, card.preprocessing.decoding),
    )
    classes = request.data.classes
    groups = _groups(folder, card)

    def batches(manifest: Manifest, sample_indices: np.ndarray) -> "Iterator[Batch]":
        return evaluation_batches(
            manifest,
            sample_indices,
            batch_size=given.batch or card.eval_batch,
            rank=world.rank,
            world_size=world.size,
            views=views,
            device=world.device,
        )

    calibration = Calibration(card.temperature, card.calibration)
    raw, predictions = predict_at(
        model, batches(request.data, request.sample_indices), world.device, [1.0, card.temperature]
    )
    results = {name: metrics.report_calibrated(raw, predictions, groups, classes, calibration)}
    if world.is_main:
        predictions.save(request.out / f"predictions-{name}.npz")
        metrics.write_per_class(request.out / f"per_class-{name}.csv", predictions, classes, card.class_counts)
    if len(request.held_out):
        labels, logits = collect_logits(model, batches(request.train, request.held_out), world.device)
        temperature = fit_temperature(logits, labels)
        calibrated = predict(
            model, batches(request.data, request.sample_indices), world.device, temperature=temperature
        )
        results[f"{name}, calibrated"] = {
            "temperature": temperature,
            **metrics.report(calibrated, groups, classes),
        }
    if len(request.bank):
        reader = linear_head(model)
        if reader is None:
            raise ConfigError(
                f"--linear-probe needs a model with one linear head, but {card.model.name} in {folder} has none;"
                " leave --linear-probe out"
            )
        learnt, queries = (
            features_of(model, reader, batches(manifest, chosen), world.device)
            for manifest, chosen in ((request.train, request.bank), (request.data, request.sample_indices))
        )
        results[name]["features"] = evaluate_features(learnt, queries, LinearProbeConfig())
    return results, card.weights_sha256


def _groups(export: Path, card: Card) -> dict[str, np.ndarray]:
    """Return the groups of classes: as the run evaluated them, if it lies beside the export, else those of the card.

    The run may count hidden labels too; the card counts only the labels that the model has learnt.
    """
    try:
        models = json.loads((export.parent / "evaluation.json").read_bytes())["models"]
        named = next(iter(models.values()))["groups"]
        return {group: np.array([card.classes.index(n) for n in names], int) for group, names in named.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return {group: np.array(members) for group, members in card.class_groups.items()}


def companions(export: Path) -> dict[str, Path]:
    """Find the exports of all models that the export's stage trained.

    Returns:
        "student" and "teacher" (of stage 2 "average") -> folder; only "student" if the stage trained one model.

    Raises:
        HandoverError: If there is no export at `export`.
    """
    if not (export / CARD).is_file():
        Card.read(export)  # says what is missing
    beside = {name: export.with_name(f"export-{name}") for name in (STUDENT, TEACHER)}
    there = {name: folder for name, folder in beside.items() if export.name == "export" and (folder / CARD).is_file()}
    if not there:
        return {STUDENT: export}
    average = AVERAGE if Card.read(export).lineage.stage == "distill" else TEACHER
    missing = average if STUDENT in there else STUDENT
    return dict(sorted({**there, missing: export}.items()))


def _print(results: dict[str, Any], out: Path) -> None:
    shown = ("top1", "top5", "balanced", "head", "medium", "tail", "ece_raw", "ece", "nll")
    print(f"{'':22s}" + "".join(f"{name:>10s}" for name in shown))
    for name, found in results.items():
        cells = (
            f"{found[m]:10.4f}" if m == "nll" else f"{found[m]:10.2f}" if m in found else f"{'-':>10s}" for m in shown
        )
        print(f"{name:22s}" + "".join(cells))
    for name, found in results.items():
        if "features" in found:
            print(f"{name}, features: " + ", ".join(f"{k} {v:.2f}" for k, v in found["features"].items()))
    first = next(iter(results.values()))
    low, high = first["intervals"]["top1"]
    print(f"{first['samples']} images; 95 % bootstrap interval of top1: {low:.2f} to {high:.2f}; written to {out}")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # A rank that failed must not wait for the others in the atexit handlers of a process group they still use.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
