"""The options of the command `convert`; `kinds` has what each kind of source does with them."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.datasets.convert import kinds
from pipeline.decoding import add_options

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
    commands = parser.add_subparsers(required=True, metavar="KIND")

    def kind(
        name: str, run: Callable[[argparse.Namespace], None], text: str, source: str = ""
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
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
        sub.add_argument("--classes", type=_path, metavar="FILE", help=_CLASSES)
        if source and name not in ("folder", "tars"):
            sub.add_argument("--class-map", type=Path, metavar="FILE", help=_CLASS_MAP)
        sub.set_defaults(run=run)
        return sub

    kind("digits", kinds.convert_digits, "scikit-learn's scanned digits, into OUT/train and OUT/test")
    kind("letters", kinds.convert_letters, "coloured letters on photographs, 26 classes, into OUT/train and OUT/test")
    kind("folder", kinds.convert_folder, "a folder of images without classes, at any depth", "folder of images")
    folder = kind(
        "imagefolder",
        kinds.convert_image_folder,
        "a folder of images per class",
        "folder that holds the class folders",
    )
    folder.add_argument(
        "--nested", action="store_true", help="each folder with images is a class, named by its path (animals/cat)"
    )
    table = kind(
        "csv",
        kinds.convert_csv,
        "images that a table names: CSV, TSV or JSON lines",
        "the table, with a row of titles",
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
        kinds.convert_imagenet,
        "ImageNet's layouts, into OUT/train and OUT/val",
        "folder with train/ and val/",
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
        kinds.convert_parquet,
        "parquet files as from Hugging Face, or the folder of its save_to_disk (needs pyarrow)",
        "folder of .parquet or .arrow files, or one such file",
    )
    parquet.add_argument("--image-column", default="image", help="default image")
    parquet.add_argument("--label-column", default="label", help="default label; none = no image has a label")
    hub = kind(
        "huggingface",
        kinds.convert_hugging_face,
        "a dataset of Hugging Face, each split of several into OUT/SPLIT (needs the library `datasets`)",
        "folder of save_to_disk, folder that load_dataset reads, or OWNER/NAME on the hub",
    )
    hub.add_argument("--config", metavar="NAME", help="configuration, of a dataset that has several")
    hub.add_argument("--split", metavar="NAME", help="the only split to convert, or a part of it, such as train[:10%%]")
    hub.add_argument("--revision", metavar="NAME", help="branch, tag or commit on the hub (default: main)")
    hub.add_argument("--image-column", metavar="COLUMN", help="default: the only one of images, or image")
    hub.add_argument(
        "--label-column",
        metavar="COLUMN",
        help="default: the only one of classes, or label; none = no image has a label",
    )
    kind(
        "cifar",
        kinds.convert_cifar,
        "CIFAR-10 or CIFAR-100, its python or its binary version, into OUT/train and OUT/test",
        "folder that its archive unpacks to, or the folder around it",
    )
    kind(
        "stl10",
        kinds.convert_stl10,
        "STL-10 with its 100,000 unlabelled images, into OUT/train and OUT/test",
        "folder of train_X.bin, or the folder around it",
    )
    digits = kind(
        "svhn",
        kinds.convert_svhn,
        "SVHN's cropped digits, into OUT/train and OUT/test",
        "folder of train_32x32.mat and test_32x32.mat",
    )
    digits.add_argument("--extra", action="store_true", help="train also has the images of extra_32x32.mat")
    tars = kind(
        "tars",
        kinds.convert_tars,
        "a manifest for WebDataset tars, which stay as they are",
        "folder of tars; or, with --out for the manifest, a URL of tars such as https://HOST/{000000..000063}.tar,"
        " or the URL of a folder with a manifest",
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
