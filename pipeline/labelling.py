"""The command `python -m pipeline.data label-next`: which images to label next, and the dataset with their labels."""

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError

EXPLAINED = """\
Round by round:
  1. python -m pipeline.data label-next runs/mine --number 50
     writes a table and a contact sheet of the images that the model of runs/mine is most unsure of, and that differ.
  2. Write the name of a class into the column `label` of the table, for as many rows as you like.
  3. python -m pipeline.data label-next runs/mine --labels runs/mine/label-next/label-next.csv --to data/mine-2
     writes a dataset with these labels and its split, and prints the command of the next round.
"""


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Give a parser the arguments of the command; `count` reads a positive whole number."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = EXPLAINED
    parser.add_argument("experiment", type=Path, metavar="RUNS/EXPERIMENT", help="folder of an experiment")
    parser.add_argument("--number", type=count, default=50, help="how many images (default 50)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="folder to write (default: label-next in the experiment)"
    )
    parser.add_argument("--labels", type=Path, metavar="CSV", help="the table with labels filled in")
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="with --labels: the dataset to write")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from pipeline.report.images_of import images_of
    from pipeline.report.results import read_result

    if (args.labels is None) != (args.to is None):
        raise ConfigError("--labels and --to belong together: the table filled in, and the dataset to write")
    result = read_result(args.experiment)
    images = images_of(result)
    if args.labels is not None:
        _apply(args, images.train, images.config)
        return
    from pipeline.evaluate.label_next import rank_images, write_picks

    export = exported(args.experiment)
    if not len(images.unlabelled):
        raise DataError(
            f"{args.experiment} learnt from no unlabelled image, so there is none to label; add some to its data"
        )
    picks = rank_images(export, images.train, images.unlabelled, args.number)
    table, sheet = write_picks(picks, images.train, args.out or args.experiment / "label-next")
    print(f"{len(picks)} of {len(images.unlabelled):,} unlabelled images, by the model of {export}")
    print(f"contact sheet: {sheet}")
    print(f"table: {table}; write classes into its column `label`, then")
    here = shlex.join(["python", "-m", "pipeline.data", "label-next", str(args.experiment), "--labels", str(table)])
    print(f"  {here} --to NEW_DATASET")


def exported(experiment: Path) -> Path:
    """Return the export of the last stage that made a classifier.

    Raises:
        DataError: There is none.
    """
    from pipeline.exports.card import CARD

    for stage in ("semi", "distill"):
        if (experiment / stage / "export" / CARD).is_file():
            return experiment / stage / "export"
    raise DataError(f"{experiment} has no classifier's export yet; train stage 2 first")


def _apply(args: argparse.Namespace, manifest: Any, config: Any) -> None:
    from pipeline.datasets.added_labels import read_labels, with_labels
    from pipeline.datasets.splits import read_split

    added = read_labels(args.labels, manifest)
    split = read_split(Path(config["split"]), manifest) if config.get("split") else None
    written, more = with_labels(manifest, split, added, args.to)
    labelled = len(more.subset("labelled")) if more else int((written.labels >= 0).sum())
    print(f"{args.to}: {len(added)} labels added, {labelled} images are labelled now")
    told = f"data.train={args.to}" + (f" data.split={args.to / 'split.json'}" if more else "")
    names = args.experiment.name, args.experiment.name.removesuffix("-next")
    configs = (
        name for name in names for stage in ("distill", "semi") if Path("configs", stage, f"{name}.yaml").is_file()
    )
    name = next(configs, "NAME")
    print(f"next round: give the same configs {told} run.experiment={args.experiment.name}-next, for example")
    print(f'  make chain NAME={name} ARGS="{told} run.experiment={args.experiment.name}-next"')
