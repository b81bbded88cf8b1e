"""Published lists of images: which samples of a dataset they name."""

import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.datasets.convert.source import keys_of
from pipeline.datasets.manifest import Manifest
from pipeline.errors import DataError


def read_list(path: Path, manifest: Manifest) -> tuple[NDArray[np.int64], str]:
    """Find the samples that a text or CSV file names, one a line.

    A line names an image by its file name, with or without folders and extension; further columns are ignored
    (SimCLR's `1percent.txt`, ImageNet-LT's `train/n01440764/n01440764_190.JPEG 0`). Or a line is a bare number: the place
    in torchvision's ImageFolder, which is the order of the keys (the index files of EMAN and Semi-ViT). A first line of
    column titles is skipped.

    Args:
        path: The list.
        manifest: The dataset.

    Returns:
        (N,) sorted sample indices, and the SHA-256 of the file.

    Raises:
        DataError: The file is missing or empty, or a line names no sample, several, or the sample of another line.
    """
    if not path.is_file():
        raise DataError(f"list {path} does not exist; give a file with one image a line")
    content = path.read_bytes()
    rows = [re.split(r"[,\s]+", line.strip()) for line in content.decode(errors="replace").splitlines() if line.strip()]
    keys = [manifest.key(sample_index) for sample_index in range(manifest.num_samples)]
    if rows and not any(character.isdigit() for character in "".join(rows[0])):
        rows = rows[1:]
    names = [next((token for token in row if not token.isdigit()), "") for row in rows]
    if not any(names):
        found = _by_number([int(row[0]) for row in rows], keys, path)
    else:
        found = _by_name(names, keys, path)
    if not found:
        raise DataError(f"list {path} names no image; give a file with one image a line")
    if repeated := len(found) - len(set(found)):
        raise DataError(f"list {path} names {repeated} images twice; remove the repeated lines")
    return np.sort(np.array(found)), hashlib.sha256(content).hexdigest()


def _by_number(numbers: list[int], keys: list[str], path: Path) -> list[int]:
    if numbers and max(numbers) >= len(keys):
        raise DataError(
            f"list {path} has number {max(numbers)}, but {len(keys)} samples are counted from 0; is it another dataset's?"
        )
    order = np.argsort(np.array(keys), kind="stable")
    return [int(order[number]) for number in numbers]


def _by_name(names: list[str], keys: list[str], path: Path) -> list[int]:
    whole = {key: sample_index for sample_index, key in enumerate(keys)}
    last: dict[str, int] = {}
    for sample_index, key in enumerate(keys):
        name = key.rpartition("/")[2]
        last[name] = -1 if name in last else sample_index  # -1: several folders have one of this name
    found, missing = [], []
    for name in names:
        key = keys_of([name if "." in name.rpartition("/")[2] else name + "."])[0]
        candidates = [key[at:] for at in [0, *(m.end() for m in re.finditer("/", key))]]
        sample_index = next((whole[c] for c in candidates if c in whole), last.get(candidates[-1], -1))
        found.append(sample_index)
        if sample_index < 0:
            missing.append(name)
    if missing:
        raise DataError(
            f"list {path}: {len(missing)} of {len(names)} lines name no image of the dataset, or more than one; "
            f"the first: {missing[0]!r} (the dataset has names like {keys[0]!r})"
        )
    return found
