"""python -m pipeline.evaluate EXPORT DATA [--train DATA --split FILE [--probe]] [--out FOLDER]

Judges a classifier's export on a dataset (a folder of shards with a manifest) or, with --part, on a part of a split of it:
top-1 and top-5, balanced, head, medium and tail by the images it was trained on, calibration, every class, and every
answer. An export whose stage trained a student beside a teacher is judged with its companion. With --train and --split
the temperature is fitted on the split's validation part, and the calibrated figures stand beside; with --probe too, a
linear probe and the nearest neighbours learn from the split's labelled part and what the head reads.

On several processes: make evaluate EXPORT=... DATA=... NPROC=N. The numbers are the same on any number of them.
Exit codes: those of `python -m stages`.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.datasets.splits import read_split
from pipeline.errors import ConfigError, EnvironmentProblem, PipelineError
from pipeline.exports.card import CARD, Card

if TYPE_CHECKING:
    from pipeline.streaming.loader import Batch
    from pipeline.train.distributed import World

STUDENT, TEACHER = "student", "teacher"


def main(arguments: list[str]) -> int:
    given = _parser().parse_args(arguments)
    try:
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
        _judge(_check(given), given.batch)
    except PipelineError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder with model.json, of a classifier")
    parser.add_argument("data", type=Path, metavar="DATA", help="folder with a manifest")
    parser.add_argument("--part", choices=("labelled", "unlabelled", "validation"), help="judge this part of --split")
    parser.add_argument("--train", type=Path, metavar="DATA", help="dataset of --split (default: DATA)")
    parser.add_argument("--split", type=Path, metavar="FILE", help="a split of --train")
    parser.add_argument("--probe", action="store_true", help="linear probe and nearest neighbours on the features")
    parser.add_argument("--batch", type=int, help="images per process and step (default: as its run was judged)")
    parser.add_argument("--out", type=Path, help="default: evaluation-DATA beside the export")
    return parser


class Asked(NamedTuple):
    """What is judged, checked before torch is loaded."""

    exports: dict[str, Path]
    data: Manifest
    sample_indices: np.ndarray  # of `data`
    train: Manifest
    held_out: np.ndarray  # of `train`: the temperature is fitted on them
    bank: np.ndarray  # of `train`: the probes learn from them; empty if none was asked for
    split: str | None
    out: Path


def _check(given: argparse.Namespace) -> Asked:
    if given.batch is not None and given.batch < 1:
        raise ConfigError(f"--batch {given.batch}: at least one image a step is needed")
    if (given.part or given.train or given.probe) and not given.split:
        raise ConfigError("--part, --train and --probe speak of a split; give its file with --split")
    exports, data = companions(given.export), read_manifest(given.data)
    for folder in exports.values():
        card = Card.read(folder)
        if card.kind != "classifier":
            raise ConfigError(f"{folder} holds a pretrainer, which names no classes; evaluate a classifier's export")
        card.check_classes(data.classes, folder)
    train = read_manifest(given.train) if given.train else data
    split = read_split(given.split, train) if given.split else None
    if given.part and train.hash != data.hash:
        raise ConfigError(f"--part {given.part} is of {given.train}, not of {given.data}; give the same folder twice")
    sample_indices = split.subset(given.part) if split and given.part else np.arange(data.num_samples)
    if not len(sample_indices):
        raise ConfigError(f"{given.split} leaves no {given.part} samples; judge another part")
    out = given.out or given.export.parent / f"evaluation-{given.data.name}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentProblem(f"{out} cannot be written ({error.strerror}); choose another --out") from None
    held_out = split.subset("validation") if split and given.part != "validation" else np.empty(0, np.int64)
    bank = split.subset("labelled") if split and given.probe else np.empty(0, np.int64)
    learnt_from = np.concatenate([held_out, bank])
    if train.hash == data.hash and (both := np.intersect1d(sample_indices, learnt_from)).size:
        raise ConfigError(
            f"{both.size} of the {len(sample_indices)} judged images are those that the temperature or the probe learns from;"
            " give --part validation or unlabelled, or another DATA"
        )
    return Asked(exports, data, sample_indices, train, held_out, bank, split.hash if split else None, out)


def _judge(asked: Asked, batch: int | None) -> None:
    from pipeline.train import distributed

    world = distributed.start(timeout_seconds=600)
    results: dict[str, Any] = {}
    weights = {}
    for name, folder in asked.exports.items():
        found, weights[name] = _judge_one(name, folder, asked, batch, world)
        results |= found
    if world.is_main:
        origin = {
            "dataset": asked.data.hash,
            "split": asked.split,
            "images": len(asked.sample_indices),
            "weights": weights,
        }
        (asked.out / "evaluation.json").write_text(json.dumps({**origin, "models": results}, indent=1) + "\n")
        _print(results, asked.out)
    distributed.stop()


def _judge_one(name: str, folder: Path, asked: Asked, batch: int | None, world: "World") -> tuple[dict[str, Any], str]:
    """The reports of one model, as it is and calibrated, and its weights' hash (collective)."""
    from torch import nn

    from pipeline.evaluate import metrics
    from pipeline.evaluate.calibration import fit_temperature
    from pipeline.evaluate.config import ProbeConfig
    from pipeline.evaluate.predictions import ask, collect
    from pipeline.evaluate.probes import features_of, probe
    from pipeline.exports.export import load_export
    from pipeline.streaming.loader import evaluation_batches
    from pipeline.streaming.transforms import eval_views

    model, card = load_export(folder)
    model = model.to(world.device)
    views = eval_views(card.model.image_size, mean=card.preprocessing.mean, std=card.preprocessing.std)
    groups = {group: np.array(members) for group, members in card.class_groups.items()}
    classes = asked.data.classes

    def batches(manifest: Manifest, sample_indices: np.ndarray) -> "Iterator[Batch]":
        return evaluation_batches(
            manifest,
            sample_indices,
            batch_size=batch or card.eval_batch,
            rank=world.rank,
            world_size=world.size,
            views=views,
        )

    answers = ask(model, batches(asked.data, asked.sample_indices), world.device)
    results = {name: metrics.report(answers, groups, classes)}
    if world.is_main:
        answers.save(asked.out / f"answers-{name}.npz")
        metrics.write_per_class(asked.out / f"per_class-{name}.csv", answers, classes, card.class_counts)
    if len(asked.held_out):
        labels, logits = collect(model, batches(asked.train, asked.held_out), world.device)
        temperature = fit_temperature(logits, labels)
        cooled = ask(model, batches(asked.data, asked.sample_indices), world.device, temperature=temperature)
        results[f"{name}, calibrated"] = {
            "temperature": temperature,
            **metrics.report(cooled, groups, classes),
        }
    if len(asked.bank):
        reader = getattr(model, "head", None)
        if not isinstance(reader, nn.Linear):
            raise ConfigError(
                f"{folder}: --probe reads what the one linear head reads, and {card.model.name} has none such"
            )
        learnt, queries = (
            features_of(model, reader, batches(manifest, chosen), world.device)
            for manifest, chosen in ((asked.train, asked.bank), (asked.data, asked.sample_indices))
        )
        results[name]["probes"] = probe(learnt, queries, ProbeConfig())
    return results, card.weights_sha256


