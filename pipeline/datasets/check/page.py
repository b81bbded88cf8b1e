"""A check as text, and as one HTML page with pictures and without scripts or network."""

import base64
import io
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray
from PIL import Image

from pipeline.datasets.check.finding import Example, Finding, shortened
from pipeline.datasets.check.survey import Dataset, Survey
from pipeline.datasets.manifest import read_image
from pipeline.errors import DataError
from pipeline.files import replace_text
from pipeline.images import decode

PICTURE_SIDE = 112
_MAX_EXAMPLES = 3  # the most examples that the text names for a finding
_SIDES = (32, 64, 128, 256, 512, 1024, 2048)  # bounds of the histogram of shorter sides, in pixels
_RATIOS = (0.33, 0.5, 0.75, 0.95, 1.05, 1.33, 2.0, 3.0)  # bounds of the histogram of width / height
_MARKS = {"grave": "!!", "warning": "! ", "note": "  "}


class Picture(NamedTuple):
    """A picture of the page: a data URI, empty if the image does not decode; its name; what to say of it."""

    uri: str
    name: str
    caption: str
    dataset: str


class Bar(NamedTuple):
    """A bar of a histogram; `share` is in percent of the longest bar."""

    label: str
    number: int
    share: float


def lines(survey: Survey) -> Iterator[str]:
    """Yield the lines of text that a terminal shows."""
    for dataset in survey.datasets:
        manifest = dataset.manifest
        known = int((manifest.labels >= 0).sum())
        yield f"{dataset.title}: {manifest.num_samples:,} images, {len(manifest.classes)} classes, {known:,} labels"
        if dataset.readable.any():
            for title, bars in (("shorter side", side_bars(dataset)), ("width / height", ratio_bars(dataset))):
                yield f"   {title}: " + ", ".join(f"{bar.label}: {bar.number:,}" for bar in bars if bar.number)
    if not survey.findings:
        yield "nothing was found"
    for finding in survey.findings:
        yield f"{_MARKS[finding.level]} {finding.title}: {finding.text}"
        sign = " ~ " if "like" in finding.name else " = "
        for examples, more in finding.groups[:_MAX_EXAMPLES] if finding.name != "sizes" else ():
            names = [name_of(survey, example) for example in examples]
            yield f"     {sign.join(names)}" + (f" and {more} more" if more else "")


def name_of(survey: Survey, example: Example) -> str:
    """Return the dataset and the key of an example, with its class."""
    dataset = survey.datasets[example.dataset]
    key = shortened(dataset.manifest.key(example.sample_index), 60)
    where = f"{Path(dataset.title).name}/{key}" if len(survey.datasets) > 1 else key
    return f"{where} ({shortened(example.caption)})" if example.caption else where


def side_bars(dataset: Dataset) -> list[Bar]:
    """Return the histogram of the shorter sides."""
    measures = dataset.measures[dataset.readable]
    return _bars(np.minimum(measures["width"], measures["height"]), _SIDES, "{:d} px")


def ratio_bars(dataset: Dataset) -> list[Bar]:
    """Return the histogram of width / height."""
    measures = dataset.measures[dataset.readable]
    return _bars(measures["width"] / measures["height"], _RATIOS, "{:g}")


def _bars(values: NDArray[Any], bounds: tuple[float, ...], form: str) -> list[Bar]:
    counts = np.bincount(np.digitize(values, bounds), minlength=len(bounds) + 1)
    words = [form.format(bound) for bound in bounds]
    labels = [
        f"below {words[0]}",
        *(f"{low} to {high}" for low, high in pairwise(words)),
        f"{words[-1]} up",
    ]
    most = max(1, counts.max())
    return [Bar(label, int(count), 100 * count / most) for label, count in zip(labels, counts, strict=True)]


def write_page(survey: Survey, path: Path) -> None:
    """Write the page, whole or not at all; it has at most 48 pictures of a finding.

    Args:
        survey: The check.
        path: The page.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("page.html").render(
        survey=survey,
        findings=[(finding, _pictures(survey, finding)) for finding in survey.findings],
        datasets=[(dataset, side_bars(dataset), ratio_bars(dataset)) for dataset in survey.datasets],
        classes=_class_table(survey),
    )
    replace_text(path, page)


def _class_table(survey: Survey) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: how many images each class has in each subset of the training set and in each test set."""
    train, *tests = survey.datasets
    subsets = ("labelled", "unlabelled", "validation") if survey.split is not None else ()
    labels = [(name, train.manifest.labels[survey.split.subset(name)]) for name in subsets] if survey.split else []
    labels = labels or [(Path(train.title).name, train.manifest.labels)]
    columns = [(name, dict(zip(*_counts(values, train.manifest.classes), strict=True))) for name, values in labels]
    columns += [
        (Path(test.title).name, dict(zip(*_counts(test.manifest.labels, test.manifest.classes), strict=True)))
        for test in tests
    ]
    names = list(dict.fromkeys([*train.manifest.classes, *(name for test in tests for name in test.manifest.classes)]))
    rows = [[shortened(name), *(f"{counts.get(name, 0):,}" for _, counts in columns)] for name in names]
    return ["class", *(name for name, _ in columns)], rows


def _counts(labels: NDArray[np.int64], classes: tuple[str, ...]) -> tuple[tuple[str, ...], list[int]]:
    return classes, np.bincount(labels[labels >= 0], minlength=len(classes))[: len(classes)].tolist()


def _pictures(survey: Survey, finding: Finding) -> list[tuple[list[Picture], int]]:
    """Return the pictures of each group of examples, and how many more images the group has."""
    return [([_picture(survey, example) for example in examples], more) for examples, more in finding.groups]


def _picture(survey: Survey, example: Example) -> Picture:
    dataset = survey.datasets[example.dataset]
    key = shortened(dataset.manifest.key(example.sample_index), 60)
    try:
        picture = Image.fromarray(decode(read_image(dataset.manifest, example.sample_index)))
    except DataError:
        return Picture("", key, shortened(example.caption), Path(dataset.title).name)
    picture.thumbnail((PICTURE_SIDE,) * 2, reducing_gap=2.0)
    buffer = io.BytesIO()
    small = max(picture.size) <= PICTURE_SIDE // 2  # so few pixels that each matters
    picture.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    kind = "png" if small else "jpeg"
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Picture(uri, key, shortened(example.caption), Path(dataset.title).name)
