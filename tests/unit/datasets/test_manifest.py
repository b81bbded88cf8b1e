import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds

from pipeline.data import main
from pipeline.datasets import tables
from pipeline.datasets.manifest import HEADER, NAMES, SAMPLE, SAMPLES, Manifest, read_image, read_manifest
from pipeline.errors import DataError
from pipeline.files import sha256_of
from pipeline.images import decode


def test_digits_are_real_disjoint_and_balanced_in_test(digits_folder: Path, train: Manifest):
    from sklearn.datasets import load_digits

    test = read_manifest(digits_folder / "test")
    assert (train.num_samples, test.num_samples) == (1397, 400)
    assert np.bincount(test.labels).tolist() == [40] * 10
    keys = {train.key(i) for i in range(1397)} | {test.key(i) for i in range(400)}
    assert len(keys) == 1797
    scans = load_digits()
    for sample_index in range(0, 1397, 100):
        number = int(train.key(sample_index).removeprefix("digit-"))
        pixels = decode(read_image(train, sample_index))
        assert (pixels == np.rint(scans.images[number] * 255 / 16)[..., None]).all()
        assert train.labels[sample_index] == scans.target[number]


def test_the_shards_are_plain_webdataset(train: Manifest):
    path = train.folder / train.shards[0].name
    with path.open("rb") as file:
        samples = list(
            wds.tariterators.group_by_keys(wds.tariterators.tar_file_expander([{"stream": file, "url": ""}]))
        )
    assert [sample["__key__"] for sample in samples] == [train.key(i) for i in range(len(samples))]
    assert [int(sample["cls"]) for sample in samples] == train.labels[: len(samples)].tolist()


def test_a_second_conversion_says_so_and_another_folder_gets_the_same_bytes(digits_folder, tmp_path, capsys):
    assert main(["convert", "digits", "--out", str(tmp_path)]) == 0
    assert main(["convert", "digits", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("already there") == 2
    for path in sorted(tmp_path.rglob("*.*")):
        assert path.read_bytes() == (digits_folder / path.relative_to(tmp_path)).read_bytes(), path.name
    assert main(["convert", "digits", "--out", str(tmp_path), "--seed", "1"]) == 3
    assert "holds another conversion" in capsys.readouterr().err


@pytest.fixture
def copy(train: Manifest, tmp_path: Path) -> Path:
    return Path(shutil.copytree(train.folder, tmp_path / "copy"))


def test_a_missing_a_cut_and_no_shard_are_sentences(copy: Path, tmp_path: Path):
    shard = copy / "000002.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"000002\.tar has \d+ bytes, manifest\.json says"):
        read_manifest(copy)
    shard.unlink()
    with pytest.raises(DataError, match=r"000002\.tar is missing"):
        read_manifest(copy)
    with pytest.raises(DataError, match="there are no shards"):
        read_manifest(tmp_path)


def test_a_damaged_manifest_is_a_sentence(copy: Path):
    table = copy / SAMPLES
    content = bytearray(table.read_bytes())
    content[-1] ^= 1
    table.write_bytes(content)
    with pytest.raises(DataError, match=r"not the file that manifest\.json was written with"):
        read_manifest(copy)
    header = json.loads((copy / HEADER).read_text())
    (copy / HEADER).write_text(json.dumps(header | {"version": 99}))
    with pytest.raises(DataError, match="version 99"):
        read_manifest(copy)
    (copy / HEADER).write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        read_manifest(copy)


def test_names_that_were_changed_are_refused_when_they_are_read_and_stop_no_training(copy: Path):
    content = bytearray((copy / NAMES).read_bytes())
    content[0] ^= 1
    (copy / NAMES).write_bytes(content)
    manifest = read_manifest(copy)
    assert manifest.labels.min() >= 0
    with pytest.raises(DataError, match=r"names\.bin is not the file that manifest\.json was written with"):
        manifest.key(5)


@pytest.mark.parametrize("place", [0, 1, 777, -1])
@pytest.mark.parametrize("field", ["offset", "name", "label"])
def test_a_row_that_contradicts_the_others_is_found_in_every_piece(tmp_path: Path, monkeypatch, field: str, place: int):
    monkeypatch.setattr(tables, "_ROWS", 100)
    count, per_shard = 1234, 70
    rows = np.zeros(count, SAMPLE)
    rows["offset"], rows["length"], rows["name"] = 1000 * (np.arange(count) % per_shard), 1000, 3 * np.arange(count)
    ends = np.minimum(np.arange(per_shard, count + per_shard, per_shard), count)
    sizes = np.full(len(ends), 1000 * per_shard, np.uint64)
    arguments = (sizes, ends, (3 * count, 1))
    path = tmp_path / "table.npy"
    np.save(path, rows)
    table = tables.open_table(path, SAMPLE, sha256_of(path))
    assert tables.check_table(path, table, sha256_of(path), *arguments) == ""
    with pytest.raises(DataError, match="is not the file"):
        tables.check_table(path, table, "0" * 64, *arguments)
    rows[field][place] = {"offset": 70_000, "name": 3 * count, "label": 1}[field]
    np.save(path, rows)
    table = tables.open_table(path, SAMPLE, sha256_of(path))
    sentences = {
        "offset": f"places sample {place % count} outside",
        "name": "names out of order",
        "label": "labels from 0 to 1",
    }
    assert sentences[field] in tables.check_table(path, table, sha256_of(path), *arguments)
