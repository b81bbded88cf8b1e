"""Draw effective receptive fields (EfficientViM's Figure C): python -m pipeline.report.fields MODEL... --data DATA.

A MODEL is one of our names or timm/NAME, with fresh weights, or NAME=EXPORT, with the weights of an export. The command
writes a table and a figure into a folder that `python -m pipeline.report ... --with FOLDER` takes in.
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.cli import guarded
from pipeline.datasets.opening import open_dataset
from pipeline.decoding import DEFAULT
from pipeline.errors import ConfigError
from pipeline.evaluation_view import USUAL
from pipeline.exports.card import IMAGENET
from pipeline.report.extras import Section, show_section, write_section
from pipeline.report.figures import draw, picture_grid
from pipeline.report.tables import Table

BATCH = 4  # images at a time; the field does not depend on it
SHARES = (0.2, 0.5, 0.95)


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.report.fields",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="+", metavar="MODEL | NAME=EXPORT")
    parser.add_argument("--data", type=Path, required=True, help="folder with a manifest")
    parser.add_argument("--size", type=int, default=224, help="pixels a side, for models without an export")
    parser.add_argument("--images", type=int, default=16, help="images to average over")
    parser.add_argument("--out", type=Path, default=Path("runs/fields"))
    given = parser.parse_args(arguments)
    exports = {name: Path(folder) for name, _, folder in (word.partition("=") for word in given.models) if folder}
    names = [word for word in given.models if "=" not in word]
    print(show_section(write_fields(names, exports, given.data, given.size, given.images, given.out)))
    return 0


def write_fields(
    names: Sequence[str], exports: Mapping[str, Path], data: Path, size: int, images: int, out: Path
) -> Path:
    """Measure receptive fields over images of a dataset and write them as a section.

    Args:
        names: Models to build with fresh weights.
        exports: Name -> folder of an export.
        data: Folder with a manifest.
        size: Pixels a side, for the models of `names`; an export has its own size.
        images: Number of images, spread evenly over the dataset.
        out: The section's folder.

    Returns:
        `out`.

    Raises:
        ConfigError: If `images` is below 1.
    """
    import numpy as np
    import torch

    from pipeline.evaluate.receptive_field import for_display, receptive_field, side_of_share
    from pipeline.exports.export import load_export
    from pipeline.models import build_model
    from pipeline.streaming.loader import evaluation_batches
    from pipeline.streaming.transforms import eval_views

    if images < 1:
        raise ConfigError(f"--images {images}: give at least 1")
    manifest = open_dataset(data)
    chosen = np.unique(np.linspace(0, manifest.num_samples - 1, images).astype(int))
    rows: list[list[str]] = []
    pictures: list[Any] = []
    titles: list[str] = []
    for name in [*names, *exports]:
        began = time.monotonic()
        torch.manual_seed(0)
        if name in exports:
            model, card = load_export(exports[name])
            view_size, mean, std = card.model.image_size, card.preprocessing.mean, card.preprocessing.std
            decoding, cut = card.preprocessing.decoding, card.preprocessing.view
        else:
            model = build_model(name, image_size=size)
            view_size, mean, std, decoding, cut = (size, size), IMAGENET.mean, IMAGENET.std, DEFAULT, USUAL
        model.requires_grad_(False)
        views = eval_views(view_size, mean=mean, std=std, view=cut, decoding=decoding)
        batches = evaluation_batches(manifest, chosen, batch_size=BATCH, rank=0, world_size=1, views=views)
        field = receptive_field(model, (b.images[b.indices >= 0] for b in batches))
        sides = [side_of_share(field, share) for share in SHARES]
        rows.append([name, "export" if name in exports else "fresh", str(view_size[0]), *map(str, sides)])
        pictures.append(for_display(field))
        titles.append(name)
        percent = 100 * sides[1] / view_size[0]
        print(
            f"{name}: half of the field lies in {percent:.0f} % of the side ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
    table = Table(
        name="fields",
        title="Effective receptive fields",
        header=["model", "weights", "pixels", *(f"{100 * share:.0f} % in" for share in SHARES)],
        rows=rows,
        note="Side, in pixels, of the smallest centred square that holds each share of the field. Fresh weights show the "
        "architecture only.",
    )
    figure = draw(
        out / "figures",
        "fields",
        "Effective receptive fields",
        picture_grid([pictures], [""], [titles]),
        note=f"Gradient of the central pixel of the last map, averaged over {len(chosen)} images and drawn as "
        "(gradient / largest gradient) to the power 0.2.",
        size=(7.6, 7.6 / max(2, len(pictures)) + 0.2),
        wide=True,
    )
    return write_section(out, Section("Receptive fields", [table], [figure]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
