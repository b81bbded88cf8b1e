"""python -m pipeline.data convert | split: from images to shards, and from shards to labelled and unlabelled parts."""

import argparse
import os
import sys
from pathlib import Path

from pipeline.config import validate
from pipeline.data.config import SplitConfig
from pipeline.errors import DataError, PipelineError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; what a person can cause ends in one sentence."""
    parser = argparse.ArgumentParser("python -m pipeline.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="images to shards and a manifest"))
    _add_split(commands.add_parser("split", help="choose labelled, unlabelled and validation samples"))
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", choices=["digits"], help="digits: scikit-learn's, into OUT/train and OUT/test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle over the shards (default 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from pipeline.data.convert import convert
    from pipeline.data.sources import digits

    for part, source in zip(("train", "test"), digits(args.seed), strict=True):
        options = {"seed": args.seed, "samples_per_shard": 256, "processes": args.processes}
        manifest, existed = convert(source, args.out / part, **options)
        state = "already there" if existed else "written"
        print(f"{manifest.folder}: {manifest.num_samples} samples in {len(manifest.shards)} shards, {state}")


def _add_split(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=Path, help="a folder with a manifest")
    parser.add_argument("--out", type=Path, required=True, help="the split file")
    parser.add_argument("--seed", type=int, default=0)
    for name, field in SplitConfig.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=field.default, help=f"default {field.default}")
    parser.set_defaults(run=_split)


def _split(args: argparse.Namespace) -> None:
    from pipeline.data.manifest import read_manifest
    from pipeline.data.splits import make_split, read_split, write_split

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
    counts = ", ".join(f"{len(split.part(part))} {part}" for part in ("labelled", "unlabelled", "validation", "unused"))
    print(f"{args.out}: {counts}; {split.protocol}; sha256 {split.hash[:12]}, {state}")


if __name__ == "__main__":
    sys.exit(main())
