"""The columns of the scoreboard, and the jobs that fill them: each job trains on one case and measures its columns.

A job is what a person would run: scikit-learn's learners, the chain, timm's ResNet-18 by stage 2, FixMatch on it by stage 3.
The ResNet sees as many images as the chain before stage 3, with the views of the chain's stage 2. Its learning rate
and image size are chosen among `RIVALS` on the validation images that every column has; the first seed of a cell chooses for
all. FixMatch sees as many images as the chain's stage 3. Nothing is chosen on test images.
"""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import yaml

from pipeline.datasets.joint import with_classes
from pipeline.datasets.manifest import read_manifest
from pipeline.evaluate.baselines import Baseline, Samples, evenly, export_features, fit_baseline, pixels_of, side_for
from pipeline.evaluate.metrics import summary
from pipeline.files import replace_text
from pipeline.jsonl import newest
from pipeline.report.results import StageRun, read_result
from studies.runs import run
from studies.scoreboard.pictures import Case
from studies.scoreboard.recipe import Chain

MAX_UNLABELLED = 10_000  # that label spreading reads
RESNET = "{name: timm/resnet18, image_size: %d}"
RIVAL_BATCH = 64
# Learning rate, and how much larger the image is than the chain's: its stem divides the side by 4.
RIVALS = {"a": (1e-3, 1), "b": (3e-3, 1), "c": (1e-3, 2)}
# The views of the ResNet where the chain's own have no affine map.
AFFINE = "{crop_scale: [0.8, 1.0], horizontal_flip: 0.0, affine: {rotation: 10, scale: [0.9, 1.1], shear: 8, translation: 0.1}}"

Cell = dict[str, Any]  # what one column reached: percentages, images seen, seconds


class Job(NamedTuple):
    """Something to train.

    Attributes:
        columns: The columns that it fills.
        needs: The job whose runs it starts from, or none.
        measure: Takes the case, its name, the seed and the chain; returns the cell of each column.
    """

    columns: Sequence[str]
    needs: str | None
    measure: Callable[[Case, str, int, Chain], dict[str, Cell]]


TITLES = {
    "majority": "majority class",
    "neighbour": "1-NN, pixels",
    "logistic": "logistic regression, pixels",
    "svm": "RBF-SVM, pixels",
    "spreading": "label spreading, pixels",
    "logistic-features": "logistic regression, stage-1 features",
    "svm-features": "RBF-SVM, stage-1 features",
    "spreading-features": "label spreading, stage-1 features",
    "resnet": "ResNet-18",
    "fixmatch": "FixMatch, ResNet-18",
    "stage-2": "stage 2",
    "stage-3-student": "stage 3, student",
    "stage-3-teacher": "stage 3, teacher",
    "chain": "make chain",
}
OURS = ("stage-2", "stage-3-student", "stage-3-teacher", "chain")


