"""What `convert` does with each kind of source, and what it prints."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.datasets.text import shown
from pipeline.decoding import given
from pipeline.errors import ConfigError, DataError
from pipeline.files import real_path
from pipeline.storage.config import RemoteConfig

if TYPE_CHECKING:
    from pipeline.datasets.convert.source import Source
    from pipeline.datasets.manifest import Manifest


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


def _in_classes(source: "Source", args: argparse.Namespace) -> "Source":
    """Return a source with the classes of --classes, if its reader does not know the option."""
    from pipeline.datasets.convert.class_map import with_classes

    classes = _classes(args)
    return source if classes is None else with_classes(source, classes)


def _classes(args: argparse.Namespace) -> list[str] | None:
    from pipeline.datasets.convert.classes import read_classes

    return read_classes(args.classes) if args.classes else None


def _check_out(out: Path, sources: Sequence[Path]) -> None:
    """Refuse to write shards among the images: the next conversion would find them there."""
    for source in sources:
        if real_path(out).is_relative_to(real_path(source)):
            raise ConfigError(f"--out {out} is inside the source {source}; give a folder outside it")


def convert_digits(args: argparse.Namespace) -> None:
    """Scikit-learn's digits, train and test."""
    from pipeline.datasets.convert.digits import digits

    _convert_bundled(digits(args.seed), args, samples_per_shard=256)


def convert_letters(args: argparse.Namespace) -> None:
    """Letters on photographs, train and test."""
    from pipeline.datasets.convert.letters import letters

    _convert_bundled(letters(args.seed), args, samples_per_shard=520)


def _convert_bundled(sources: "Sequence[Source]", args: argparse.Namespace, samples_per_shard: int) -> None:
    """Convert what installed packages carry: the command has no options on unreadable or large images."""
    from pipeline.datasets.convert.writer import convert

    for name, source in zip(("train", "test"), sources, strict=True):
        options = {"seed": args.seed, "samples_per_shard": samples_per_shard, "processes": args.processes}
        _say(*convert(_in_classes(source, args), args.out / name, **options))


def convert_folder(args: argparse.Namespace) -> None:
    """A folder of images without classes."""
    from pipeline.datasets.convert.imagefolder import plain_folder

    _check_out(args.out, [Path(args.source)])
    _convert(plain_folder(Path(args.source), _classes(args) or ()), args.out, args)


def convert_image_folder(args: argparse.Namespace) -> None:
    """A folder of images per class, and folders of images without a label."""
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


def convert_csv(args: argparse.Namespace) -> None:
    """The images that a table names."""
    from pipeline.datasets.convert.rows import table_file

    if args.unlabelled:
        _check_out(args.out, args.unlabelled)
    source = table_file(Path(args.source), args.image, args.label, args.root, _classes(args), args.unlabelled)
    _convert(source, args.out, args)


def convert_imagenet(args: argparse.Namespace) -> None:
    """ImageNet's training and validation set."""
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


def convert_parquet(args: argparse.Namespace) -> None:
    """Parquet files, or one folder of save_to_disk."""
    from pipeline.datasets.convert.parquet import parquet_folder

    _check_out(args.out, [Path(args.source)])
    labelled = args.label_column != "none"
    source = parquet_folder(Path(args.source), args.image_column, args.label_column, _classes(args), labelled)
    parts = sorted(
        {part for file in source.files for part in ("train", "valid", "test") if Path(file).name.startswith(part)}
    )
    if len(parts) > 1:
        print(
            f"note: these files are parts of one dataset ({', '.join(parts)}) and become one set; convert each part by itself,"
            " or all with `convert huggingface`"
        )
    _convert(source, args.out, args)


def convert_hugging_face(args: argparse.Namespace) -> None:
    """A dataset of Hugging Face: one split into OUT, each of several into OUT/SPLIT."""
    from pipeline.datasets.convert.huggingface import hugging_face

    if Path(args.source).is_dir():
        _check_out(args.out, [Path(args.source)])
    parts = hugging_face(
        args.source,
        config=args.config,
        split=args.split,
        revision=args.revision,
        image_column=args.image_column,
        label_column=args.label_column,
        classes=_classes(args),
    )
    for name, source in parts.items():
        _convert(source, args.out / name if len(parts) > 1 else args.out, args)


def convert_cifar(args: argparse.Namespace) -> None:
    """CIFAR-10 or CIFAR-100, train and test."""
    from pipeline.datasets.convert.benchmarks.cifar import cifar

    _convert_pair(cifar(Path(args.source)), args)


def convert_stl10(args: argparse.Namespace) -> None:
    """STL-10, train and test."""
    from pipeline.datasets.convert.benchmarks.stl10 import stl10

    _convert_pair(stl10(Path(args.source)), args)


def convert_svhn(args: argparse.Namespace) -> None:
    """SVHN, train and test."""
    from pipeline.datasets.convert.benchmarks.svhn import svhn

    _convert_pair(svhn(Path(args.source), args.extra), args)


def _convert_pair(sources: "Sequence[Source]", args: argparse.Namespace) -> None:
    for part, source in zip(("train", "test"), sources, strict=True):
        _convert(_in_classes(source, args), args.out / part, args)


def convert_tars(args: argparse.Namespace) -> None:
    """Tars that exist, here or behind a URL: only a manifest is written."""
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
