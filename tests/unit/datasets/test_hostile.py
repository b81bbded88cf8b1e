"""Damaged and hostile input: always a sentence or a counted skip, never another exception and never a silent loss."""

import contextlib
import io
import itertools
import json
import shutil
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.datasets.manifest import HEADER, Manifest, read_manifest, write_manifest
from pipeline.datasets.tars import scan_shard
from pipeline.decoding import MAX_PIXELS, Decoding
from pipeline.errors import DataError
from pipeline.images import UnreadableImage, decode
from pipeline.streaming.config import AugmentConfig, LoaderConfig
from pipeline.streaming.loader import Loader, evaluation_batches
from pipeline.streaming.transforms import eval_views, train_views

MEAN = STD = (0.5,) * 3
VIEWS = train_views((8, 8), AugmentConfig(), MEAN, STD)


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(members: list[tuple[str, bytes, bytes]], **options) -> bytes:
    """Members of name, content and type."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = len(content) if kind in (b"0", b"S") else 0
            tar.addfile(member, io.BytesIO(content) if member.size else None)
    return buffer.getvalue()


def good(count: int = 6) -> list[tuple[str, bytes, bytes]]:
    return [
        m for k in range(count) for m in ((f"s{k}.cls", str(k % 3).encode(), b"0"), (f"s{k}.png", png(40 * k), b"0"))
    ]


def scan(content: bytes, folder: Path):
    path = folder / "000000.tar"
    path.write_bytes(content)
    return scan_shard(path, num_classes=3)


HOSTILE = {
    "outside": ([("../../etc/x.png", png(), b"0")], "points outside the dataset"),
    "absolute": ([("/etc/x.png", png(), b"0")], "points outside the dataset"),
    "hidden outside": ([("a/../../x.png", png(), b"0")], "points outside the dataset"),
    "backslash": ([("a\\x.png", png(), b"0")], "points outside the dataset"),
    "symbolic link": ([("x.png", b"", b"2")], "a symbolic link"),
    "hard link": ([("x.png", b"", b"1")], "a hard link"),
    "device": ([("x.png", b"", b"3")], "no regular file"),
    "fifo": ([("x.png", b"", b"6")], "no regular file"),
    "duplicate": ([("x.png", png(), b"0"), ("x.png", png(1), b"0")], "'x' has two images"),
    "two formats": ([("x.png", png(), b"0"), ("x.jpg", png(1), b"0")], "'x' has two images"),
    "empty image": ([("x.png", b"", b"0")], "has 0 bytes"),
    "no number": ([("x.cls", b"cat", b"0"), ("x.png", png(), b"0")], "not a class number"),
    "negative": ([("x.cls", b"-2", b"0"), ("x.png", png(), b"0")], "not a class number"),
    "unknown class": ([("x.cls", b"3", b"0"), ("x.png", png(), b"0")], "is 3, but there are 3 classes"),
    "label without an image": ([("x.cls", b"1", b"0"), ("x.heif2", b"?", b"0")], "1 labels have no image .* x.cls"),
    "compound image": ([("x.input.jpg", png(), b"0")], "say which members are the images with --image-key input.jpg"),
    "compound label": ([("x.png", png(), b"0"), ("x.output.cls", b"1", b"0")], "--label-key output.cls"),
    "two labels": ([("x.cls", b"1", b"0"), ("x.cls", b"2", b"0"), ("x.png", png(), b"0")], "two labels"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_hostile_tar_is_refused_with_a_sentence(tmp_path, name, form):
    members, sentence = HOSTILE[name]
    with pytest.raises(DataError, match=sentence):
        scan(tar_of(good() + members, format=form), tmp_path)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_name_that_no_file_system_takes_is_refused_in_a_short_sentence(tmp_path, form):
    with tarfile.open(tmp_path / "000000.tar", "w", format=form) as tar:
        tar.addfile(tarfile.TarInfo("y" * 60_000 + ".png"))
    with pytest.raises(DataError, match=r"has 6000\d bytes; at most 4096") as error:
        scan_shard(tmp_path / "000000.tar")
    assert len(str(error.value)) < 400


def test_long_and_foreign_names_are_read_in_every_format(tmp_path):
    name = "class-ü/" + "x" * 180
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        index = scan(tar_of([(f"{name}.png", png(7), b"0")], format=form), tmp_path)
        assert index.members == [f"{name}.png"]
        assert (tmp_path / "000000.tar").read_bytes()[index.offsets[0] :].startswith(png(7))


def test_pickles_and_programs_in_a_tar_are_bytes_and_nothing_else(tmp_path):
    members = [*good(), ("s0.pyd", b"cos\nsystem\n(S'touch pwned'\ntR.", b"0"), ("s0.json", b"{", b"0")]
    assert scan(tar_of(members), tmp_path).shard.count == 6


def test_a_tar_without_its_end_and_two_tars_in_one_file_are_refused(tmp_path):
    whole = tar_of(good())
    with pytest.raises(DataError, match="no end-of-archive mark"):
        scan(whole[: len(whole.rstrip(b"\0")) + 511 & ~511], tmp_path)
    with pytest.raises(DataError, match="data after the end-of-archive mark"):
        scan(whole + whole, tmp_path)
    with pytest.raises(DataError, match="no end-of-archive mark"):
        scan(b"", tmp_path)


def test_bombs_are_refused_before_their_pixels_exist(tmp_path):
    side = int(MAX_PIXELS**0.5) + 1

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = side.to_bytes(4) * 2 + bytes([1, 0, 0, 0, 0])
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
    with pytest.raises(DataError, match="at most 64,000,000 are decoded"):
        decode(bomb)
    head = tarfile.TarInfo("x.png")
    head.size = 2**40
    with pytest.raises(DataError, match="the tar is cut off"):
        scan(tar_of(good())[:-10240] + head.tobuf(tarfile.GNU_FORMAT) + bytes(1024), tmp_path)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_damage_to_a_tar_is_refused_or_leaves_only_samples_that_are_there(sandbox, data):
    content = bytearray(tar_of(good()))
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["flip", "cut", "zero", "insert", "swap"])):
            case "flip":
                content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[data.draw(st.integers(0, len(content) - 1)) :]
                content = content or bytearray(1)
            case "zero":
                at = data.draw(st.integers(0, len(content) - 1))
                content[at : at + 512] = bytes(len(content[at : at + 512]))
            case "insert":
                at = data.draw(st.integers(0, len(content)))
                content[at:at] = data.draw(st.binary(min_size=1, max_size=600))
            case "swap":
                a, b = (512 * data.draw(st.integers(0, len(content) // 512)) for _ in range(2))
                content[a : a + 512], content[b : b + 512] = content[b : b + 512], content[a : a + 512]
    try:
        index = scan(bytes(content), sandbox)
    except DataError:
        return
    assert len(set(index.members)) == index.shard.count
    for offset, length in zip(index.offsets, index.lengths, strict=True):
        assert length > 0
        assert offset + length <= len(content)
        with contextlib.suppress(UnreadableImage):  # what a loader counts and replaces
            decode(bytes(content[offset : offset + length]))
    assert all(-1 <= label < 3 for label in index.labels)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_any_damage_to_a_manifest_is_refused_or_changes_nothing(sandbox, data, train):
    folder = sandbox / "manifest"
    if not folder.exists():
        shutil.copytree(train.folder, folder)
    header = json.loads((train.folder / HEADER).read_text())
    names = [HEADER, "manifest.samples.npy", "manifest.names.bin"]
    for name in names:
        (folder / name).write_bytes((train.folder / name).read_bytes())
    if data.draw(st.booleans()):
        field = data.draw(st.sampled_from([*header, "shards.0.name", "shards.0.size", "shards.0.count"]))
        strange = st.one_of(
            st.none(),
            st.integers(-5, 2**70),
            st.text(max_size=8),
            st.sampled_from(
                ["../train/000000.tar", "/etc/passwd", "pipe:cat x", "file:///", [], {}, [1, 2], 1.5, True]
            ),
        )
        node, leaf = (header["shards"][0], field[9:]) if "." in field else (header, field)
        node[leaf] = data.draw(strange)
        (folder / HEADER).write_text(json.dumps(header))
    else:
        path = folder / data.draw(st.sampled_from(names))
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] ^= data.draw(st.integers(1, 255))
        else:
            del content[at:]
        path.write_bytes(content)
    try:
        manifest = read_manifest(folder)
        members = [manifest.member(sample_index) for sample_index in range(0, manifest.num_samples, 97)]
    except DataError:
        return
    assert members == [train.member(sample_index) for sample_index in range(0, train.num_samples, 97)]
    assert manifest.num_samples == train.num_samples
    assert (manifest.samples == train.samples).all()
    assert [shard.name for shard in manifest.shards] == [shard.name for shard in train.shards]


def with_damage(folder: Path, damaged: set[int], count: int = 64) -> Manifest:
    """A dataset of `count` images of which some are no images."""
    folder.mkdir()
    members = [(f"s{k:03d}.png", b"no image" if k in damaged else png(k), b"0") for k in range(count)]
    path = folder / "000000.tar"
    path.write_bytes(tar_of(members))
    return write_manifest(folder, [], [scan_shard(path)])


def loader_of(manifest: Manifest, rank: int = 0, world_size: int = 1, **options) -> Loader:
    config = LoaderConfig(virtual_readers=4, workers=0, max_unreadable=options.pop("allowed"))
    shared = {"global_batch": 16, "seed": 0, "views": VIEWS, "config": config}
    sample_indices = np.arange(manifest.num_samples)
    return Loader(manifest, sample_indices, rank=rank, world_size=world_size, **shared, **options)


def test_an_unreadable_sample_is_replaced_counted_and_named_and_batches_stay_equal_on_every_rank(tmp_path):
    damaged = {5, 6, 40}
    manifest = with_damage(tmp_path / "data", damaged)
    quarantine = tmp_path / "quarantine.jsonl"
    loader = loader_of(manifest, allowed=0.2, quarantine=quarantine)
    whole = list(itertools.islice(loader.batches(), 4))
    named = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted(line["sample_index"] for line in named) == sorted(damaged)
    assert all(line["shard"] == "000000.tar" and "not a readable image" in line["reason"] for line in named)
    served = np.concatenate([batch.indices.numpy() for batch in whole])
    assert not damaged & set(served.tolist())
    assert set(range(64)) - damaged == set(served.tolist())
    for world_size in (2, 4):
        ranks = [
            list(itertools.islice(loader_of(manifest, r, world_size, allowed=1.0).batches(), 4))
            for r in range(world_size)
        ]
        joined = np.concatenate([rank[step].indices.numpy() for step in range(4) for rank in ranks])
        assert (joined == served).all()


def test_too_many_unreadable_samples_end_the_run(tmp_path):
    manifest = with_damage(tmp_path / "data", set(range(10)))
    with pytest.raises(DataError, match=r"cannot be decoded, 6 are allowed .* raise data\.loader\.max_unreadable"):
        list(itertools.islice(loader_of(manifest, allowed=0.1).batches(), 10))
    hopeless = with_damage(tmp_path / "hopeless", set(range(64)))
    with pytest.raises(DataError, match=r"100 images of .* in a row cannot be decoded"):
        next(loader_of(hopeless, allowed=1.0).batches())


def test_one_large_image_does_not_end_a_training_and_is_named(tmp_path):
    """Too large is not unreadable: it is left out and named, however few unreadable samples are allowed."""
    folder = tmp_path / "data"
    folder.mkdir()
    large = io.BytesIO()
    Image.new("L", (40, 30)).save(large, "PNG")
    members = [(f"s{k:03d}.png", large.getvalue() if k == 5 else png(k), b"0") for k in range(64)]
    (folder / "000000.tar").write_bytes(tar_of(members))
    manifest = write_manifest(folder, [], [scan_shard(folder / "000000.tar")])
    shared = {"global_batch": 16, "seed": 0, "rank": 0, "world_size": 1, "quarantine": tmp_path / "quarantine.jsonl"}
    shared["config"] = LoaderConfig(virtual_readers=4, workers=0, max_unreadable=0)

    def served(limit: int) -> set[int]:
        views = train_views((8, 8), AugmentConfig(), MEAN, STD, Decoding(max_pixels=limit))
        loader = Loader(manifest, np.arange(64), views=views, **shared)
        return {k for batch in itertools.islice(loader.batches(), 4) for k in batch.indices.tolist()}

    assert served(1199) == set(range(64)) - {5}
    assert "40 x 30 pixels; at most 1,199 are decoded" in shared["quarantine"].read_text()
    assert served(1200) == set(range(64))


def test_what_was_done_to_images_is_counted_in_the_log(tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(picture, "PNG")
    (folder / "000000.tar").write_bytes(tar_of([(f"s{k}.png", picture.getvalue(), b"0") for k in range(32)]))
    manifest = write_manifest(folder, [], [scan_shard(folder / "000000.tar")])
    ground = (10, 200, 30)
    views = train_views((8, 8), AugmentConfig(), (0, 0, 0), (1, 1, 1), Decoding(ground=ground))
    with caplog.at_level("INFO"):
        config = LoaderConfig(virtual_readers=4, workers=1)
        loader = Loader(
            manifest, np.arange(32), global_batch=16, seed=0, rank=0, world_size=1, views=views, config=config
        )
        batch = next(loader.batches())
        loader.close()
    assert torch.allclose(batch.images[0, :, 0, 0], torch.tensor(ground) / 255, atol=1e-3)
    assert (
        "this process has read 16 images with transparent pixels, which are put on a ground of the colour"
        in caplog.text
    )


def test_evaluation_never_skips(tmp_path):
    manifest = with_damage(tmp_path / "data", {3})
    options = {"batch_size": 8, "rank": 0, "world_size": 1, "views": eval_views((8, 8), MEAN, STD)}
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"evaluation sample 's003' .* a score must count every sample"):
            list(evaluation_batches(manifest, np.arange(64), workers=workers, **options))
