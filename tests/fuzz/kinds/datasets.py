"""Datasets: manifests, splits, shards and pictures."""

import random
import shutil
from pathlib import Path

from tests.fuzz import mutate
from tests.fuzz.kinds.base import ROOT, Case, Material, damaged
from tests.fuzz.kinds.pictures import picture


def manifest(rng: random.Random, folder: Path, have: Material) -> Case:
    """A dataset whose manifest or index was damaged."""
    shutil.copytree(have.digits / "train", folder / "data")
    names = [path for path in sorted((folder / "data").iterdir()) if path.suffix != ".tar"]
    path = rng.choice(names)
    path.write_bytes(damaged(rng, path))
    return Case("pipeline.data", ["verify", "data"] if rng.random() < 0.5 else ["show", "data"])


def split(rng: random.Random, folder: Path, have: Material) -> Case:
    """A split file that was damaged."""
    path = folder / "split.json"
    path.write_bytes(damaged(rng, have.digits / "split.json"))
    data = [f"data.train={have.digits}/train", "data.split=split.json", "data.test=null", "run.root=runs"]
    if rng.random() < 0.5:
        return Case("tests.fuzz.commands", ["split", f"{have.digits}/train", "split.json", f"{have.digits}/split.json"])
    return Case("stages.__main__", ["arm", str(ROOT / "configs/arm/smoke.yaml"), *data])


def tar(rng: random.Random, folder: Path, have: Material) -> Case:
    """A shard whose bytes were damaged."""
    shutil.copytree(have.digits / "test", folder / "data")
    path = rng.choice(sorted((folder / "data").glob("*.tar")))
    path.write_bytes(mutate.data(rng, path.read_bytes()))
    return Case("pipeline.data", ["verify", "data"])


def image(rng: random.Random, folder: Path, have: Material) -> Case:
    """Hostile pictures, for the commands that convert folders and that name what is on pictures."""
    from PIL import Image

    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (24, 24), (9, 90, 200)).save(folder / "photos" / name / "sound.png")
    for k in range(rng.choice((1, 1, 3))):
        (folder / "photos" / "cat" / f"odd{k}.{rng.choice(('png', 'jpg', 'webp'))}").write_bytes(picture(rng))
    if rng.random() < 0.3:
        return Case("pipeline.predict", [str(have.export), "photos/cat", *rng.choice(([], ["--csv", "out.csv"]))])
    more = rng.choice(([], ["--skip-unreadable"], ["--skip-unreadable", "--resize", "16"]))
    return Case("pipeline.data", ["convert", "imagefolder", "photos", "--out", "out", "--processes", "1", *more])
