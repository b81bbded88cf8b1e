"""Make datasets of images, verify and show them, and choose which of their samples are labelled."""

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cli import guarded
from pipeline.config import validate
from pipeline.datasets.config import SplitConfig
from pipeline.errors import ConfigError, DataError, EnvironmentProblem, PipelineError
from pipeline.storage.config import RemoteConfig

if TYPE_CHECKING:
    from pipeline.datasets.manifest import Manifest

# A path that a person gave cannot be read or written.
PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m pipeline.data` and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments, explain=_path_problem)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m pipeline.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="write images as shards with a manifest"))
    _add_verify(commands.add_parser("verify", help="check every hash and decode every image"))
    _add_check(
        commands.add_parser("check", help="look for duplicates, test images in training, thin classes, odd images")
    )
    _add_show(commands.add_parser("show", help="print counts, classes and imbalance; draw a contact sheet"))
    _add_split(commands.add_parser("split", help="choose labelled, unlabelled and validation samples"))
    args = parser.parse_args(arguments)
    args.run(args)
    return 0


def _path_problem(error: Exception) -> PipelineError | None:
    if not isinstance(error, OSError) or error.errno not in PATH_ERRORS or not error.filename:
        return None
    blocked = error.errno in (errno.EEXIST, errno.ENOTDIR)
    reason = "there is a file where a folder is needed" if blocked else os.strerror(error.errno)
    return EnvironmentProblem(
        f"{error.filename}: {reason}; give another path, or change what is there or its permissions"
    )


def _add_convert(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="KIND")

    def kind(
        name: str, run: Callable[[argparse.Namespace], None], text: str, source: str = ""
    ) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        if source:
            sub.add_argument("source", help=source)
        sub.add_argument("--out", type=Path, required=name != "tars", help="folder to write the dataset to")
        sub.add_argument("--processes", type=_count, default=os.cpu_count() or 1, help="default: one per CPU")
        if name != "tars":
            sub.add_argument("--seed", type=int, default=0, help="seed of the order of the samples (default 0)")
        if source and name != "tars":
            sub.add_argument(
                "--samples-per-shard", type=_count, default=2_000, help="images in one shard (default 2000)"
            )
            sub.add_argument(
                "--resize", type=_count, default=0, metavar="PIXELS", help="reduce larger images to this shorter side"
            )
        sub.set_defaults(run=run)
        return sub

    kind("digits", _convert_digits, "scikit-learn's scanned digits, into OUT/train and OUT/test")
    kind("letters", _convert_letters, "coloured letters on photographs, 26 classes, into OUT/train and OUT/test")
    kind("imagefolder", _convert_image_folder, "a folder of images per class", "folder that holds the class folders")
    imagenet = kind(
        "imagenet", _convert_imagenet, "ImageNet's layouts, into OUT/train and OUT/val", "folder with train/ and val/"
    )
    imagenet.add_argument(
        "--truth", type=Path, help="for a val/ without class folders: file of IMAGE WNID, WNID or class number per line"
    )
    imagenet.add_argument(
        "--synsets",
        type=Path,
        help="for a --truth of numbers: the kit's meta.mat, or a file of one WNID a line in its order",
    )
    parquet = kind(
        "parquet", _convert_parquet, "parquet files as from Hugging Face (needs pyarrow)", "folder of .parquet files"
    )
    parquet.add_argument("--image-column", default="image", help="default image")
    parquet.add_argument("--label-column", default="label", help="default label")
    tars = kind(
        "tars",
        _convert_tars,
        "a manifest for WebDataset tars, which stay as they are",
        "folder of tars; or, with --out for the manifest, a URL of tars such as https://HOST/{000000..000063}.tar,"
        " or the URL of a folder with a manifest",
    )
    tars.add_argument("--classes", type=Path, help="file of class names, one a line; without it classes are numbers")


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _say(manifest: "Manifest", existed: bool) -> None:
    state = "already there" if existed else "written"
    names = ", ".join(manifest.classes[:4]) + (", ..." if len(manifest.classes) > 4 else "")
    classes = f" of {len(manifest.classes)} classes ({names})" if manifest.classes else ""
    print(f"{manifest.folder}: {manifest.num_samples} samples{classes} in {len(manifest.shards)} shards, {state}")


def _convert_digits(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.digits import digits
    from pipeline.datasets.convert.writer import convert

    for name, source in zip(("train", "test"), digits(args.seed), strict=True):
        _say(*convert(source, args.out / name, seed=args.seed, samples_per_shard=256, processes=args.processes))


def _convert_letters(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.letters import letters
    from pipeline.datasets.convert.writer import convert

    for name, source in zip(("train", "test"), letters(args.seed), strict=True):
        _say(*convert(source, args.out / name, seed=args.seed, samples_per_shard=520, processes=args.processes))


def _options(args: argparse.Namespace) -> dict[str, int]:
    return {
        "seed": args.seed,
        "samples_per_shard": args.samples_per_shard,
        "shorter_side": args.resize,
        "processes": args.processes,
    }


def _convert_image_folder(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.imagefolder import image_folder
    from pipeline.datasets.convert.writer import convert

    _say(*convert(image_folder(Path(args.source)), args.out, **_options(args)))


def _convert_imagenet(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.imagefolder import image_folder
    from pipeline.datasets.convert.imagenet import imagenet_validation
    from pipeline.datasets.convert.writer import convert

    root = Path(args.source)
    train = image_folder(root / "train")
    val = root / "val"
    if val.is_dir() and not args.truth and not any(path.is_dir() for path in val.iterdir()):
        raise ConfigError(f"{val} has no class folders; give --truth FILE, the file that says the class of each image")
    _say(*convert(train, args.out / "train", **_options(args)))
    if val.is_dir():
        flat = args.truth is not None
        source = imagenet_validation(val, args.truth, args.synsets, train.classes) if flat else image_folder(val)
        _say(*convert(source, args.out / "val", **_options(args)))


def _convert_parquet(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.parquet import parquet_folder
    from pipeline.datasets.convert.writer import convert

    source = parquet_folder(Path(args.source), args.image_column, args.label_column)
    _say(*convert(source, args.out, **_options(args)))


def _convert_tars(args: argparse.Namespace) -> None:
    from pipeline.datasets.index import index_folder, index_remote

    names = args.classes.read_text().split("\n") if args.classes and args.classes.is_file() else None
    if args.classes and names is None:
        raise ConfigError(f"--classes {args.classes} does not exist; give a file of class names, one a line")
    classes = [name.strip() for name in names if name.strip()] if names else None
    if "://" not in args.source:
        if args.out and args.out != Path(args.source):
            raise ConfigError("the manifest of local tars is written beside them; leave out --out")
        _say(*index_folder(Path(args.source), classes, args.processes))
    elif not args.out:
        raise ConfigError("tars behind a URL need a folder for their manifest; give --out FOLDER")
    else:
        _say(*index_remote(args.source, args.out, classes, RemoteConfig(), args.processes))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="folder of the dataset")
    parser.add_argument("--processes", type=_count, default=os.cpu_count() or 1, help="default: one per CPU")
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    from pipeline.datasets.manifest import read_manifest
    from pipeline.datasets.verify import verify

    manifest = read_manifest(args.dataset)
    problems = list(verify(manifest, args.processes))
    if problems:
        head = f"{args.dataset}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise DataError("\n  ".join([head, *problems]))
    print(f"{args.dataset}: {manifest.num_samples} samples in {len(manifest.shards)} shards, no problems")


def _add_check(parser: argparse.ArgumentParser) -> None:
    from pipeline.datasets.check import command

    command.add_arguments(parser, _count)


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="folder of the dataset")
    parser.add_argument(
        "--split", type=Path, help="split file; describe its labelled, unlabelled and validation samples too"
    )
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet: a row of images per class")
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> None:
    import numpy as np

    from pipeline.datasets.manifest import read_manifest
    from pipeline.datasets.show import contact_sheet, describe
    from pipeline.datasets.splits import read_split

    manifest = read_manifest(args.dataset)
    everything = np.arange(manifest.num_samples)
    print(*describe(manifest, everything, str(args.dataset)), sep="\n")
    if args.split:
        split = read_split(args.split, manifest)
        print(f"\n{args.split}: {split.protocol}; sha256 {split.hash[:12]}")
        for name in ("labelled", "unlabelled", "validation"):
            print("", *describe(manifest, split.subset(name), name), sep="\n")
    if args.sheet:
        contact_sheet(manifest, everything, args.sheet)
        print(f"contact sheet: {args.sheet}")


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="folder of the dataset")
    parser.add_argument("--out", type=Path, required=True, help="split file to write, for example data/mine/split.json")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice (default 0)")
    for name, field in SplitConfig.model_fields.items():
        text = f"{field.description} (default {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=text)
    parser.set_defaults(run=_split)


def _split(args: argparse.Namespace) -> None:
    from pipeline.datasets.manifest import read_manifest
    from pipeline.datasets.splits import CODES, make_split, read_split, write_split

    given = {name: getattr(args, name) for name in SplitConfig.model_fields}
    config = validate(SplitConfig, given, "split")
    manifest = read_manifest(args.dataset)
    split, state = make_split(manifest, config, args.seed), "written"
    if not args.out.exists():
        write_split(split, args.out)
    elif read_split(args.out, manifest).hash == split.hash:
        state = "already there"
    else:
        raise DataError(f"{args.out} already holds a split by another protocol or seed; give another file as --out")
    counts = ", ".join(f"{len(split.subset(name))} {name}" for name in CODES)
    print(f"{args.out}: {counts}; {split.protocol}; sha256 {split.hash[:12]}, {state}")


if __name__ == "__main__":
    sys.exit(main())
