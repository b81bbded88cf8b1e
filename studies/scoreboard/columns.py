"""The columns of the scoreboard, and the jobs that fill them: each job trains on one case and measures its columns.

A job is what a person would run: scikit-learn's learners, the chain, timm's ResNet-18 by stage 2, FixMatch on it by stage 3.
The rivals start from the configs of the chain: the same views, batches, steps and validation images, and so the same number of
images. The ResNet's learning rate is chosen among `RIVALS` on the validation images of the first case of a data set that is
measured, which holds for its other cases; the board begins with the most labels. Where the chain's stage 2 already is that very
run, it is not made twice. Nothing is chosen on test images.
"""

import json
import math
import shutil
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.joint import with_classes
from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.evaluate.baselines import (
    Baseline,
    Samples,
    evenly,
    export_features,
    fit_baseline,
    is_grey,
    pixels_of,
    side_for,
)
from pipeline.evaluate.metrics import summary
from pipeline.files import replace_text
from pipeline.report.results import StageRun, read_result
from studies.runs import run
from studies.scoreboard.pictures import Case
from studies.scoreboard.recipe import Chain

# Label spreading reads at most this many images without a label.
MAX_UNLABELLED = 10_000
RIVALS = (1e-3, 3e-3)  # learning rates at batch 32
# FixMatch trains at this share of the ResNet's learning rate, as the recipe's stage 3 does.
FIXMATCH_SHARE = 0.75
# Where the chain has no stage 1, the demo's is trained for this many steps.
DEMO_STEPS = 150

RESNET = "timm/resnet18"

# The cases of a data set share a stage 1 and the choice of a learning rate; the keys are the names of data sets.
_SHARED: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

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
    "chain": "make chain, exported",
    "recommended": "make chain, recommended",
}
OURS = ("stage-2", "stage-3-student", "stage-3-teacher", "chain", "recommended")


def simple(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Measure scikit-learn's learners on pixels."""
    labelled = case.split.subset("labelled")
    read = partial(pixels_of, side=side_for(case.manifest, labelled))
    if is_grey(read(case.manifest, labelled).values):
        read = partial(_first_channel, read)
    return _learners(case, read, {name: name for name in ("majority", "neighbour", "logistic", "svm", "spreading")})


def _first_channel(read: Callable[..., Samples], manifest: Manifest, sample_indices: NDArray[np.int64]) -> Samples:
    """Read grey images, whose channels are equal, as one channel: distances keep their order, and cost a third."""
    found = read(manifest, sample_indices)
    return found._replace(values=np.ascontiguousarray(np.split(found.values, 3, axis=1)[0]))


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
            "validated": result.stages[stage].validated(model),
            "validation": len(case.split.subset("validation")),
            "images": sum(_images(r) for r in runs),
            "seconds": round(sum(r.seconds() for r in runs), 1),
        }
    exported = result.stages["semi"].config.get("export", "teacher")
    commit = str(result.stages["semi"].environment.get("commit", ""))[:7]
    cells["chain"] = cells[f"stage-3-{exported}"] | {"commit": commit}
    return cells


