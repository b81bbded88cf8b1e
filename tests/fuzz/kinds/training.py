"""Datasets that contradict themselves or hold hostile pictures, where they bite: in a few steps of training."""

import json
import random
import shutil
from pathlib import Path

import numpy as np

from tests.fuzz import mutate
from tests.fuzz.kinds.base import Case, Material
from tests.fuzz.kinds.pictures import picture
from tests.fuzz.kinds.runs import odd, stage_command


def training(rng: random.Random, folder: Path, have: Material) -> Case:
    """A dataset or split that somebody changed and sealed again. A stage trains on it."""
    stage = rng.choice(("arm", "distill", "semi"))
    shutil.copytree(have.small, folder / "data")
    if stage == "semi":
        shutil.copytree(have.runs / "smoke" / "distill" / "export", folder / "parent")
    data = folder / "data" / "train"
    what = rng.choice((_pictures, _pictures, _table, _codes, _shard, _bytes))
    what(rng, data)
    paths = ["data.train=data/train", "data.test=data/test", "data.split=data/split.json"]
    more = ["init_from=parent"] if stage == "semi" else ["init_from=null"] if stage == "distill" else []
    if rng.random() < 0.2:
        more += ["data.loader.workers=1"]
    return Case("stages.__main__", stage_command(stage, have, *paths, *more), trains=True)


def _pictures(rng: random.Random, data: Path) -> None:
    """Put hostile pictures over sound ones, in shards that are described as they are."""
    table, header = _read(data)
    for row in rng.sample(range(len(table)), rng.choice((1, 5, len(table)))):
        shard = _shard_of(header, row)
        found = picture(rng)[: int(table["length"][row])] if rng.random() < 0.5 else picture(rng)
        with (data / shard).open("r+b") as file:
            if len(found) <= table["length"][row]:
                file.seek(int(table["offset"][row]))
            else:  # behind the archive; only the manifest says where an image is
                table["offset"][row] = file.seek(0, 2)
            file.write(found)
            table["length"][row] = len(found)
    _write(data, table, header)


def _table(rng: random.Random, data: Path) -> None:
    """Change places, lengths and labels."""
    table, header = _read(data)
    for row in rng.sample(range(len(table)), rng.choice((1, 5, len(table)))):
        field = rng.choice(("offset", "length", "label", "name"))
        values = (0, 1, 2**31 - 1, 3, int(table[field][row]) + rng.randrange(-2000, 2000))
        table[field][row] = np.array(max(-1 if field == "label" else 0, rng.choice(values))).astype(table.dtype[field])
    _write(data, table, header)


def _codes(rng: random.Random, data: Path) -> None:
    """Change who is labelled: nobody, everybody, one class, or a sample in two minds."""
    path = data.parent / "split.json"
    header = json.loads(path.read_text())
    header.pop("sha256")
    letters = sorted(set(header["codes"]))
    kind = rng.randrange(3)
    if kind == 0:
        header["codes"] = rng.choice(letters) * len(header["codes"])
    elif kind == 1:
        header["codes"] = "".join(rng.choices(letters, k=len(header["codes"])))
    else:
        header = mutate.tree(rng, header, 1)
    path.write_bytes(json.dumps(header).encode("utf-8", "surrogatepass"))


def _shard(rng: random.Random, data: Path) -> None:
    """Take a shard away, exchange it, or put something else in its place."""
    shards = sorted(data.glob("*.tar"))
    path = rng.choice(shards)
    if rng.random() < 0.5:
        shutil.copyfile(rng.choice(shards), data / "copy")
        (data / "copy").rename(path)
    else:
        odd(rng, path)


def _bytes(rng: random.Random, data: Path) -> None:
    """Damage bytes of a shard and keep its size, sealed again or not."""
    path = rng.choice(sorted(data.glob("*.tar")))
    whole = path.read_bytes()
    path.write_bytes(mutate.data(rng, whole, 30)[: len(whole)].ljust(len(whole), b"\0"))
    if rng.random() < 0.5:
        _write(data, *_read(data))


def _read(data: Path) -> tuple[np.ndarray, dict]:
    return np.load(data / "manifest.samples.npy").copy(), json.loads((data / "manifest.json").read_text())


def _write(data: Path, table: np.ndarray, header: dict) -> None:
    """Write the table and the header so that sizes and hashes hold, and a split that fits them."""
    from pipeline.datasets.tables import write_table
    from pipeline.files import sha256_of

    header["samples_sha256"] = write_table(data / "manifest.samples.npy", table)
    for shard in header["shards"]:
        shard |= {"size": (data / shard["name"]).stat().st_size, "sha256": sha256_of(data / shard["name"])}
    (data / "manifest.json").write_text(json.dumps(header))
    from pipeline.datasets.manifest import _identity

    split = json.loads((data.parent / "split.json").read_text())
    split.pop("sha256")
    (data.parent / "split.json").write_text(json.dumps(split | {"manifest": _identity(header)}))


def _shard_of(header: dict, row: int) -> str:
    ends = np.cumsum([shard["count"] for shard in header["shards"]])
    return str(header["shards"][int(np.searchsorted(ends, row, side="right"))]["name"])
