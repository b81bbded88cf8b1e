"""The command `python -m pipeline.data check`."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from pipeline.datasets.config import add_opening, opening_of
from pipeline.decoding import Decoding
from pipeline.errors import ConfigError, DataError


def add_arguments(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """Give a parser the arguments of the command; `count` reads a positive whole number."""
    parser.add_argument("train", type=Path, metavar="TRAIN", help="folder of the training set")
    parser.add_argument("tests", type=Path, nargs="*", metavar="TEST", help="folders of test sets")
    parser.add_argument("--split", type=Path, metavar="FILE", help="split file of TRAIN")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures of what was found")
    parser.add_argument("--processes", type=count, default=os.cpu_count() or 1, help="default: one per CPU")
    add_opening(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    from pipeline.datasets.check.page import lines, write_page
    from pipeline.datasets.check.survey import survey
    from pipeline.datasets.opening import open_dataset
    from pipeline.datasets.splits import read_split

    if args.html is not None and args.html.suffix != ".html":
        raise ConfigError(f"--html {args.html}: the page is HTML; give a name that ends in .html")
    opening = opening_of(args)
    manifests = [open_dataset(folder, opening) for folder in (args.train, *args.tests)]
    split = read_split(args.split, manifests[0]) if args.split else None
    found = survey(manifests, split, args.processes, Decoding(max_pixels=opening.max_pixels))
    print(*lines(found), sep="\n")
    if args.html:
        write_page(found, args.html)
        print(f"page: {args.html}")
    leaks = [finding for finding in found.findings if finding.name == "test-in-training"]
    if leaks:
        number = sum(finding.count for finding in leaks)
        raise DataError(
            f"{number} test image{'s are' if number > 1 else ' is'} in the training set {args.train}: remove"
            f" {'them' if number > 1 else 'it'} from one of the two, or no score on the test set can be believed"
        )
