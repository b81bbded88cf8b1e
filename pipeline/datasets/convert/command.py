"""The command `convert`: its options, one function per kind of source, and what it prints."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.datasets.text import shown
from pipeline.decoding import add_options, given
from pipeline.errors import ConfigError, DataError
from pipeline.files import real_path
from pipeline.storage.config import RemoteConfig

if TYPE_CHECKING:
    from pipeline.datasets.convert.source import Source
    from pipeline.datasets.manifest import Manifest

_CLASS_MAP = "coarser classes, for example ImageNet-127's: a line CLASS COARSER-CLASS for each class"
_CLASSES = "class names, one a line, in the order of the labels; or the folder of a dataset, to have its classes"


def count(text: str) -> int:
    """Read a positive whole number of the command line."""
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def _path(text: str) -> Path:
    """Read a path of the command line; an empty one is a shell variable that was not set, not this folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; give a folder or file")
    return Path(text)


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Add the kinds of sources and their options to the command's parser."""
    kinds = parser.add_subparsers(required=True, metavar="KIND")

    def kind(
        name: str, run: Callable[[argparse.Namespace], None], text: str, source: str = "", classes: bool = False
    ) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text)
        if source:
            sub.add_argument("source", type=lambda text: str(_path(text)) if "://" not in text else text, help=source)
        sub.add_argument("--out", type=_path, required=name != "tars", help="folder to write the dataset to")
        sub.add_argument("--processes", type=count, default=os.cpu_count() or 1, help="default: one per CPU")
        if name != "tars":
            sub.add_argument("--seed", type=int, default=0, help="seed of the order of the samples (default 0)")
        if source and name != "tars":
            sub.add_argument(
                "--samples-per-shard", type=count, default=2_000, help="images in one shard (default 2000)"
            )
            sub.add_argument(
                "--resize", type=count, default=0, metavar="PIXELS", help="reduce larger images to this shorter side"
            )
            add_options(sub, "white; only --resize needs one, since it writes JPEG")
        if source:
            sub.add_argument(
                "--skip-unreadable",
                action="store_true",
                help="leave out images that cannot be converted (empty, damaged, too large, of a format that is not read, "
                "missing, of the same name), and count them",
            )
        if classes:
            sub.add_argument("--classes", type=Path, metavar="FILE", help=_CLASSES)
        if classes and name != "tars":
            sub.add_argument("--class-map", type=Path, metavar="FILE", help=_CLASS_MAP)
        sub.set_defaults(run=run)
        return sub

    kind("digits", _convert_digits, "scikit-learn's scanned digits, into OUT/train and OUT/test")
    kind("letters", _convert_letters, "coloured letters on photographs, 26 classes, into OUT/train and OUT/test")
    kind("folder", _convert_folder, "a folder of images without classes, at any depth", "folder of images")
    folder = kind(
        "imagefolder",
        _convert_image_folder,
        "a folder of images per class",
        "folder that holds the class folders",
        classes=True,
    )
    folder.add_argument(
        "--nested", action="store_true", help="each folder with images is a class, named by its path (animals/cat)"
    )
    table = kind(
        "csv",
        _convert_csv,
        "images that a table names: CSV, TSV or JSON lines",
        "the table, with a row of titles",
        classes=True,
    )
    for labelled in (folder, table):
        labelled.add_argument(
            "--unlabelled",
            type=_path,
            nargs="+",
            default=[],
            metavar="DIR",
            help="folders of images that have no label",
        )
    table.add_argument("--image", required=True, metavar="COLUMN", help="column of the file names")
    table.add_argument("--label", metavar="COLUMN", help="column of the classes; without it no image has a label")
    table.add_argument("--root", type=Path, metavar="DIR", help="folder of the file names (default: that of the table)")
    imagenet = kind(
        "imagenet",
        _convert_imagenet,
        "ImageNet's layouts, into OUT/train and OUT/val",
        "folder with train/ and val/",
        classes=True,
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
        "parquet",
        _convert_parquet,
        "parquet files as from Hugging Face, or the folder of its save_to_disk (needs pyarrow)",
        "folder of .parquet or .arrow files, or one such file",
        classes=True,
    )
    parquet.add_argument("--image-column", default="image", help="default image")
    parquet.add_argument("--label-column", default="label", help="default label; none = no image has a label")
    kind(
        "cifar",
        _convert_cifar,
        "CIFAR-10 or CIFAR-100, its python or its binary version, into OUT/train and OUT/test",
        "folder that its archive unpacks to, or the folder around it",
    )
    kind(
        "stl10",
        _convert_stl10,
        "STL-10 with its 100,000 unlabelled images, into OUT/train and OUT/test",
        "folder of train_X.bin, or the folder around it",
    )
    digits = kind(
        "svhn",
        _convert_svhn,
        "SVHN's cropped digits, into OUT/train and OUT/test",
        "folder of train_32x32.mat and test_32x32.mat",
    )
    digits.add_argument("--extra", action="store_true", help="train also has the images of extra_32x32.mat")
    tars = kind(
        "tars",
        _convert_tars,
        "a manifest for WebDataset tars, which stay as they are",
        "folder of tars; or, with --out for the manifest, a URL of tars such as https://HOST/{000000..000063}.tar,"
        " or the URL of a folder with a manifest",
        classes=True,
    )
    tars.add_argument(
        "--image-key", default="", metavar="ENDING", help="which members are the images, for example input.jpg"
    )
    tars.add_argument(
        "--label-key",
        default="",
        metavar="KEY",
        help="which members hold the labels (cls, txt, output.cls), or a field of the json members; none = no labels "
        "(default: cls, or else txt if it holds class names)",
    )


