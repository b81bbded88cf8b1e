"""Strange manifests, splits and tars end in one sentence with exit code 3, under a second; nothing is waited for."""

import io
import json
import os
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.data import main
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.manifest import HEADER, NAMES, SAMPLE, SAMPLES, Manifest, read_manifest
from pipeline.datasets.splits import make_split, read_split, write_split
from pipeline.datasets.tars import scan_shard
from pipeline.errors import DataError
from pipeline.exit_codes import ExitCode
from pipeline.files import sha256_of


@pytest.fixture(autouse=True)
def within_seconds() -> Iterator[None]:
    """End a test that waits for a FIFO; not with an OSError, which the code under test may catch."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError("it still waits after 10 s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture
def copy(train: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(train.folder, tmp_path / "copy"))


def reseal(folder: Path, **changes: object) -> None:
    """Change fields of the header, and state the checksums of the tables as they are now."""
    header = json.loads((folder / HEADER).read_text())
    sums = {"samples_sha256": sha256_of(folder / SAMPLES), "names_sha256": sha256_of(folder / NAMES)}
    (folder / HEADER).write_text(json.dumps(header | sums | changes))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize("name", [HEADER, SAMPLES, NAMES, "000000.tar"])
def test_a_fifo_in_place_of_a_file_of_a_dataset_is_refused(copy: Path, name: str, capsys) -> None:
    (copy / name).unlink()
    os.mkfifo(copy / name)
    assert main(["show", str(copy)]) == ExitCode.DATA
    told = capsys.readouterr().err
    assert name in told
    assert len(told.splitlines()) == 1


def test_a_fifo_among_tars_is_refused(tmp_path: Path, capsys) -> None:
    os.mkfifo(tmp_path / "000000.tar")
    assert main(["convert", "tars", str(tmp_path)]) == ExitCode.DATA
    assert "is no regular file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "table",
    [b"", b"PK\x03\x04" + bytes(60), npy(np.array([{}], object)), npy(np.zeros((), SAMPLE)), npy(np.zeros(0, SAMPLE))],
    ids=["no bytes", "zip", "pickle", "no dimension", "no rows"],
)
def test_an_empty_or_foreign_table_is_refused(copy: Path, table: bytes) -> None:
    (copy / SAMPLES).write_bytes(table)
    reseal(copy)
    with pytest.raises(DataError, match=r"manifest\.json"):
        read_manifest(copy)


def test_a_table_without_samples_is_refused(copy: Path) -> None:
    (copy / SAMPLES).write_bytes(npy(np.zeros(0, SAMPLE)))
    (copy / NAMES).write_bytes(b"")
    reseal(copy, num_samples=0)
    with pytest.raises(DataError, match="describes no samples"):
        read_manifest(copy)


@pytest.mark.parametrize("name", ["a" * 5000 + ".tar", "\ud800.tar", "a\0.tar", "../x.tar"])
def test_a_shard_whose_name_no_file_can_have_is_refused(copy: Path, name: str) -> None:
    shards = json.loads((copy / HEADER).read_text())["shards"]
    reseal(copy, shards=[shards[0] | {"name": name}, *shards[1:]])
    with pytest.raises(DataError, match="lists a shard named") as raised:
        read_manifest(copy)
    assert len(str(raised.value)) < 400


def test_class_names_are_text_of_any_length(copy: Path, train: Manifest) -> None:
    reseal(copy, classes=["x" * 5000, *train.classes[1:]])
    assert read_manifest(copy).classes[0] == "x" * 5000
    assert main(["show", str(copy)]) == 0
    reseal(copy, classes=["\ud800", *train.classes[1:]])
    with pytest.raises(DataError, match="a class name that is not Unicode text"):
        read_manifest(copy)


def test_a_member_name_that_is_not_utf8_is_named_when_it_is_read(copy: Path) -> None:
    (copy / NAMES).write_bytes(b"\xff" * len((copy / NAMES).read_bytes()))
    reseal(copy)
    with pytest.raises(DataError, match=r"the name of sample 0, .* is not UTF-8"):
        read_manifest(copy).key(0)


@pytest.mark.parametrize("text", ["[" * 200_000, '{"version": ' + "9" * 6000 + "}", "[]", "", "null"])
def test_json_that_is_deep_or_huge_or_no_object_is_refused(train: Manifest, copy: Path, text: str) -> None:
    (copy / HEADER).write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        read_manifest(copy)
    (copy / "split.json").write_text(text)
    with pytest.raises(DataError, match="is damaged"):
        read_split(copy / "split.json", train)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)], ids=["fifo", "folder", "loop"]
)
def test_a_split_that_is_no_file_is_refused(
    train: Manifest, tmp_path: Path, make: Callable[[Path], None], capsys
) -> None:
    path = tmp_path / "split.json"
    make(path)
    assert main(["show", str(train.folder), "--split", str(path)]) == ExitCode.DATA
    assert "cannot be read" in capsys.readouterr().err


STRANGE = {
    "protocol": [5, None, "\ud800"],
    "seed": ["x" * 5000, None, 1.5],
    "config": [5, []],
    "class_ranks": [5, ["a"] * 10, [10] * 10, [0]],
    "ood_classes": ["x", [99999], [-1]],
    "num_classes": ["10", 10.0, True],
    "manifest": ["\ud800" * 5000, 5],
    "version": ["v" * 5000, None, "\ud800"],
    "codes": ["", "\ud800", 7, None],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in STRANGE.items() for v in [*values, ...]])
def test_a_split_with_a_strange_or_missing_field_is_refused(train: Manifest, tmp_path: Path, field: str, value) -> None:
    path = tmp_path / "split.json"
    write_split(make_split(train, SplitConfig(labelled=0.5), seed=0), path)
    content = json.loads(path.read_text())
    if value is ...:
        del content[field]
    else:
        content[field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"split\.json") as raised:
        read_split(path, train)
    assert len(str(raised.value)) < 800


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "\ud800"], ids=["long", "NUL", "surrogate"])
def test_a_path_that_no_file_can_have_is_refused(train: Manifest, path: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_manifest(Path(path))
    with pytest.raises(DataError, match="cannot be read"):
        read_split(Path(path), train)


def test_numbers_of_thousands_of_digits_in_a_pax_header_are_refused(tmp_path: Path) -> None:
    for record in (b"9" * 5000 + b" path=a\n", b"5019 size=" + b"9" * 5008 + b"\n"):
        head = tarfile.TarInfo("x")
        head.type, head.size = b"x", len(record)
        content = head.tobuf(tarfile.USTAR_FORMAT) + record + bytes(-len(record) % 512)
        (tmp_path / "000000.tar").write_bytes(content + bytes(1024))
        with pytest.raises(DataError, match="pax header"):
            scan_shard(tmp_path / "000000.tar")


def test_a_list_whose_file_name_is_not_utf8_gives_a_split_that_can_be_read(train: Manifest, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.txt")
    path.write_text("\n".join(train.key(k) for k in range(50)))
    write_split(make_split(train, SplitConfig(labelled_list=str(path)), seed=0), tmp_path / "split.json")
    assert "labelled as in caf?.txt" in read_split(tmp_path / "split.json", train).protocol
