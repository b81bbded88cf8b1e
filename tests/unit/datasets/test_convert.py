import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.data import main
from pipeline.datasets.convert.digits import digits
from pipeline.datasets.manifest import Manifest, read_image, read_manifest, write_manifest
from pipeline.datasets.tars import scan_shard
from pipeline.images import decode, read_header
from tests.unit.storage.flaky import serve


def jpeg(seed: int, width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def contents(manifest: Manifest) -> dict[str, tuple[int, bytes]]:
    return {manifest.key(i): (int(manifest.labels[i]), read_image(manifest, i)) for i in range(manifest.num_samples)}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes, an awkward name, a nested folder, a file that is no image."""
    root = tmp_path / "tree"
    for c, name in enumerate(("ant", "b.ee", "cat")):
        for k in range(5):
            path = root / name / ("sub" if k == 4 else "") / f"img.{k}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(10 * c + k))
    (root / "cat" / "notes.txt").write_text("no image")
    return root


def test_an_image_folder_keeps_its_bytes_and_classes(tree: Path, tmp_path: Path, capsys):
    command = ["convert", "imagefolder", str(tree), "--out", str(tmp_path / "out"), "--samples-per-shard", "4"]
    assert main(command) == 0
    assert main(command) == 0
    assert "15 samples of 3 classes (ant, b.ee, cat) in 4 shards, already there" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == ("ant", "b.ee", "cat")
    expected = {
        f"{name}/{'sub/' if k == 4 else ''}img_{k}": (c, jpeg(10 * c + k))
        for c, name in enumerate(manifest.classes)
        for k in range(5)
    }
    assert contents(manifest) == expected
    assert len({manifest.labels[i] for i in range(4)}) > 1  # shuffled, not class after class
    (tree / "ant" / "new.jpg").write_bytes(jpeg(99))
    assert main(command) == 3
    assert "or its source has changed" in capsys.readouterr().err


def test_images_that_would_share_a_key_and_empty_classes_are_refused(tree: Path, tmp_path: Path, capsys):
    (tree / "ant" / "img_1.JPEG").write_bytes(jpeg(1))
    command = ["convert", "imagefolder", str(tree), "--out", str(tmp_path / "out")]
    assert main(command) == 3
    assert "would both be sample 'ant/img_1_JPEG'" in capsys.readouterr().err
    (tree / "ant" / "img_1.JPEG").unlink()
    (tree / "dog").mkdir()
    assert main(command) == 3
    assert "dog has no images" in capsys.readouterr().err
    assert main(["convert", "imagefolder", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 3


def test_a_resize_reduces_the_shorter_side_and_leaves_small_images_alone(tmp_path: Path):
    for k, size in enumerate(((40, 30), (120, 60))):
        path = tmp_path / "tree" / "a" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(k, *size))
    command = ["convert", "imagefolder", str(tmp_path / "tree"), "--out", str(tmp_path / "out"), "--resize", "32"]
    assert main(command) == 0
    found = contents(read_manifest(tmp_path / "out"))
    assert found["a/0"][1] == jpeg(0)
    assert decode(found["a/1"][1]).shape == (32, 64, 3)


def test_a_resize_applies_the_orientation_and_keeps_a_profile_of_rgb(tmp_path: Path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exif = Image.Exif()
    exif[0x0112] = 6
    scene = np.zeros((80, 40, 3), np.uint8)  # upright: light above, dark below
    scene[:60] = 250
    stored = Image.fromarray(scene).rotate(90, expand=True)
    folder = tmp_path / "tree" / "a"
    folder.mkdir(parents=True)
    stored.save(folder / "portrait.jpg", exif=exif, icc_profile=profile, quality=95)
    stored.convert("CMYK").save(folder / "print.jpg", icc_profile=b"\0" * 16 + b"CMYK" + bytes(108))
    transparent = Image.new("RGBA", (80, 40), (0, 0, 0, 0))
    transparent.save(folder / "logo.png")
    command = ["convert", "imagefolder", str(tmp_path / "tree"), "--out", str(tmp_path / "out"), "--resize", "20"]
    assert main([*command, "--processes", "1"]) == 0
    found = contents(read_manifest(tmp_path / "out"))
    small = found["a/portrait"][1]
    assert decode(small).shape == (40, 20, 3)
    assert decode(small)[5, 10].mean() > 200 > 50 > decode(small)[35, 10].mean()
    assert Image.open(io.BytesIO(small)).getexif().get(0x0112) is None
    assert read_header(small).rgb_profile == profile
    assert "icc_profile" not in Image.open(io.BytesIO(found["a/print"][1])).info
    assert (decode(found["a/logo"][1]) == 255).all()


def test_the_ground_of_a_resize_and_the_limit_of_a_conversion_can_be_chosen(tmp_path: Path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (60, 40)).save(tmp_path / "in" / "nothing.png")
    command = ["convert", "folder", str(tmp_path / "in"), "--resize", "20", "--processes", "1"]
    for name, options, level in (("white", [], 255), ("black", ["--ground", "0,0,0"], 0)):
        assert main([*command, "--out", str(tmp_path / name), *options]) == 0
        assert (decode(read_image(read_manifest(tmp_path / name), 0)) == level).all()
    assert main([*command, "--out", str(tmp_path / "white"), "--ground", "0,0,0"]) == 3
    assert main([*command, "--out", str(tmp_path / "small"), "--max-pixels", "2399"]) == 3
    error = capsys.readouterr().err
    assert "60 x 40 pixels; at most 2,399 are decoded" in error
    assert "--max-pixels in other commands" in error


def test_a_resize_of_what_is_no_image_names_it(tmp_path: Path, capsys):
    folder = tmp_path / "tree" / "a"
    folder.mkdir(parents=True)
    for name, content in (("page.jpg", b"<html>404"), ("cut.jpg", jpeg(0, 90, 80)[:700])):
        (folder / name).write_bytes(content)
        command = ["convert", "imagefolder", str(tmp_path / "tree"), "--out", str(tmp_path / name), "--resize", "20"]
        assert main([*command, "--processes", "1"]) == 3
        assert f"{folder / name}: not a readable image" in capsys.readouterr().err
        (folder / name).unlink()


def test_imagenets_flat_validation_folder_in_each_form_of_its_truth(tmp_path: Path, capsys):
    wnids = ["n01", "n02", "n03"]
    root = tmp_path / "in"
    for c, wnid in enumerate(wnids):
        (root / "train" / wnid).mkdir(parents=True)
        (root / "train" / wnid / f"{wnid}_1.JPEG").write_bytes(jpeg(c))
    (root / "val").mkdir()
    classes = [2, 0, 1, 2]
    for k in range(4):
        (root / "val" / f"ILSVRC2012_val_0000000{k + 1}.JPEG").write_bytes(jpeg(50 + k))
    own_order = ["n03", "n01", "n02"]  # the development kit counts in an order of its own
    forms = {
        "kaggle": "ImageId,PredictionString\n"
        + "".join(f"ILSVRC2012_val_0000000{k + 1},{wnids[c]} 1 2 3 4\n" for k, c in enumerate(classes)),
        "pairs": "".join(f"ILSVRC2012_val_0000000{k + 1}.JPEG {wnids[c]}\n" for k, c in enumerate(classes)),
        "wnids": "".join(f"{wnids[c]}\n" for c in classes),
        "numbers": "".join(f"{own_order.index(wnids[c]) + 1}\n" for c in classes),
    }
    (tmp_path / "synsets").write_text("\n".join(own_order))
    for form, text in forms.items():
        (tmp_path / form).write_text(text)
        command = ["convert", "imagenet", str(root), "--out", str(tmp_path / f"out-{form}"), "--processes", "1"]
        assert main([*command, "--truth", str(tmp_path / form), "--synsets", str(tmp_path / "synsets")]) == 0
        val = contents(read_manifest(tmp_path / f"out-{form}" / "val"))
        assert [val[f"ILSVRC2012_val_0000000{k + 1}"] for k in range(4)] == [
            (c, jpeg(50 + k)) for k, c in enumerate(classes)
        ]
    command = ["convert", "imagenet", str(root), "--out", str(tmp_path / "other")]
    assert main(command) == 2
    assert "give --truth" in capsys.readouterr().err
    assert main([*command, "--truth", str(tmp_path / "numbers")]) == 3
    assert "give --synsets" in capsys.readouterr().err


def test_parquet_as_the_datasets_library_writes_it(tmp_path: Path):
    pa = pytest.importorskip("pyarrow", reason="parquet is an optional extra")
    import pyarrow.parquet as pq

    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for part in range(2):
        images = [{"bytes": jpeg(10 * part + k), "path": f"{k}.jpg"} for k in range(7)]
        table = pa.table({"image": images, "label": [k % 2 for k in range(7)]})
        table = table.replace_schema_metadata({b"huggingface": json.dumps(names).encode()})
        (tmp_path / "in").mkdir(exist_ok=True)
        pq.write_table(table, tmp_path / "in" / f"train-{part:05d}-of-00002.parquet", row_group_size=3)
    command = ["convert", "parquet", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--samples-per-shard", "5"]
    assert main(command) == 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.classes == ("cat", "dog")
    found = contents(manifest)
    assert found["train-00001-of-00002/0000003"] == (1, jpeg(13))
    assert len(found) == 14
    assert main([*command[:-2], "--label-column", "fine_label"]) == 3


def test_existing_tars_are_indexed_where_they_lie_and_behind_a_url(digits_folder: Path, tmp_path: Path, capsys):
    folder = tmp_path / "tars"
    folder.mkdir()
    for path in (digits_folder / "test").glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert main(["convert", "tars", str(folder)]) == 0
    manifest = read_manifest(folder)
    assert contents(manifest) == contents(read_manifest(digits_folder / "test"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "000000.tar",
        "000001.tar",
        "manifest.json",
        "manifest.names.bin",
        "manifest.samples.npy",
    ]
    with serve(folder) as (url, _):
        assert main(["convert", "tars", url + "/{000000..000001}.tar", "--out", str(tmp_path / "a")]) == 0
        assert main(["convert", "tars", url, "--out", str(tmp_path / "b")]) == 0
        for name in ("a", "b"):
            there = read_manifest(tmp_path / name)
            assert there.location == url
            assert there.hash == manifest.hash
    with tarfile.open(folder / "000002.tar", "w") as tar:
        member = tarfile.TarInfo(manifest.member(0))
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    (folder / "manifest.json").unlink()
    assert main(["convert", "tars", str(folder)]) == 3
    assert "is in 000000.tar and in 000002.tar" in capsys.readouterr().err


def test_a_killed_conversion_is_continued_to_the_same_bytes(tmp_path: Path):
    for k in range(300):
        path = tmp_path / "tree" / f"c{k % 3}" / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(k, 200, 200))

    options = ["--samples-per-shard", "10", "--processes", "1", "--resize", "100"]
    command = ["convert", "imagefolder", str(tmp_path / "tree"), *options, "--out"]
    process = subprocess.Popen([sys.executable, "-m", "pipeline.data", *command, str(tmp_path / "killed")])
    deadline = time.monotonic() + 30
    while len(list((tmp_path / "killed").glob("*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.tar")}
    assert not (tmp_path / "killed" / "manifest.json").exists()
    assert main([*command, str(tmp_path / "killed")]) == 0
    assert main([*command, str(tmp_path / "straight")]) == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done  # whole shards were kept
    for path in (tmp_path / "straight").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert not [name for name in os.listdir(tmp_path / "killed") if name.endswith(".tmp")]


def test_verify_finds_a_flipped_byte_and_an_undecodable_image(tree: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with tarfile.open(out / "000000.tar", "w") as tar:
        for name, data in (("ant/img_0.jpg", jpeg(0)[:200]), ("ant/img_1.jpg", jpeg(1))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    write_manifest(out, [], [scan_shard(out / "000000.tar")])
    assert main(["verify", str(out)]) == 3
    message = capsys.readouterr().err
    assert "1 problem\n" in message
    assert "sample 'ant/img_0'" in message
    assert main(["convert", "imagefolder", str(tree), "--out", str(tmp_path / "good")]) == 0
    assert main(["verify", str(tmp_path / "good")]) == 0
    shard = tmp_path / "good" / "000000.tar"
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    assert main(["verify", str(tmp_path / "good")]) == 3
    assert "sha256 differs" in capsys.readouterr().err


def test_show_prints_counts_and_draws_a_contact_sheet(digits_folder: Path, tmp_path: Path, capsys):
    train = str(digits_folder / "train")
    split = ["split", train, "--out", str(tmp_path / "s"), "--imbalance", "10", "--labelled", "0.1"]
    assert main(split) == 0
    sheet = tmp_path / "sheet.png"
    assert main(["show", train, "--split", str(tmp_path / "s"), "--sheet", str(sheet)]) == 0
    text = capsys.readouterr().out
    assert "1,397 samples" in text
    assert "imbalance 1.0" in text
    assert "unlabelled: " in text
    with Image.open(sheet) as image:
        assert image.size == (160 + 8 * 96, 10 * 96)
        assert len(set(image.convert("L").tobytes())) > 10


def test_the_digits_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    bunch, sources = load_digits(), digits(seed=0)
    assert sum(len(source.items) for source in sources) == len(bunch.target) == 1797
    for source in sources:
        assert list(source.labels) == bunch.target[source.items].tolist()
        for item in (0, len(source.items) - 1):
            _, data = source.read(item)
            wanted = np.rint(bunch.images[source.items[item]] * (255 / 16)).astype(np.uint8)
            assert (np.asarray(Image.open(io.BytesIO(data))) == wanted).all()
