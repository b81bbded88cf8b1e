"""A folder of images is the dataset that its conversion is."""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import load_config
from pipeline.data import main
from pipeline.datasets.config import Opening
from pipeline.datasets.joint import read_manifests
from pipeline.datasets.manifest import read_image, read_manifest
from pipeline.datasets.opening import ImageFolder, open_dataset
from pipeline.errors import DataError
from pipeline.streaming.config import AugmentConfig, LoaderConfig
from pipeline.streaming.loader import Loader
from pipeline.streaming.transforms import train_views
from stages.configs.distill import DistillConfig
from tests.conftest import ROOT

VIEWS = train_views((16, 16), AugmentConfig(), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """A home folder of the test's own, where what was found in folders is kept."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def write(path: Path, number: int, side: int = 24) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (side - 4 + number % 5, side, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path) -> Path:
    """60 images of 3 classes, with names that tars hold in several ways."""
    for number in range(60):
        name = ("a.b.png", "ä c.JPG", "x" * 120 + ".png", "p.avif")[number % 4]
        write(tmp_path / "photos" / f"class {number % 3}" / str(number) / name, number)
    (tmp_path / "photos" / "class 0" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def batches(manifest, rank: int, world_size: int, workers: int, start: int) -> list:
    config = LoaderConfig(workers=workers)
    loader = Loader(
        manifest,
        np.arange(manifest.num_samples),
        global_batch=8,
        rank=rank,
        world_size=world_size,
        seed=3,
        views=VIEWS,
        config=config,
    )
    found = list(itertools.islice(loader.batches(start), 10))
    loader.close()
    return found


def convert(kind: str, source: Path, out: Path) -> None:
    main(["convert", kind, str(source), "--out", str(out), "--processes", "1"])


@pytest.mark.parametrize(("world_size", "workers", "start"), [(1, 0, 0), (1, 2, 5), (2, 0, 3)])
def test_a_folder_gives_the_batches_of_its_conversion(photos, tmp_path, world_size, workers, start):
    convert("imagefolder", photos, tmp_path / "shards")
    folder, shards = open_dataset(photos), read_manifest(tmp_path / "shards")
    assert (folder.hash, folder.classes, folder.shards) == (shards.hash, shards.classes, shards.shards)
    assert (folder.samples == shards.samples).all()
    for rank in range(world_size):
        pairs = zip(*(batches(m, rank, world_size, workers, start) for m in (folder, shards)), strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours.images, theirs.images)
            assert torch.equal(ours.labels, theirs.labels)
            assert torch.equal(ours.indices, theirs.indices)


def test_a_flat_folder_has_no_classes_and_stands_in_a_list_beside_shards(photos, tmp_path):
    for number in range(100, 110):
        write(tmp_path / "pool" / f"{number}.png", number)
    convert("imagefolder", photos, tmp_path / "shards")
    convert("folder", tmp_path / "pool", tmp_path / "pool shards")
    there = read_manifests([tmp_path / "shards", tmp_path / "pool"])
    here = read_manifests([tmp_path / "shards", tmp_path / "pool shards"])
    assert there.hash == here.hash
    assert there.labels.tolist() == here.labels.tolist()
    assert (there.labels[60:] == -1).all()
    for sample_index in (0, 59, 60, 69):
        assert read_image(there, sample_index) == read_image(here, sample_index)
    assert there.folders == (tmp_path / "shards", tmp_path / "pool")


def test_the_images_are_read_once_and_a_changed_file_is_seen(photos, tmp_path, home, caplog):
    before = open_dataset(photos)
    assert "found               61" in caplog.text
    assert "no image by ending and content: class 0/notes.txt" in caplog.text
    caplog.clear()
    assert open_dataset(photos).hash == before.hash
    assert pickle.loads(pickle.dumps(before)).hash == before.hash
    assert caplog.text == ""  # nothing was read again
    (before.folder / "manifest.names.bin").write_bytes(b"damaged")
    assert open_dataset(photos).hash == before.hash
    path, _ = before.place_of(7)
    content = path.read_bytes()
    write(path, 999)
    with pytest.raises(DataError, match="has changed since the folder was opened"):
        read_image(before, 7)
    assert open_dataset(photos).hash != before.hash
    path.write_bytes(content)
    moved = photos.rename(tmp_path / "moved")
    assert open_dataset(moved).hash == before.hash  # where it lies is no part of it
    assert len(list((home / ".cache/visionmamba-pipeline/folders").glob("*/manifest.json"))) == 1


def test_an_edit_that_keeps_size_and_time_is_seen_when_the_image_is_read(tmp_path):
    for number in range(3):
        write(tmp_path / "pool" / f"{number}.ppm", 0)
    folder = open_dataset(tmp_path / "pool")
    path, _ = folder.place_of(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=path.name):
        read_image(folder, 1)


def test_what_cannot_be_decoded_is_named_with_the_way_out(photos, tmp_path):
    (photos / "class 1" / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")
    with pytest.raises(DataError, match=r"1 of 61 images cannot be converted") as caught:
        open_dataset(photos)
    assert "class 1/torn.jpg" in str(caught.value)
    assert f"convert imagefolder {photos} --out OUT --skip-unreadable" in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="there are no shards"):
        open_dataset(tmp_path / "empty")


def test_the_commands_take_a_folder_of_images(photos, tmp_path, capsys):
    main(["split", str(photos), "--out", str(tmp_path / "split.json"), "--labelled", "0.5"])
    main(["show", str(photos)])
    main(["verify", str(photos), "--processes", "1"])
    assert f"{photos}: 60 samples in 1 shards, no problems" in capsys.readouterr().out
    convert("imagefolder", photos, tmp_path / "shards")
    codes = json.loads((tmp_path / "split.json").read_text())
    assert codes["manifest"] == read_manifest(tmp_path / "shards").hash
    manifest = open_dataset(photos)
    assert isinstance(manifest, ImageFolder)
    path, _ = manifest.place_of(3)
    write(path, 5000)
    main(["verify", str(photos), "--processes", "1"])  # opened again, it is another dataset


def test_a_list_or_another_dataset_gives_a_folder_its_classes(photos, tmp_path):
    convert("imagefolder", photos, tmp_path / "shards")
    (tmp_path / "test/class 2").mkdir(parents=True)
    write(tmp_path / "test/class 2/1.png", 1)
    (tmp_path / "test/class 0").mkdir()  # without images
    with pytest.raises(DataError, match=r"class folder .* has no images"):
        open_dataset(tmp_path / "test")
    names = tmp_path / "names"
    names.write_text("class 2\nclass 1\nnone of it\nclass 0\n")
    asked = {"shards": tmp_path / "shards", "folder": photos, "list": names}
    found = {name: open_dataset(tmp_path / "test", Opening(path)) for name, path in asked.items()}
    assert found["shards"].hash == found["folder"].hash == open_dataset(tmp_path / "test", Opening(photos)).hash
    assert [(manifest.classes[2], manifest.labels.tolist()) for manifest in found.values()] == [
        ("class 2", [2]),
        ("class 2", [2]),
        ("none of it", [0]),
    ]
    main(["convert", "imagefolder", str(tmp_path / "test"), "--classes", str(names), "--out", str(tmp_path / "out")])
    assert read_manifest(tmp_path / "out").hash == found["list"].hash
    write(tmp_path / "pool/1.png", 3)
    pool = open_dataset(tmp_path / "pool", Opening(names))  # a pool in the classes of a labelled set
    main(["convert", "folder", str(tmp_path / "pool"), "--classes", str(names), "--out", str(tmp_path / "pool out")])
    assert (pool.hash, pool.classes[0], pool.labels.tolist()) == (
        read_manifest(tmp_path / "pool out").hash,
        "class 2",
        [-1],
    )
    splits = [tmp_path / f"{name}.json" for name in "ab"]
    main(["split", str(tmp_path / "test"), "--classes", str(names), "--out", str(splits[0])])
    main(["split", str(tmp_path / "out"), "--out", str(splits[1])])
    assert splits[0].read_bytes() == splits[1].read_bytes()


def test_a_folder_obeys_the_limit_on_pixels(photos, tmp_path, capsys):
    """A folder with an image above 64 million pixels opens if the limit is raised, and one above a lower limit does not."""
    large = photos / "class 0/large.png"
    write(large, 4, side=40)
    with pytest.raises(DataError, match=r"large.png: 40 x 40 pixels; at most 1,599 are decoded"):
        open_dataset(photos, Opening(max_pixels=1599))
    assert main(["verify", str(photos), "--max-pixels", "1600", "--processes", "1"]) == 0
    assert main(["verify", str(photos), "--max-pixels", "1599", "--processes", "1"]) == 3
    assert main(["check", str(photos), "--max-pixels", "1599", "--processes", "1"]) == 0
    assert "1 image cannot be decoded" in capsys.readouterr().out
    config = load_config(
        DistillConfig, ROOT / "configs/distill/smoke.yaml", [f"data.train={photos}", "data.max_pixels=99"]
    )
    assert config.data.opening == Opening(None, 99)
