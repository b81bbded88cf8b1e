"""Datasets: convert images to shards, verify and show them, and split them into labelled and unlabelled parts."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import validate
from pipeline.datasets.config import SplitConfig
from pipeline.errors import ConfigError, DataError, PipelineError
from pipeline.storage.config import RemoteConfig

if TYPE_CHECKING:
    from pipeline.datasets.manifest import Manifest

PARTS = ("labelled", "unlabelled", "validation", "unused")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; what a person can cause ends in one sentence."""
    parser = argparse.ArgumentParser("python -m pipeline.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="images to shards and a manifest"))
    _add_verify(commands.add_parser("verify", help="check every hash and decode every image"))
    _add_show(commands.add_parser("show", help="counts, class histogram, imbalance, contact sheet"))
    _add_split(commands.add_parser("split", help="choose labelled, unlabelled and validation samples"))
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(required=True, metavar="KIND")

    def kind(name: str, run: object, text: str, source: str = "") -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        if source:
            sub.add_argument("source", help=source)
        sub.add_argument("--out", type=Path, required=name != "tars", help="folder of the dataset")
        sub.add_argument("--processes", type=_count, default=os.cpu_count() or 1)
        if name != "tars":
            sub.add_argument("--seed", type=int, default=0, help="of the shuffle over the shards (default 0)")
        if source and name != "tars":
            sub.add_argument("--samples-per-shard", type=_count, default=2_000, help="default 2000")
            sub.add_argument("--resize", type=_count, default=0, metavar="PIXELS", help="reduce the shorter side")
        sub.set_defaults(run=run)
        return sub

    kind("digits", _convert_digits, "scikit-learn's scanned digits, into OUT/train and OUT/test")
    kind(
        "letters", _convert_letters, "coloured letters rendered on photographs, 26 classes, into OUT/train and OUT/test"
    )
    kind("imagefolder", _convert_image_folder, "a folder per class", "the folder that holds the class folders")
    imagenet = kind(
        "imagenet", _convert_imagenet, "ImageNet's layouts, into OUT/train and OUT/val", "folder with train/ and val/"
    )
    imagenet.add_argument("--truth", type=Path, help="classes of a flat val/: IMAGE WNID, WNID or number a line")
    imagenet.add_argument("--synsets", type=Path, help="for numbers: the kit's meta.mat, or a WNID a line in its order")
    parquet = kind("parquet", _convert_parquet, "a Hugging Face folder (needs pyarrow)", "folder of .parquet files")
    parquet.add_argument("--image-column", default="image")
    parquet.add_argument("--label-column", default="label")
    tars = kind(
        "tars",
        _convert_tars,
        "index WebDataset tars, which stay as they are",
        "folder of tars; or, with --out for the manifest, a URL with {000000..000063} or of a folder with a manifest",
    )
    tars.add_argument("--classes", type=Path, help="class names, one a line; without it they are numbers")


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _say(manifest: "Manifest", existed: bool) -> None:
    state = "already there" if existed else "written"
    names = ", ".join(manifest.classes[:4]) + (", ..." if len(manifest.classes) > 4 else "")
    classes = f" of {len(manifest.classes)} classes ({names})" if manifest.classes else ""
    print(f"{manifest.folder}: {manifest.num_samples} samples{classes} in {len(manifest.shards)} shards, {state}")


def _convert_digits(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.sources import digits
    from pipeline.datasets.convert.writer import convert

    for part, source in zip(("train", "test"), digits(args.seed), strict=True):
        _say(*convert(source, args.out / part, seed=args.seed, samples_per_shard=256, processes=args.processes))


def _convert_letters(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.letters import letters
    from pipeline.datasets.convert.writer import convert

    for part, source in zip(("train", "test"), letters(args.seed), strict=True):
        _say(*convert(source, args.out / part, seed=args.seed, samples_per_shard=520, processes=args.processes))


def _options(args: argparse.Namespace) -> dict[str, int]:
    return {
        "seed": args.seed,
        "samples_per_shard": args.samples_per_shard,
        "shorter_side": args.resize,
        "processes": args.processes,
    }


def _convert_image_folder(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.sources import image_folder
    from pipeline.datasets.convert.writer import convert

    _say(*convert(image_folder(Path(args.source)), args.out, **_options(args)))


def _convert_imagenet(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.imagenet import imagenet_validation
    from pipeline.datasets.convert.sources import image_folder
    from pipeline.datasets.convert.writer import convert

    root = Path(args.source)
    train = image_folder(root / "train")
    val = root / "val"
    if val.is_dir() and not args.truth and not any(path.is_dir() for path in val.iterdir()):
        raise ConfigError(f"{val} has no class folders; give --truth with the file that says the class of each image")
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
        raise ConfigError(f"--classes {args.classes} does not exist")
    classes = [name.strip() for name in names if name.strip()] if names else None
    if "://" not in args.source:
        if args.out and args.out != Path(args.source):
            raise ConfigError("the manifest of local tars lies beside them; leave out --out")
        _say(*index_folder(Path(args.source), classes, args.processes))
    elif not args.out:
        raise ConfigError("tars behind a URL need --out, the folder for their manifest")
    else:
        _say(*index_remote(args.source, args.out, classes, RemoteConfig(), args.processes))


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="a folder with a manifest")
    parser.add_argument("--processes", type=_count, default=os.cpu_count() or 1)
    parser.set_defaults(run=_verify)


def _verify(args: argparse.Namespace) -> None:
    from pipeline.datasets.manifest import read_manifest
    from pipeline.datasets.verify import verify

    manifest = read_manifest(args.dataset)
    problems = list(verify(manifest, args.processes))
    if problems:
        raise DataError("\n  ".join([f"{args.dataset}: {len(problems)} problems", *problems]))
    print(f"{args.dataset}: {manifest.num_samples} samples in {len(manifest.shards)} shards, all as they should be")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="a folder with a manifest")
    parser.add_argument("--split", type=Path, help="show its parts as well")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet")
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
        for part in PARTS[:3]:
            print("", *describe(manifest, split.subset(part), part), sep="\n")
    if args.sheet:
        contact_sheet(manifest, everything, args.sheet)
        print(f"contact sheet: {args.sheet}")


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="a folder with a manifest")
    parser.add_argument("--out", type=Path, required=True, help="the split file")
    parser.add_argument("--seed", type=int, default=0)
    for name, field in SplitConfig.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=f"default {field.default!r}")
    parser.set_defaults(run=_split)


def _split(args: argparse.Namespace) -> None:
    from pipeline.datasets.manifest import read_manifest
    from pipeline.datasets.splits import make_split, read_split, write_split

    given = {name: getattr(args, name) for name in SplitConfig.model_fields}
    config = validate(SplitConfig, given, "split")
    manifest = read_manifest(args.dataset)
    split, state = make_split(manifest, config, args.seed), "written"
    if not args.out.exists():
        write_split(split, args.out)
    elif read_split(args.out, manifest).hash == split.hash:
        state = "already there"
    else:
        raise DataError(f"{args.out} already holds a split by another protocol or seed; choose another name")
    counts = ", ".join(f"{len(split.subset(part))} {part}" for part in PARTS)
    print(f"{args.out}: {counts}; {split.protocol}; sha256 {split.hash[:12]}, {state}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("stopped; what is complete stays, start it again to continue", file=sys.stderr)
        sys.exit(75)