def _say(manifest: "Manifest", existed: bool, table: Sequence[str] = ()) -> None:
    from pipeline.datasets.convert.classes import doubts

    state = "already there" if existed else "written"
    names = ", ".join(manifest.classes[:4]) + (", ..." if len(manifest.classes) > 4 else "")
    classes = f" of {len(manifest.classes)} classes ({names})" if manifest.classes else " without classes"
    unlabelled = int((manifest.labels < 0).sum())
    without = f", {unlabelled} of them without a label," if unlabelled and manifest.classes else ""
    print(
        f"{manifest.folder}: {manifest.num_samples} samples{classes}{without} in {len(manifest.shards)} shards, {state}"
    )
    for line in [*table, *(f"note: {doubt}" for doubt in doubts(manifest.classes))]:
        print("  " + line)


def _convert(source: "Source", out: Path, args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.class_map import with_class_map
    from pipeline.datasets.convert.writer import convert

    if getattr(args, "class_map", None):
        source = with_class_map(source, args.class_map)
    options: dict[str, Any] = {
        "seed": args.seed,
        "samples_per_shard": args.samples_per_shard,
        "shorter_side": args.resize,
        "processes": args.processes,
        "skip_unreadable": args.skip_unreadable,
        "decoding": given(args),
    }
    _say(*convert(source, out, **options))


def _classes(args: argparse.Namespace) -> list[str] | None:
    from pipeline.datasets.convert.classes import read_classes

    return read_classes(args.classes) if args.classes else None


def _check_out(out: Path, sources: Sequence[Path]) -> None:
    """Refuse to write shards among the images: the next conversion would find them there."""
    for source in sources:
        if real_path(out).is_relative_to(real_path(source)):
            raise ConfigError(f"--out {out} is inside the source {source}; give a folder outside it")


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


def _convert_folder(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.imagefolder import plain_folder

    _check_out(args.out, [Path(args.source)])
    _convert(plain_folder(Path(args.source)), args.out, args)


def _convert_image_folder(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.imagefolder import image_folder

    root = Path(args.source)
    _check_out(args.out, [root, *args.unlabelled])
    source = image_folder(root, classes=_classes(args), unlabelled=args.unlabelled, nested=args.nested)
    if doubtful := [name for name in source.classes if name.lower() in ("unlabelled", "unlabeled", "nolabel", "unsup")]:
        print(
            f"note: {doubtful[0]!r} is taken as a class; if its images have no label, add "
            f"--unlabelled {shown(str(root / doubtful[0]))}"
        )
    labelled = [name for name, label in zip(source.names, source.labels, strict=True) if label >= 0]
    if not args.nested and all(name.count("/") > 1 for name in labelled):
        print(
            f"note: no image lies directly in a class folder, the first is {shown(labelled[0])}; if the folders below are the"
            " classes, add --nested"
        )
    _convert(source, args.out, args)


def _convert_csv(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.rows import table_file

    if args.unlabelled:
        _check_out(args.out, args.unlabelled)
    source = table_file(Path(args.source), args.image, args.label, args.root, _classes(args), args.unlabelled)
    _convert(source, args.out, args)


def _convert_imagenet(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.imagefolder import image_folder
    from pipeline.datasets.convert.imagenet import imagenet_validation

    root = Path(args.source)
    val = root / "val"
    _check_out(args.out / "train", [root / "train", val])
    if val.is_dir() and not args.truth and not any(path.is_dir() for path in val.iterdir()):
        raise ConfigError(f"{val} has no class folders; give --truth FILE, the file that says the class of each image")
    train = image_folder(root / "train", classes=_classes(args))
    _convert(train, args.out / "train", args)
    if val.is_dir():
        flat = args.truth is not None
        source = (
            imagenet_validation(val, args.truth, args.synsets, train.classes)
            if flat
            else image_folder(val, classes=train.classes)
        )
        _convert(source, args.out / "val", args)


def _convert_parquet(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.parquet import parquet_folder

    _check_out(args.out, [Path(args.source)])
    labelled = args.label_column != "none"
    source = parquet_folder(Path(args.source), args.image_column, args.label_column, _classes(args), labelled)
    parts = sorted(
        {part for file in source.files for part in ("train", "valid", "test") if Path(file).name.startswith(part)}
    )
    if len(parts) > 1:
        print(
            f"note: these files are parts of one dataset ({', '.join(parts)}) and become one set; convert each part by itself"
        )
    _convert(source, args.out, args)


def _convert_cifar(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.benchmarks.cifar import cifar

    _convert_pair(cifar(Path(args.source)), args)


def _convert_stl10(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.benchmarks.stl10 import stl10

    _convert_pair(stl10(Path(args.source)), args)


def _convert_svhn(args: argparse.Namespace) -> None:
    from pipeline.datasets.convert.benchmarks.svhn import svhn

    _convert_pair(svhn(Path(args.source), args.extra), args)


def _convert_pair(sources: "Sequence[Source]", args: argparse.Namespace) -> None:
    for part, source in zip(("train", "test"), sources, strict=True):
        _convert(source, args.out / part, args)


def _convert_tars(args: argparse.Namespace) -> None:
    from pipeline.datasets.index import index_folder, index_remote
    from pipeline.datasets.tars import MemberRules

    classes = _classes(args)
    rules = MemberRules(args.image_key, args.label_key, args.skip_unreadable)
    if "://" not in args.source:
        if args.out and args.out != Path(args.source):
            raise ConfigError("the manifest of local tars is written beside them; leave out --out")
        if not Path(args.source).is_dir():
            raise DataError(f"{args.source} is not a folder; give a folder of WebDataset tars")
        _say(*index_folder(Path(args.source), classes, args.processes, rules))
    elif not args.out:
        raise ConfigError("tars behind a URL need a folder for their manifest; give --out FOLDER")
    else:
        _say(*index_remote(args.source, args.out, classes, RemoteConfig(), args.processes, rules))
