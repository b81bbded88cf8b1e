"""Models: bring released weights in, and take models out for other runtimes."""

import argparse
import logging
import sys
from pathlib import Path

from pipeline.errors import ConfigError, PipelineError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code; what a person can cause ends in one sentence."""
    parser = argparse.ArgumentParser("python -m pipeline.models", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_convert(commands.add_parser("convert", help="a released Vim or ARM checkpoint to an export"))
    _add_prefetch(commands.add_parser("prefetch", help="download timm's weights for nodes without a network"))
    _add_onnx(commands.add_parser("onnx", help="an export's classifier to an ONNX file"))
    _add_coreml(commands.add_parser("coreml", help="an export's classifier to a Core ML program"))
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        args.run(args)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = "Read a released checkpoint without running any of its code, and write an export of ours."
    parser.add_argument("file", type=Path, help="a torch checkpoint or a .safetensors file")
    parser.add_argument("--out", type=Path, required=True, help="folder of the export, which must not exist")
    parser.add_argument(
        "--entry", help="of the checkpoint: model, model_ema, ...; by default the averaged weights, if any"
    )
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="side, or height and width")
    parser.add_argument("--classes", type=Path, help="class names, one a line; without it they are numbers")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    size = args.image_size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise ConfigError(f"--image-size {' '.join(map(str, size))}: give one side, or height and width, in pixels")
    if args.classes is not None and not args.classes.is_file():
        raise ConfigError(f"--classes {args.classes}: no such file; give class names, one a line")
    classes = tuple(args.classes.read_text().splitlines()) if args.classes else ()
    from pipeline.exports.convert import convert

    card = convert(
        args.file, args.out, entry=args.entry, image_size=(size[0], size[-1]) if size else None, classes=classes
    )
    print(f"{args.out}: {card.kind}; load it with pipeline.exports.export.load_export, or give init_from={args.out}")


def _add_prefetch(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Download weights that timm has to FOLDER/NAME.safetensors; trainings take that file as a path."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="timm's, for example regnety_160.deit_in1k")
    parser.add_argument("--out", type=Path, default=Path("weights"), metavar="FOLDER")
    parser.set_defaults(run=_prefetch)


def _prefetch(args: argparse.Namespace) -> None:
    from pipeline.exports.prefetch import prefetch

    for name in args.names:
        print(prefetch(name, args.out))


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write an export's classifier for ONNX Runtime, and hold its answers against the export's own."
    parser.add_argument("export", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the file, NAME.onnx")
    parser.set_defaults(run=_onnx)


def _onnx(args: argparse.Namespace) -> None:
    from pipeline.exports.onnx import export_to_onnx

    error = export_to_onnx(args.export, args.out)
    print(f"{args.out}: answers the export's probe batch with a relative error of {error:.1e}")


def _add_coreml(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write an export's classifier as a Core ML program; EfficientViM is fused first."
    parser.add_argument("export", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="NAME.mlpackage, which must not exist")
    parser.set_defaults(run=_coreml)


def _coreml(args: argparse.Namespace) -> None:
    if args.out.exists() or args.out.suffix != ".mlpackage":
        raise ConfigError(f"--out {args.out}: give a name that ends in .mlpackage and is not taken")
    from pipeline.exports.coreml import write_coreml
    from pipeline.exports.export import load_export
    from pipeline.models.config import VisionMambaConfig
    from pipeline.models.efficientvim.fused import fuse
    from pipeline.models.efficientvim.model import EfficientViM

    model, card = load_export(args.export)
    if card.kind != "classifier" or isinstance(card.model, VisionMambaConfig):
        raise ConfigError(
            f"{args.export} holds a {card.kind} {card.model.name}; only classifiers go out, and none with a selective scan,"
            " which Core ML has no operator for"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_coreml(fuse(model) if isinstance(model, EfficientViM) else model, args.out, card.model.image_size)
    print(f"{args.out}: images {card.model.image_size} to {len(card.classes)} logits")


if __name__ == "__main__":
    sys.exit(main())