def companions(export: Path) -> dict[str, Path]:
    """Name -> folder of every model that the export's stage trained; a lone one is the student of itself."""
    if not (export / CARD).is_file():
        Card.read(export)  # says what is missing
    beside = {name: export.with_name(f"export-{name}") for name in (STUDENT, TEACHER)}
    there = {name: folder for name, folder in beside.items() if export.name == "export" and (folder / CARD).is_file()}
    if not there:
        return {STUDENT: export}
    missing = TEACHER if STUDENT in there else STUDENT
    return dict(sorted({**there, missing: export}.items()))


def _print(results: dict[str, Any], out: Path) -> None:
    shown = ("top1", "top5", "balanced", "head", "medium", "tail", "ece", "nll")
    print(f"{'':22s}" + "".join(f"{name:>10s}" for name in shown))
    for name, found in results.items():
        cells = (
            f"{found[m]:10.4f}" if m == "nll" else f"{found[m]:10.2f}" if m in found else f"{'-':>10s}" for m in shown
        )
        print(f"{name:22s}" + "".join(cells))
    for name, found in results.items():
        if "probes" in found:
            print(f"{name}, probes on its features: " + ", ".join(f"{k} {v:.2f}" for k, v in found["probes"].items()))
    first = next(iter(results.values()))
    low, high = first["intervals"]["top1"]
    print(f"{first['samples']} images; 95 % of top1 by bootstrap: {low:.2f} to {high:.2f}; all of it in {out}")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # A rank that failed must not wait for the others in the atexit handlers of a process group they still use.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
