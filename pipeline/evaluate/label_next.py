"""Find the unlabelled images that are worth labelling next, and write them as a table and a contact sheet."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.datasets.lettering import fitted, font
from pipeline.datasets.manifest import Manifest, read_image
from pipeline.evaluate.features import features_of, linear_head
from pipeline.evaluate.predictions import collect_logits
from pipeline.evaluate.uncertainty import choose_uncertain, uncertainty
from pipeline.exports.export import load_classifier
from pipeline.files import replace_bytes, replace_text
from pipeline.images import decode
from pipeline.streaming.batch import Batch
from pipeline.streaming.loader import evaluation_batches
from pipeline.streaming.transforms import eval_views

HEADER = ("rank", "sample_index", "key", "folder", "label", "predicted", "confidence", "second", "uncertainty")
BATCH = 256
COLUMNS, SIDE, TEXT = 4, 128, 40  # contact sheet: pictures in a row, pixels on a side, pixels of two lines below
LETTERS = 13  # height of a line of letters in pixels


class Pick(NamedTuple):
    """An image that is worth labelling.

    Attributes:
        sample_index: Its row in the manifest.
        key: Its key in the manifest.
        folder: The dataset that has it.
        predicted: The most probable class.
        confidence: Its probability.
        second: The class after it.
        uncertainty: 1 minus the difference of the two probabilities.
    """

    sample_index: int
    key: str
    folder: str
    predicted: str
    confidence: float
    second: str
    uncertainty: float


def rank_images(export: Path, manifest: Manifest, pool: NDArray[np.int64], number: int) -> list[Pick]:
    """Choose images of a pool by uncertainty and diversity, the most useful first.

    Args:
        export: A classifier's export.
        manifest: The dataset of the pool; its labels are not read.
        pool: Sample indices of the pool.
        number: How many to choose; all if there are fewer.
    """
    model, card = load_classifier(export)
    look = card.preprocessing
    views = eval_views(card.model.image_size, mean=look.mean, std=look.std, view=look.view, decoding=look.decoding)
    pool = np.sort(pool)
    if not len(pool):
        return []

    def batches() -> Iterator[Batch]:
        return evaluation_batches(manifest, pool, batch_size=BATCH, rank=0, world_size=1, views=views)

    cpu = torch.device("cpu")
    _, logits = collect_logits(model, batches(), cpu)
    shares = torch.from_numpy(logits).softmax(1).numpy()
    head = linear_head(model)
    features = np.log(np.maximum(shares, 1e-6))
    if head is not None:
        features = features_of(model, head, batches(), cpu).values.double().numpy()
    unsure = uncertainty(logits)
    picks = []
    for row in choose_uncertain(unsure, features, number).tolist():
        first, second = np.argsort(-shares[row], kind="stable")[:2].tolist()
        index = int(pool[row])
        picks.append(Pick(index, manifest.key(index), str(manifest.folder_of(index)), card.classes[first],
                          float(shares[row, first]), card.classes[second], float(unsure[row])))  # fmt: skip
    return picks


def table_text(picks: Sequence[Pick]) -> str:
    """Return a CSV with an empty column `label` for a person to fill in."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(HEADER)
    for rank, p in enumerate(picks, 1):
        writer.writerow([rank, p.sample_index, p.key, p.folder, "", p.predicted, f"{p.confidence:.4f}", p.second,
                         f"{p.uncertainty:.4f}"])  # fmt: skip
    return out.getvalue()


def contact_sheet(picks: Sequence[Pick], manifest: Manifest, *, columns: int = COLUMNS) -> bytes:
    """Return a PNG with a picture of each image, its rank and the two classes that the model hesitates between.

    Args:
        picks: The images.
        manifest: Their dataset; its shards are local.
        columns: Pictures in a row.
    """
    rows = -(-len(picks) // columns)
    sheet = Image.new("RGB", (min(columns, max(1, len(picks))) * SIDE, max(1, rows) * (SIDE + TEXT)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, pick in enumerate(picks):
        left, top = k % columns * SIDE, k // columns * (SIDE + TEXT)
        picture = Image.fromarray(decode(read_image(manifest, pick.sample_index)))
        picture.thumbnail((SIDE - 8, SIDE - 8))
        factor = (SIDE - 8) // max(picture.size)
        if factor > 1:  # the pixels of a small image are kept apart
            picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
        sheet.paste(picture, (left + (SIDE - picture.width) // 2, top + (SIDE - picture.height) // 2))
        lines = (f"#{k + 1}  {pick.predicted}", "black"), (f"or {pick.second}", "#555555")
        for line, (text, colour) in enumerate(lines):
            place = left + 4, top + SIDE + line * TEXT // 2
            draw.text(place, fitted(text, LETTERS, SIDE - 8), fill=colour, font=font(LETTERS))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def write_picks(picks: Sequence[Pick], manifest: Manifest, folder: Path) -> tuple[Path, Path]:
    """Write the table and the contact sheet; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, sheet = folder / "label-next.csv", folder / "label-next.png"
    replace_text(table, table_text(picks))
    replace_bytes(sheet, contact_sheet(picks, manifest))
    return table, sheet
