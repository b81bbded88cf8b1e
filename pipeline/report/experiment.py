"""The report of experiments: what their folders say (`pipeline.report`), and where their exports look (`pipeline.evaluate`).

The pictures show held-out images: the test set, or the validation subset if there is no test set. They are Grad-CAM of the
models of the first experiment on the same images (the supplement's Figure 1), and the models' receptive fields. They are
made anew for each report, in seconds.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.datasets.joint import with_classes
from pipeline.datasets.manifest import Manifest
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.exports.card import CARD
from pipeline.report.ablation import Comparison, NotPaired, designs_of
from pipeline.report.extras import read_section
from pipeline.report.images_of import images_of
from pipeline.report.page import LabelNext, Panel, write_report
from pipeline.report.results import ROWS, Result, read_result

logger = logging.getLogger(__name__)

NUM_PICTURES, ACROSS = 8, 4  # pictures of Grad-CAM, and how many of them are side by side
NUM_FIELD_IMAGES = 32
NUM_PICKS, MAX_POOL = 24, 2_000  # images to label next, and the unlabelled images that they are chosen from


def run(experiments: Sequence[Path], out: Path | None, extras: Sequence[Path] = ()) -> Path:
    """Write the report of experiments.

    Args:
        experiments: Folders of experiments.
        out: The page; None = report.html in the first experiment's folder.
        extras: Folders of `extras.write_section`; each becomes a section.

    Returns:
        The page.

    Raises:
        ConfigError: If `out` does not end in .html.
        DataError: If a folder is not an experiment, or not a section.
    """
    if out is not None and out.suffix != ".html":
        raise ConfigError(f"--out {out}: the report is an HTML page; give a name that ends in .html")
    from pipeline.report.worth import measure

    results = [read_result(e) for e in experiments]
    measured = [read_section(folder) for folder in extras]
    try:
        panels = _panels(results[0])
    except (PipelineError, RuntimeError, IndexError) as error:  # the numbers are worth a page without pictures
        logger.warning("the report has no pictures of where the models look: %s", error)
        panels = []
    worth = measure(designs_of(results)[0].results)
    return write_report(
        experiments,
        out or experiments[0] / "report.html",
        panels=panels,
        compare=compare,
        extras=measured,
        worth=worth,
        label_next=_label_next(results[0]),
    )


def _label_next(result: Result) -> LabelNext | None:
    """Choose unlabelled images worth labelling; None if there are none, or no classifier, or they cannot be read."""
    from pipeline.evaluate.baselines import evenly
    from pipeline.evaluate.label_next import contact_sheet, rank_images, table_text

    exports = [result.experiment / stage / "export" for stage in ("semi", "distill")]
    export = next((folder for folder in exports if (folder / CARD).is_file()), None)
    if export is None:
        return None
    try:
        images = images_of(result)
        pool = evenly(images.unlabelled, np.zeros(len(images.unlabelled), np.int64), MAX_POOL)
        picks = rank_images(export, images.train, pool, NUM_PICKS)
        sheet = contact_sheet(picks, images.train)
    except (PipelineError, RuntimeError, OSError) as error:
        logger.warning("the report names no images to label next: %s", error)
        return None
    return LabelNext(sheet, table_text(picks), len(picks), len(images.unlabelled)) if picks else None


def compare(first: Sequence[Result], other: Sequence[Result], row: str) -> Comparison:
    """Compute the gains of one design over another by a paired bootstrap, over the seeds that both have.

    Args:
        first: Experiments of the first design.
        other: Experiments of the other design.
        row: Row of the table, a key of `ROWS`.

    Raises:
        NotPaired: If no seed can be paired.
    """
    from pipeline.evaluate.bootstrap import paired
    from pipeline.evaluate.predictions import Predictions

    stage, model = ROWS[row]
    file = f"predictions-{model}.npz"
    have, others = (_by_seed(results, stage, file) for results in (first, other))
    seeds = sorted(have.keys() & others.keys())
    if not seeds:
        raise NotPaired(
            f"no seed has predictions of {row} in both designs (first: {_listed(have)}; this one: {_listed(others)})"
        )
    pairs = [(have[seed], others[seed]) for seed in seeds]
    if any(len({r.stages[stage].evaluation.get("dataset") for r in pair}) > 1 for pair in pairs):
        raise NotPaired("evaluated on another dataset than the first design")
    report = pairs[0][0].models[row]
    names = list(report["per_class"])
    groups = {g: np.array([names.index(n) for n in members], int) for g, members in report.get("groups", {}).items()}
    try:
        a, b = ([Predictions.load(p[k].experiment / stage / file, len(names)) for p in pairs] for k in (0, 1))
        found = paired(a, b, len(names), groups)
    except DataError as error:
        raise NotPaired(str(error)) from None
    except ValueError:
        raise NotPaired(
            "evaluated on other images of the dataset than the first design (its validation subset differs)"
        ) from None
    return Comparison({name: (d.value, d.low, d.high, d.p) for name, d in found.items()}, seeds)


def _by_seed(results: Sequence[Result], stage: str, file: str) -> dict[int, Result]:
    """Return the evaluated experiments by seed; the first one, if several have the same seed."""
    evaluated = [r for r in results if stage in r.stages and r.stages[stage].evaluation]
    return {r.seed(stage): r for r in reversed(evaluated) if (r.experiment / stage / file).is_file()}


def _listed(found: Mapping[int, Result]) -> str:
    return ", ".join(map(str, sorted(found))) or "none"


def _panels(result: Result) -> list[Panel]:
    """Draw the exported classifiers on held-out images; no panels if there are no exports or no images."""
    exports = {
        name: result.experiment / stage / "export"
        for name, stage in (("stage 2", "distill"), ("stage 3", "semi"))
        if (result.experiment / stage / "export" / CARD).is_file()
    }
    if not exports:
        return []
    manifest, held_out = images_of(result).test
    return _draw_panels(exports, manifest, held_out) if len(held_out) else []


def _draw_panels(exports: Mapping[str, Path], manifest: Manifest, sample_indices: np.ndarray) -> list[Panel]:
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
    pictures: list[list[Any]] = []
    titles: list[list[str]] = []
    fields: list[Any] = []
    sides: list[str] = []
    for folder in exports.values():
        model, card = load_export(folder)
        manifest = with_classes(manifest, card.classes)
        views = eval_views(
            card.model.image_size,
            mean=card.preprocessing.mean,
            std=card.preprocessing.std,
            view=card.preprocessing.view,
            decoding=card.preprocessing.decoding,
        )
        batches = evaluation_batches(manifest, chosen, batch_size=len(chosen), rank=0, world_size=1, views=views)
        batch = next(iter(batches))
        images, labels = batch.images[shown], batch.labels[shown]
        if not pictures:
            pictures.append(_pictures(to_pixels(images, card.preprocessing.mean, card.preprocessing.std)))
            titles.append([card.classes[c] for c in labels.tolist()])
        maps, predicted = gradcam(model, images)
        pictures.append(_pictures(overlay(images, maps, card.preprocessing.mean, card.preprocessing.std)))
        pairs = zip(predicted.tolist(), labels.tolist(), strict=True)
        titles.append([card.classes[p] + (" ✓" if p == t else " ✗") for p, t in pairs])
        field = receptive_field(model, [batch.images])
        fields.append(for_display(field))
        sides.append(", ".join(f"{100 * s:.0f} % in {side_of_share(field, s)} px" for s in (0.5, 0.95)))
    blocks = [slice(k, k + ACROSS) for k in range(0, len(shown), ACROSS)]  # so few side by side fit a narrow screen
    lines = list(zip(["image", *exports], pictures, titles, strict=True))
    rows = [(name, row[block], words[block]) for block in blocks for name, row, words in lines]
    gradcam_panel = Panel(
        "gradcam",
        "Grad-CAM",
        "Held-out images with their true classes; below each, the class that each model predicts, and where the evidence for"
        " it is (yellow = strong).",
        picture_grid([row for _, row, _ in rows], [name for name, _, _ in rows], [words for _, _, words in rows]),
        (1.25 * min(ACROSS, len(shown)) + 0.3, 1.4 * len(rows)),
    )
    field_panel = Panel(
        "receptive_field",
        "Effective receptive fields",
        f"Gradient of the central output with respect to the pixels, averaged over {len(chosen)} held-out images and drawn "
        "as (gradient / largest gradient) to the power 0.2. The text gives the sides of the centred squares that hold 50 % "
        "and 95 % of it.",
        picture_grid([fields], [""], [[f"{name}\n{side}" for name, side in zip(exports, sides, strict=True)]]),
        (5.2, 5.8 / max(2, len(fields))),
    )
    return [gradcam_panel, field_panel]


def _pictures(pixels: Any) -> list[Any]:
    """Split pixels (n, 3, H, W) into n arrays (H, W, 3)."""
    return list(pixels.permute(0, 2, 3, 1).numpy())