def simple(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Measure scikit-learn's learners on pixels."""
    side = side_for(case.manifest, case.split.subset("labelled"))
    read = partial(pixels_of, side=side)
    return _learners(
        case, read, {column: column for column in ("majority", "neighbour", "logistic", "svm", "spreading")}
    )


def stages(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Run the chain's stages and measure them; `chain` is what its last stage exports."""
    configs = chain.of(case, name)
    for stage, config in configs.items():
        run(stage, config, _values(case, name, seed, stage, chain), name=f"{name}, {stage}")
    result = read_result(chain.runs / name)
    cells = {}
    for column, stage, model in (("stage-2", "distill", "student"), ("stage-3-student", "semi", "student"),
                                 ("stage-3-teacher", "semi", "teacher")):  # fmt: skip
        runs = [result.stages[s] for s in configs if s != "semi" or stage == "semi"]
        cells[column] = _trained(result.stages[stage], model) | {
            "images": sum(_images(r) for r in runs),
            "seconds": round(sum(r.seconds() for r in runs), 1),
        }
    exported = result.stages["semi"].config.get("export", "teacher")
    return cells | {"chain": cells[f"stage-3-{exported}"]}


def features(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Measure scikit-learn's learners on stage 1's features: the chain's, or the demo's if the chain does not pretrain."""
    experiment = name
    if "arm" not in chain.of(case, name):
        experiment = f"{name}-arm"
        values = [*_values(case, name, seed, "arm", chain), f"run.experiment={experiment}"]
        run("arm", "demo", values, name=f"{name}, stage 1 of the demo")
    first = read_result(chain.runs / experiment).stages["arm"]
    read = partial(export_features, first.folder / "export")
    cells = _learners(case, read, {f"{learner}-features": learner for learner in ("logistic", "svm", "spreading")})
    for cell in cells.values():
        cell |= {"images": _images(first), "seconds": round(cell["seconds"] + first.seconds(), 1)}
    return cells


def resnet(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Train timm's ResNet-18 from scratch; the first seed of a cell tries all of `RIVALS` and keeps the best on validation."""
    chained = read_result(chain.runs / name).stages
    images = sum(_images(run) for stage, run in chained.items() if stage != "semi")
    steps = max(20, round(images / RIVAL_BATCH))
    ours = chained["distill"].config["augment"]
    views = _flow(ours) if ours.get("affine") else AFFINE
    chosen = chain.runs / f"{name.rpartition('-seed')[0]}-rival.json"
    tried = [json.loads(chosen.read_text())["rival"]] if chosen.is_file() else list(RIVALS)
    found = {}
    for rival in tried:
        rate, enlarged = RIVALS[rival]
        side = enlarged * chained["distill"].config["model"]["image_size"][0]
        own = [
            f"run.experiment={name}-resnet-{rival}", "init_from=null", f"model={RESNET % side}", f"augment={views}",
            "data.loader.virtual_readers=null",
            f"optim={{lr: {rate}, warmup_steps: {min(20, steps // 4)}, weight_decay: 0.05}}",
            f"loop={{steps: {steps}, global_batch: {RIVAL_BATCH}, log_every: 20, eval_every: {steps}, save_every: {steps}}}",
        ]  # fmt: skip
        run("distill", "demo", [*_values(case, name, seed, "distill", chain), *own], name=f"{name}, resnet, {rival}")
        found[rival] = read_result(chain.runs / f"{name}-resnet-{rival}").stages["distill"]
    best = max(found, key=lambda rival: (_validated(found[rival], ""), -tried.index(rival)))
    if not chosen.is_file():
        replace_text(chosen, json.dumps({"rival": best, "chosen on": f"{name}'s validation images"}) + "\n")
    cell = _trained(found[best], "student") | {
        "images": _images(found[best]),
        "seconds": round(sum(r.seconds() for r in found.values()), 1),
        "setting": f"lr {RIVALS[best][0]}, {found[best].config['model']['image_size'][0]} px",
    }
    return {"resnet": cell}


def fixmatch(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Continue the ResNet by FixMatch: the student labels, weight 1, threshold 0.95, and an average is kept beside it."""
    chained = read_result(chain.runs / name).stages["semi"]
    rival = json.loads((chain.runs / f"{name.rpartition('-seed')[0]}-rival.json").read_text())["rival"]
    parent = read_result(chain.runs / f"{name}-resnet-{rival}").stages["distill"]
    rate = RIVALS[rival][0] / 2
    own = [
        f"run.experiment={name}-fixmatch", f"init_from={parent.folder / 'export'}",
        "pseudo={labeller: student, threshold: 0.95, weight: 1.0}",
        "ema={mode: ema, base_decay: 0.95, max_decay: 0.95}", "data.loader.virtual_readers=null",
        f"optim={{lr: {rate:g}, warmup_steps: 20, weight_decay: 0.05}}",
    ]  # fmt: skip
    if not chained.config["strong"].get("affine"):
        own += [f"weak={AFFINE}", f"strong={AFFINE.removesuffix('}') + ', erase: 0.5, rand_augment: rand-m5-n2}'}"]
    run("semi", "demo", [*_values(case, name, seed, "semi", chain), *own], name=f"{name}, fixmatch")
    done = read_result(chain.runs / f"{name}-fixmatch").stages["semi"]
    best = max(("teacher", "student"), key=lambda model: _validated(done, "teacher_" if model == "teacher" else ""))
    cell = _trained(done, best) | {
        "images": _images(parent) + _images(done),
        "seconds": round(parent.seconds() + done.seconds(), 1),
        "setting": f"lr {rate:g}, {best}",
    }
    return {"fixmatch": cell}


JOBS = {
    "simple": Job(("majority", "neighbour", "logistic", "svm", "spreading"), None, simple),
    "chain": Job(("stage-2", "stage-3-student", "stage-3-teacher", "chain"), None, stages),
    "features": Job(("logistic-features", "svm-features", "spreading-features"), "chain", features),
    "resnet": Job(("resnet",), "chain", resnet),
    "fixmatch": Job(("fixmatch",), "resnet", fixmatch),
}


def _values(case: Case, name: str, seed: int, stage: str, chain: Chain) -> list[str]:
    values = [f"run.root={chain.runs}", f"run.experiment={name}", f"run.seed={seed}", f"data.train={case.train}"]
    values.append(f"data.split={case.split_file}")
    return values if stage == "arm" else [*values, f"data.test={case.test}"]


def _learners(case: Case, read: Callable[..., Samples], columns: dict[str, str]) -> dict[str, Cell]:
    """Fit learners to the samples that `read` returns; columns: column -> learner."""
    began = time.monotonic()
    test = with_classes(read_manifest(case.test), case.manifest.classes)
    labelled, held_out = (read(case.manifest, case.split.subset(subset)) for subset in ("labelled", "validation"))
    pool = case.split.subset("unlabelled")
    unlabelled = read(case.manifest, evenly(pool, np.zeros(len(pool), np.int64), MAX_UNLABELLED))
    queries = read(test, np.arange(test.num_samples))
    reading = time.monotonic() - began
    num_classes = len(case.manifest.classes)
    cells = {}
    for column, learner in columns.items():
        found = fit_baseline(learner, labelled, queries, num_classes, held_out=held_out, unlabelled=unlabelled)
        cells[column] = _scored(found, num_classes) | {"seconds": round(found.seconds + reading, 1)}
    return cells


def _scored(found: Baseline, num_classes: int) -> Cell:
    scores = summary(found.predictions, num_classes, {})
    cell = {"top1": scores["top1"], "balanced": scores["balanced"], "images": 0, "setting": found.setting}
    return cell | ({"ece": scores["ece"]} if found.calibrated else {})


def _trained(stage: StageRun, model: str) -> Cell:
    scores = stage.evaluation["models"][model]
    return {key: scores[key] for key in ("top1", "balanced", "ece")}


def _validated(stage: StageRun, prefix: str) -> float:
    return float(newest(stage.rows, f"val/{prefix}balanced") or 0.0)


def _images(stage: StageRun) -> int:
    """Return the images that a stage trained on, labelled and unlabelled, up to its last step."""
    config = stage.config
    unlabelled = config.get("unlabelled_ratio", 0) if config.get("pseudo", {}).get("weight") else 0
    return int(stage.rows[-1]["step"] * config["loop"]["global_batch"] * (1 + unlabelled))


def _flow(value: Any) -> str:
    """Write a value as an override's text."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
