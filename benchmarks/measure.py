"""What it costs, and what it sees: measured side by side, kept as sections that a report takes in.

`efficiency`  real stage-3 steps of two configs (the supplement's Table 5): time per epoch, FLOPs, peak memory.
`fields`      effective receptive fields of models by name (EfficientViM's Figure C).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from pipeline.config import load_config
from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.splits import read_split
from pipeline.errors import ConfigError, PipelineError
from pipeline.models import build_model
from pipeline.report.extras import Section, write_section
from pipeline.report.figures import draw, picture_grid
from pipeline.report.tables import Table
from stages.check import check
from stages.configs import SemiConfig

ROUNDS = 2  # the configs take turns
LEFT_OUT = 5  # first steps of a process


class Turn(NamedTuple):
    """One process of one config."""

    step_seconds: float  # median
    images_per_second: float
    tflop_per_step: float
    peak_gib: float


def efficiency(configs: Sequence[Path], overrides: Sequence[str], steps: int, out: Path) -> Path:
    """Each config's stage 3, started from its parent for `steps` steps, in turns; every step is logged, none is evaluated."""
    if len(set(configs)) < 2:
        raise ConfigError("efficiency compares: give two or more configs of stage 3")
    if steps <= LEFT_OUT:
        raise ConfigError(f"--steps {steps}: the first {LEFT_OUT} are left out; give more")
    loaded = [load_config(SemiConfig, path, overrides) for path in configs]
    turns: dict[Path, list[Turn]] = {path: [] for path in configs}
    with tempfile.TemporaryDirectory() as runs:
        short = {path: [*overrides, *_shortened(config, steps)] for path, config in zip(configs, loaded, strict=True)}
        for path, words in short.items():
            check("semi", load_config(SemiConfig, path, [*words, f"run.root={runs}"]), world_size=1)
        for k in range(ROUNDS):
            for i, (path, words) in enumerate(short.items()):
                turns[path].append(_turn(path, words, Path(runs) / f"{i}-{k}"))
    rows = [_row(path.stem, config, turns[path]) for path, config in zip(configs, loaded, strict=True)]
    first = turns[configs[0]]
    for path in configs[1:]:
        rows.append(_ratio(f"{path.stem} / {configs[0].stem}", first, turns[path]))
    table = Table(
        name="efficiency",
        title="A semi-supervised step, side by side",
        header=["config", "model", "ms/step", "images/s", "epoch", "TFLOPs/step", "GFLOPs/image", "peak GiB"],
        rows=rows,
        note=f"Medians of {ROUNDS} turns of {steps} steps of one process each, the first {LEFT_OUT} left out. An epoch is one "
        "pass over the unlabelled images. FLOPs (2 a multiply-add) of student and teacher, backward included. "
        "Peak: what the process held at most, or on a GPU what was allocated.",
    )
    return write_section(out, Section("Efficiency of training", [table], []))


def _shortened(config: SemiConfig, steps: int) -> list[str]:
    """Overrides: the same parents, a run of its own, every step logged, no evaluation but the last."""
    parents = [f"{role}={where}" for role, where in config.parents().items()]
    return [*parents, f"loop.steps={steps}", "loop.log_every=1", "loop.eval_every=null", "optim.warmup_steps=1",
            "data.test=null", f"loop.save_every={steps}", "run.experiment=turn"]  # fmt: skip


def _turn(path: Path, overrides: Sequence[str], folder: Path) -> Turn:
    command = [sys.executable, "-m", "stages", "semi", str(path), *overrides, f"run.root={folder}"]
    with folder.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, text=True)
        _, status, usage = os.wait4(process.pid, 0)  # for its own peak: getrusage sums over all children
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        said = log.read()
    if process.returncode:
        raise PipelineError(
            f"{path} did not run: {said.strip().splitlines()[-1] if said.strip() else process.returncode}"
        )
    lines_ = (folder / "turn" / "semi" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines_) if "perf/step_seconds" in row][LEFT_OUT:]
    seconds = median(row["perf/step_seconds"] for row in rows)
    on_gpu = json.loads((folder / "turn" / "semi" / "environment.json").read_text()).get("gpus")
    return Turn(
        step_seconds=seconds,
        images_per_second=median(row["perf/images_per_second"] for row in rows),
        tflop_per_step=median(row["perf/tflops"] * row["perf/step_seconds"] for row in rows),
        peak_gib=max(row["perf/memory_gib"] for row in rows) if on_gpu else usage.ru_maxrss / 2**20,
    )