def features(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Measure scikit-learn's learners on stage 1's features: the chain's, or the demo's if the chain does not pretrain.

    Stage 1 reads no labels, so the demo's is trained once for all cases of a data set, on all its training images.
    """
    experiment = name
    if "arm" not in chain.of(case, name):
        experiment = f"{case.pictures.name}-arm"
        values = [f"run.root={chain.runs}", f"run.experiment={experiment}", f"data.train={case.pictures.train}"]
        values += ["data.split=null", f"loop.steps={DEMO_STEPS}", "data.loader.virtual_readers=null"]
        with _SHARED[case.pictures.name]:  # a run that is complete is reused
            run("arm", "demo", values, name=f"{experiment}, stage 1 of the demo")
            shutil.rmtree(chain.runs / experiment / "arm" / "checkpoints", ignore_errors=True)  # its export is read
    first = read_result(chain.runs / experiment).stages["arm"]
    read = partial(export_features, first.folder / "export")
    cells = _learners(case, read, {f"{learner}-features": learner for learner in ("logistic", "svm", "spreading")})
    for cell in cells.values():
        cell |= {"images": _images(first), "seconds": round(cell["seconds"] + first.seconds(), 1)}
    return cells


def resnet(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Train timm's ResNet-18 from scratch; the first case of a data set tries all of `RIVALS`, the best on validation stays."""
    if _rival(case, chain).is_file():
        return _resnet(case, name, seed, chain)
    with _SHARED[case.pictures.name]:
        return _resnet(case, name, seed, chain)


def _rival(case: Case, chain: Chain) -> Path:
    """The file that keeps the learning rate of a data set's ResNet."""
    return chain.runs / f"{case.pictures.name}-rival.json"


def _resnet(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    chained = read_result(chain.runs / name).stages
    images = sum(_images(run) for stage, run in chained.items() if stage != "semi")
    loop, side = chained["distill"].config["loop"], chained["distill"].config["model"]["image_size"][0]
    steps = max(20, round(images / loop["global_batch"]))
    chosen = _rival(case, chain)
    tried = [json.loads(chosen.read_text())["lr"]] if chosen.is_file() else list(RIVALS)
    found = {}
    for rate in tried:
        if _is_rival(chained["distill"], rate):
            found[rate] = chained["distill"]
            continue
        scaled = rate * math.sqrt(loop["global_batch"] / 32)
        own = [
            f"run.experiment={name}-resnet-{rate:g}", "init_from=null", f"model={{name: {RESNET}, image_size: {side}}}",
            f"optim={{lr: {scaled:g}, warmup_steps: {max(1, steps // 20)}, clip_norm: 3.0}}", f"loop.steps={steps}",
        ]  # fmt: skip
        run("distill", chain.of(case, name)["distill"], [*_values(case, name, seed, "distill", chain), *own],
            name=f"{name}, resnet, lr {rate:g}")  # fmt: skip
        found[rate] = read_result(chain.runs / f"{name}-resnet-{rate:g}").stages["distill"]
    best = max(found, key=lambda rate: (found[rate].validated("student") or 0.0, -tried.index(rate)))
    if not chosen.is_file():
        replace_text(chosen, json.dumps({"lr": best, "chosen on": f"{name}'s validation images"}) + "\n")
    cell = _trained(found[best], "student") | {
        "images": _images(found[best]),
        "seconds": round(sum(r.seconds() for r in found.values()), 1),
        "setting": f"lr {best:g}",
    }
    return {"resnet": cell}


def fixmatch(case: Case, name: str, seed: int, chain: Chain) -> dict[str, Cell]:
    """Continue the ResNet by FixMatch: the student labels, weight 1, threshold 0.95, and an average is kept beside it."""
    rate = json.loads(_rival(case, chain).read_text())["lr"]
    same = _is_rival(read_result(chain.runs / name).stages["distill"], rate)
    parent = read_result(chain.runs / (name if same else f"{name}-resnet-{rate:g}")).stages["distill"]
    config = chain.of(case, name)["semi"]
    batch = read_result(chain.runs / name).stages["semi"].config["loop"]["global_batch"]
    scaled = FIXMATCH_SHARE * rate * math.sqrt(batch / 16)
    own = [
        f"run.experiment={name}-fixmatch", f"init_from={parent.folder / 'export'}",
        "pseudo={labeller: student, threshold: 0.95, weight: 1.0}",
        "ema={mode: ema, base_decay: 0.95, max_decay: 0.95}", "optim.kind=adamw", f"optim.lr={scaled:g}",
    ]  # fmt: skip
    run("semi", config, [*_values(case, name, seed, "semi", chain), *own], name=f"{name}, fixmatch")
    done = read_result(chain.runs / f"{name}-fixmatch").stages["semi"]
    best = max(("teacher", "student"), key=lambda model: done.validated(model) or 0.0)
    cell = _trained(done, best) | {
        "images": _images(parent) + _images(done),
        "seconds": round(parent.seconds() + done.seconds(), 1),
        "setting": f"lr {scaled:g}, {best}",
    }
    return {"fixmatch": cell}


def _is_rival(stage: StageRun, rate: float) -> bool:
    """Whether a stage 2 is the ResNet from random weights at this learning rate, so that it need not be trained again."""
    model, loop, own = (stage.config[key] for key in ("model", "loop", "optim"))
    scaled = rate * math.sqrt(loop["global_batch"] / 32)
    whole = model["name"] == RESNET and not model["options"]
    return (
        whole
        and not stage.config["init_from"]
        and own["kind"] == "adamw"
        and math.isclose(own["lr"], scaled, rel_tol=0.02)
    )


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
    cell: Cell = {"balanced": scores["balanced"]}
    cell |= {"images": 0, "setting": found.setting, "validated": found.validated}
    return cell | ({"ece": scores["ece"]} if found.calibrated else {})


def _trained(stage: StageRun, model: str) -> Cell:
    scores = stage.evaluation["models"][model]
    return {key: scores[key] for key in ("balanced", "ece")}


def _images(stage: StageRun) -> int:
    """Return the images that a stage trained on, labelled and unlabelled, up to its last step."""
    config = stage.config
    unlabelled = config.get("unlabelled_ratio", 0) if config.get("pseudo", {}).get("weight") else 0
    return int(stage.rows[-1]["step"] * config["loop"]["global_batch"] * (1 + unlabelled))
