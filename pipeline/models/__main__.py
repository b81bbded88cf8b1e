"""Models: bring released weights in, and take a trained one out."""

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
    _add_onnx(commands.add_parser("onnx", help="an export's classifier to an ONNX file"))
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
    from pipeline.models.convert import convert

    card = convert(
        args.file, args.out, entry=args.entry, image_size=(size[0], size[-1]) if size else None, classes=classes
    )
    print(f"{args.out}: {card.kind}; load it with pipeline.models.export.load_export, or give init_from={args.out}")


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    parser.description = "Write an export's classifier for ONNX Runtime, and hold its answers against the export's own."
    parser.add_argument("export", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the file, NAME.onnx")
    parser.set_defaults(run=_onnx)


def _onnx(args: argparse.Namespace) -> None:
    from pipeline.models.onnx_file import export_to_onnx

    error = export_to_onnx(args.export, args.out)
    print(f"{args.out}: answers the export's probe batch with a relative error of {error:.1e}")


if __name__ == "__main__":
    sys.exit(main())
