"""Make datasets of images, verify and show them, and choose which of their samples are labelled."""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import guarded
from pipeline.config import validate
from pipeline.datasets.config import SplitConfig, add_opening, opening_of
from pipeline.datasets.convert.command import add_convert, count
from pipeline.datasets.text import shown
from pipeline.decoding import Decoding
from pipeline.errors import DataError, EnvironmentProblem, PipelineError

# A path that a person gave cannot be read or written.
PATH_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT),
    *(errno.ELOOP, errno.EFBIG, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m pipeline.data` and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments, explain=_path_problem)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m pipeline.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_convert(commands.add_parser("convert", help="write images as shards with a manifest"))
    _add_verify(commands.add_parser("verify", help="check every hash and decode every image"))
    _add_check(
        commands.add_parser("check", help="look for duplicates, test images in training, thin classes, odd images")
    )
    _add_show(commands.add_parser("show", help="print counts, classes and imbalance; draw a contact sheet"))
    _add_split(commands.add_parser("split", help="choose labelled, unlabelled and validation samples"))
    _add_label_next(commands.add_parser("label-next", help="find the images worth labelling next; add their labels"))
    args = parser.parse_args(arguments)
    args.run(args)
    return 0


def _path_problem(error: Exception) -> PipelineError | None:
    if not isinstance(error, OSError) or error.errno not in PATH_ERRORS or not error.filename:
        return None
    blocked = error.errno in (errno.EEXIST, errno.ENOTDIR)
    reason = "there is a file where a folder is needed" if blocked else os.strerror(error.errno)
    return EnvironmentProblem(
        f"{shown(str(error.filename))}: {reason}; give another path, or change what is there or its permissions"
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="folder of the dataset")
    parser.add_argument("--processes", type=count, default=os.cpu_count() or 1, help="default: one per CPU")
    add_opening(parser)
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    from pipeline.datasets.opening import open_dataset
    from pipeline.datasets.verify import verify

    opening = opening_of(args)
    manifest = open_dataset(args.dataset, opening)
    problems = list(verify(manifest, args.processes, Decoding(max_pixels=opening.max_pixels)))
    if problems:
        head = f"{args.dataset}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DataError("\n  ".join([head, *problems]))
    print(f"{args.dataset}: {manifest.num_samples} samples in {len(manifest.shards)} shards, no problems")


def _add_check(parser: argparse.ArgumentParser) -> None:
    from pipeline.datasets.check import command

    command.add_arguments(parser, count)


def _add_label_next(parser: argparse.ArgumentParser) -> None:
    from pipeline import labelling

    labelling.add_arguments(parser, count)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, nargs="+", help="folder of the dataset, or of several as one")
    parser.add_argument(
        "--split", type=Path, help="split file; describe its labelled, unlabelled and validation samples too"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet: a row of images per class")
    add_opening(parser)
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> None:
    import numpy as np

    from pipeline.datasets.joint import read_manifests
    from pipeline.datasets.show import contact_sheet, describe
    from pipeline.datasets.splits import read_split

    manifest = read_manifests(args.dataset, opening_of(args))
    everything = np.arange(manifest.num_samples)
    print(*describe(manifest, everything, str(manifest)), sep="\n")
    if args.split:
        split = read_split(args.split, manifest)
        print(f"\n{args.split}: {split.protocol}; sha256 {split.hash[:12]}")
        for name in ("labelled", "unlabelled", "validation"):
            print("", *describe(manifest, split.subset(name), name), sep="\n")
    if args.sheet:
        contact_sheet(manifest, everything, args.sheet)
        print(f"contact sheet: {args.sheet}")


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "dataset", type=Path, nargs="+", help="folder of the dataset, or of several that data.train lists in this order"
    )
    parser.add_argument("--out", type=Path, required=True, help="split file to write, for example data/mine/split.json")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default 0)")
    for name, field in SplitConfig.model_fields.items():
        text = f"{field.description} (default {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=text)
    parser.add_argument(
        "--folds",
        type=count,
        default=0,
        metavar="K",
        help="write K more splits beside the one of all labels, each of which holds another K-th of the labels out;"
        " `python -m studies.folds` trains on them (cross-validation)",
    )
    add_opening(parser)
    parser.set_defaults(run=_split)


def _split(args: argparse.Namespace) -> None:
    from pipeline.datasets.folds import advice, fold_path, make_folds
    from pipeline.datasets.joint import read_manifests
    from pipeline.datasets.splits import CODES, make_split, read_split, write_split

    given = {name: getattr(args, name) for name in SplitConfig.model_fields}
    config = validate(SplitConfig, given, "split")
    manifest = read_manifests(args.dataset, opening_of(args))
    split = make_split(manifest, config, args.seed)
    folds = make_folds(split, manifest, args.folds, args.seed) if args.folds else []
    paths = [args.out, *(fold_path(args.out, k + 1, len(folds)) for k in range(len(folds)))]
    for path, made in zip(paths, [split, *folds], strict=True):
        state = "already there"
        if not path.exists():
            write_split(made, path)
            state = "written"
        elif read_split(path, manifest).hash != made.hash:
            raise DataError(f"{path} already holds a split by another protocol or seed; give another file as --out")
        counts = ", ".join(f"{len(made.subset(name))} {name}" for name in CODES)
        print(f"{path}: {counts}; {made.protocol}; sha256 {made.hash[:12]}, {state}")
    if not folds and (sentence := advice(split)):
        print(sentence)


if __name__ == "__main__":
    sys.exit(main())
