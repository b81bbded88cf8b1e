"""The report of experiments: what their folders say (`pipeline.report`), and what their exports see (`pipeline.evaluate`).

Pictures are of held-out images (the test set, or for want of one the validation part): Grad-CAM of two models of the first
experiment side by side on the same images (the supplement's Figure 1), and their receptive fields. They are made anew each
time, in seconds.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.datasets.manifest import Manifest, read_manifest
from pipeline.datasets.splits import read_split
from pipeline.errors import ConfigError, PipelineError
from pipeline.exports.card import CARD
from pipeline.report.ablation import Comparison, NotPaired
from pipeline.report.extras import read_section
from pipeline.report.page import Panel, write_report
from pipeline.report.results import ROWS, Result, read_result

logger = logging.getLogger(__name__)

NUM_PICTURES = 8
NUM_FIELD_IMAGES = 32


def run(experiments: Sequence[Path], out: Path | None, extras: Sequence[Path] = ()) -> Path:
    """Write the report of `experiments` at `out` (default: report.html in the first one's folder); where it is.

    `extras`: folders of `extras.write_section`.
    """
    if out is not None and out.suffix != ".html":
        raise ConfigError(f"--out {out}: the report is a page; give a name that ends in .html")
    results = [read_result(e) for e in experiments]
    measured = [read_section(folder) for folder in extras]
    try:
        panels = _panels(results[0])
    except (PipelineError, RuntimeError, IndexError) as error:  # the numbers are worth a page without pictures
        logger.warning("no pictures of what the model looks at: %s", error)
        panels = []
    return write_report(
        experiments, out or experiments[0] / "report.html", panels=panels, compare=compare, extras=measured
    )


def compare(first: Sequence[Result], other: Sequence[Result], row: str) -> Comparison:
    """Paired bootstrap of a model of two designs over the seeds that both have. Raises NotPaired if none can be paired."""

    from pipeline.evaluate.bootstrap import paired
    from pipeline.evaluate.predictions import Predictions

    stage, model = ROWS[row]
    have, others = (_by_seed(results, stage, f"answers-{model}.npz") for results in (first, other))
    seeds = sorted(have.keys() & others.keys())
    if not seeds:
        raise NotPaired(f"no seed has answers of {row} in both (first: {_listed(have)}; this one: {_listed(others)})")
    pairs = [(have[seed], others[seed]) for seed in seeds]
    if any(len({r.stages[stage].evaluation["dataset"] for r in pair}) > 1 for pair in pairs):
        raise NotPaired("judged on another set of images than the first")
    report = pairs[0][0].models[row]
    names = list(report["per_class"])
    groups = {g: np.array([names.index(n) for n in members], int) for g, members in report["groups"].items()}
    a, b = ([Predictions.load(p[k].experiment / stage / f"answers-{model}.npz") for p in pairs] for k in (0, 1))
    try:
        found = paired(a, b, len(names), groups)
    except ValueError:
        raise NotPaired("judged on other images of the set than the first (its validation part is another)") from None
    return Comparison({name: (d.value, d.low, d.high, d.p) for name, d in found.items()}, seeds)


def _by_seed(results: Sequence[Result], stage: str, answers: str) -> dict[int, Result]:
    """Those that were judged; of several with one seed the first."""
    judged = [r for r in results if stage in r.stages and r.stages[stage].evaluation]
    return {r.seed(stage): r for r in reversed(judged) if (r.experiment / stage / answers).is_file()}


def _listed(found: dict[int, Result]) -> str:
    return ", ".join(map(str, sorted(found))) or "none"


def _panels(result: Result) -> list[Panel]:
    """Of the classifiers that the experiment has exported, on its test set, or for want of one on its validation part."""
    exports = {
        name: result.experiment / stage / "export"
        for name, stage in (("stage 2", "distill"), ("stage 3", "semi"))
        if (result.experiment / stage / "export" / CARD).is_file()
    }
    configs = [run.config["data"] for run in result.stages.values() if run.config.get("data")]
    given = next((data for data in configs if data.get("test")), next((d for d in configs if d.get("split")), None))
    if not exports or given is None or not Path(given["test"] or given["train"]).is_dir():
        return []
    manifest = read_manifest(Path(given["test"] or given["train"]))
    if given["test"]:
        return _look(exports, manifest, np.arange(manifest.num_samples))
    held_out = read_split(Path(given["split"]), manifest).subset("validation")
    return _look(exports, manifest, held_out) if len(held_out) else []


def _look(exports: dict[str, Path], manifest: Manifest, sample_indices: np.ndarray) -> list[Panel]:

    from pipeline.evaluate.gradcam import gradcam, overlay
    from pipeline.evaluate.receptive_field import for_display, receptive_field, side_of_share
    from pipeline.exports.export import load_export
    from pipeline.report.figures import picture_grid
    from pipeline.report.pictures import to_pixels
    from pipeline.streaming.loader import evaluation_batches
    from pipeline.streaming.transforms import eval_views

    by_class = sample_indices[np.argsort(manifest.labels[sample_indices], kind="stable")]
    chosen = np.unique(by_class[np.linspace(0, len(by_class) - 1, NUM_FIELD_IMAGES).astype(int)])
    shown = np.linspace(0, len(chosen) - 1, min(NUM_PICTURES, len(chosen))).astype(int)
    seen: list[list[Any]] = []
    titles: list[list[str]] = []
    fields: list[Any] = []
    sides: list[str] = []
    for folder in exports.values():
        model, card = load_export(folder)
        views = eval_views(card.model.image_size, mean=card.preprocessing.mean, std=card.preprocessing.std)
        batches = evaluation_batches(manifest, chosen, batch_size=len(chosen), rank=0, world_size=1, views=views)
        batch = next(iter(batches))
        images, labels = batch.images[shown], batch.labels[shown]
        if not seen:
            seen.append(_pictures(to_pixels(images, card.preprocessing.mean, card.preprocessing.std)))
            titles.append([card.classes[c] for c in labels.tolist()])
        maps, answers = gradcam(model, images)
        seen.append(_pictures(overlay(images, maps, card.preprocessing.mean, card.preprocessing.std)))
        right = zip(answers.tolist(), labels.tolist(), strict=True)
        titles.append([card.classes[a] + (" ✓" if a == t else " ✗") for a, t in right])
        field = receptive_field(model, [batch.images])
        fields.append(for_display(field))
        sides.append(", ".join(f"{100 * s:.0f} % in {side_of_share(field, s)} px" for s in (0.5, 0.95)))
    width = len(shown)
    cam = Panel(
        "gradcam",
        "Where two models look (Grad-CAM)",
        "Held-out images with their class, and under them what each model answers and where its evidence is: yellow is most.",
        picture_grid(seen, ["image", *exports], titles),
        (0.95 * width + 0.3, 1.1 * len(seen)),
    )
    erf = Panel(
        "erf",
        "Effective receptive fields",
        f"Of the central output pixel, over {len(chosen)} held-out images; (gradient / largest) to the power 0.2. In words: the "
        "centred squares that hold half and 95 % of it.",
        picture_grid([fields], [""], [[f"{name}: {side}" for name, side in zip(exports, sides, strict=True)]]),
        (7.6, 7.6 / max(2, len(fields)) * 0.9),
    )
    return [cam, erf]


def _pictures(pixels: Any) -> list[Any]:
    """(n, 3, H, W) -> n arrays (H, W, 3)."""
    return list(pixels.permute(0, 2, 3, 1).numpy())
