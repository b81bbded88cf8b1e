"""Models: convert released weights to exports, and write exports for other runtimes."""

import argparse
import logging
import sys
from pathlib import Path

from pipeline.cli import guarded
from pipeline.errors import ConfigError


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m pipeline.models", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="a released Vim, ARM or EfficientViM checkpoint to an export"))
    _add_prefetch(commands.add_parser("prefetch", help="download timm's weights for nodes without a network"))
    onnx = commands.add_parser("onnx", help="an export to an ONNX file")
    onnx.description = (
        "Write a classifier, or a pretrainer's encoder, for ONNX Runtime, and compare its outputs with the model's."
    )
    _add_export_and_out(onnx, "the file, NAME.onnx")
    onnx.add_argument("--any-size", action="store_true", help="let the height and width of the images be free too")
    onnx.set_defaults(run=_onnx)
    coreml = commands.add_parser("coreml", help="an export's classifier to a Core ML program")
    coreml.description = "Write an export's classifier as a Core ML program; EfficientViM is fused first."
    _add_export_and_out(coreml, "the program, NAME.mlpackage, which must not exist")
    coreml.set_defaults(run=_coreml)
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    args.run(args)
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = "Read a released checkpoint without running any of its code, and write an export."
    parser.add_argument("file", type=Path, help="a torch checkpoint or a .safetensors file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the export, which must not exist")
    parser.add_argument(
        "--entry", help="which weights of the checkpoint: model, model_ema, ...; by default the averaged ones, if any"
    )
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
    parser.add_argument(
        "--cls-position",
        choices=["middle", "first"],
        help="where the cls token stands among the patches; by default as the file says, or in the middle with a warning",
    )
    parser.add_argument(
        "--combine",
        choices=["mean", "sum"],
        help="how the directions' outputs are put together; by default as the file says, or the mean with a warning",
    )
    parser.add_argument("--classes", type=Path, help="file of class names, one a line; by default they are numbers")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    size = args.image_size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ConfigError(f"--image-size {' '.join(map(str, size))}: give one side, or height and width, in pixels")
    if args.classes is not None and not args.classes.is_file():
        raise ConfigError(f"--classes {args.classes}: no such file; give a file of class names, one a line")
    classes = tuple(args.classes.read_text().splitlines()) if args.classes else ()
    from pipeline.exports.convert import convert

    given = {"cls_token": args.cls_position, "combine": args.combine}
    card = convert(
        args.file,
        args.out,
        entry=args.entry,
        image_size=(size[0], size[-1]) if size else None,
        classes=classes,
        form={field: value for field, value in given.items() if value is not None},
    )
    use = (
        f'pipeline.load("{args.out}"), or init_from={args.out}'
        if card.kind == "classifier"
        else f"init_from={args.out}"
    )
    print(f"{args.out}: {card.kind}; use it with {use}")


def _add_prefetch(parser: argparse.ArgumentParser) -> None:
    parser.description = "Download timm's weights to FOLDER/NAME.safetensors; trainings take that file as a path."
    parser.add_argument("names", nargs="+", metavar="NAME", help="timm's name, for example regnety_160.deit_in1k")
    parser.add_argument("--out", type=Path, default=Path("weights"), metavar="FOLDER", help="default: weights")
    parser.set_defaults(run=_prefetch)


def _prefetch(args: argparse.Namespace) -> None:
    from pipeline.exports.prefetch import prefetch

    for name in args.names:
        print(prefetch(name, args.out))


def _add_export_and_out(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("export", type=Path, help="folder with model.json")
    parser.add_argument("--out", type=Path, required=True, help=out)


def _onnx(args: argparse.Namespace) -> None:
    from pipeline.exports.onnx import export_to_onnx

    error = export_to_onnx(args.export, args.out, any_size=args.any_size)
    print(f"{args.out}: its outputs for the fingerprint batch have a relative error of {error:.1e}")


def _coreml(args: argparse.Namespace) -> None:
    from pipeline.exports.coreml import export_to_coreml

    card = export_to_coreml(args.export, args.out)
    print(f"{args.out}: images {card.model.image_size} to {len(card.classes)} logits")


if __name__ == "__main__":
    sys.exit(main())