def _median(turns: Sequence[Turn]) -> Turn:
    return Turn(*(median(values) for values in zip(*turns, strict=True)))


def _row(name: str, config: SemiConfig, turns: Sequence[Turn]) -> list[str]:
    turn = _median(turns)
    assert config.data.split is not None
    unlabelled = len(read_split(config.data.split, read_manifest(config.data.train)).subset("unlabelled"))
    per_step = config.loop.global_batch * config.unlabelled_ratio
    card = json.loads((config.parents()["init_from"] / "model.json").read_text())
    return [
        name,
        card["model"]["name"],
        f"{1000 * turn.step_seconds:.1f}",
        f"{turn.images_per_second:.0f}",
        f"{unlabelled / per_step * turn.step_seconds:.1f} s",
        f"{turn.tflop_per_step:.4g}",
        f"{1000 * turn.tflop_per_step / (config.loop.global_batch + per_step):.4g}",
        f"{turn.peak_gib:.2f}",
    ]


def _ratio(name: str, first: Sequence[Turn], other: Sequence[Turn]) -> list[str]:
    a, b = _median(first), _median(other)
    time_, flops = b.step_seconds / a.step_seconds, b.tflop_per_step / a.tflop_per_step
    cells = [time_, b.images_per_second / a.images_per_second, None, flops, None, b.peak_gib / a.peak_gib]
    return [name, "", *("" if c is None else f"{c:.2f} ×" for c in cells)]


def fields(names: Sequence[str], data: Path, size: int, images: int, weights: dict[str, Path], out: Path) -> Path:
    """Receptive fields over images of a dataset; `weights`: name -> an export to look at instead of a fresh model."""
    import numpy as np
    import torch

    from pipeline.evaluate.receptive_field import for_display, receptive_field, side_of_share
    from pipeline.exports.export import load_export
    from pipeline.streaming.loader import evaluation_batches
    from pipeline.streaming.transforms import eval_views

    if images < 1:
        raise ConfigError(f"--images {images}: at least one is needed")
    manifest = read_manifest(data)
    chosen = np.unique(np.linspace(0, manifest.num_samples - 1, images).astype(int))
    rows: list[list[str]] = []
    pictures: list[Any] = []
    titles: list[str] = []
    for name in [*names, *weights]:
        began = time.monotonic()
        torch.manual_seed(0)
        if name in weights:
            model, card = load_export(weights[name])
            view_size, mean, std = card.model.image_size, card.preprocessing.mean, card.preprocessing.std
        else:
            model = build_model(name, image_size=size)
            view_size, mean, std = (size, size), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        model.requires_grad_(False)
        views = eval_views(view_size, mean=mean, std=std)
        batches = evaluation_batches(manifest, chosen, batch_size=4, rank=0, world_size=1, views=views)
        field = receptive_field(model, (b.images[b.indices >= 0] for b in batches))
        sides = [side_of_share(field, share) for share in (0.2, 0.5, 0.95)]
        rows.append([name, "export" if name in weights else "fresh", str(view_size[0]), *map(str, sides)])
        pictures.append(for_display(field))
        titles.append(name)
        print(
            f"{name}: {100 * sides[1] / view_size[0]:.0f} % of the side holds half ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    table = Table(
        name="fields",
        title="Effective receptive fields",
        header=["model", "weights", "pixels", "20 % in", "50 % in", "95 % in"],
        rows=rows,
        note="Sides, in pixels, of the smallest centred squares that hold a share of the field. Fresh weights show the "
        "architecture only.",
    )
    note = (
        f"Of the central pixel of the last map, mean over {len(chosen)} images; (gradient / largest) to the power 0.2."
    )
    size_ = (7.6, 7.6 / max(2, len(pictures)) + 0.2)
    figure = draw(out / "figures", "fields", "Effective receptive fields", picture_grid([pictures], [""], [titles]),
                  note=note, size=size_, wide=True)  # fmt: skip
    return write_section(out, Section("Receptive fields", [table], [figure]))
