"""Labels that a person adds: a dataset without labels gets them, everything else stays, and a wrong table is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import main as data
from pipeline.datasets.added_labels import read_labels, with_labels
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.manifest import Manifest, read_image, read_manifest
from pipeline.datasets.splits import make_split
from pipeline.errors import ConfigError, DataError


@pytest.fixture
def partly(tmp_path: Path) -> Manifest:
    """Two classes of four images, and six images without a label."""
    rng = np.random.default_rng(0)
    for folder, number in (("a", 4), ("b", 4), ("pool", 6)):
        for k in range(number):
            file = tmp_path / "images" / folder / f"{folder}{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    out, pool = tmp_path / "shards", tmp_path / "images" / "pool"
    assert data(["convert", "imagefolder", str(tmp_path / "images"), "--unlabelled", str(pool), "--out", str(out)]) == 0
    return read_manifest(out)


def table(path: Path, manifest: Manifest, labels: dict[int, str]) -> Path:
    lines = [f"{k},{manifest.key(k)},{name}" for k, name in labels.items()]
    path.write_text("\n".join(["sample_index,key,label", *lines]) + "\n")
    return path


def test_new_labels_reach_the_dataset_and_its_split_and_nothing_else_changes(partly: Manifest, tmp_path: Path) -> None:
    split = make_split(partly, SplitConfig(validation_per_class=1), 0)
    pool = split.subset("unlabelled")
    assert len(pool) == 6
    given = {int(pool[0]): "b", int(pool[3]): "a", int(pool[4]): ""}
    added = read_labels(table(tmp_path / "t.csv", partly, given), partly)
    assert added == {int(pool[0]): 1, int(pool[3]): 0}
    written, more = with_labels(partly, split, added, tmp_path / "more")
    assert more is not None
    changed = np.flatnonzero(written.labels != partly.labels)
    assert changed.tolist() == sorted(added)
    assert set(more.subset("labelled")) == set(split.subset("labelled")) | set(added)
    assert (more.subset("validation") == split.subset("validation")).all()
    assert "2 images labelled later, chosen by label-next" in more.protocol
    assert all(read_image(written, k) == read_image(partly, k) for k in range(partly.num_samples))
    assert data(["verify", str(tmp_path / "more")]) == 0


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("sample_index,key\n0,x\n", DataError, "has no column label"),
        ("sample_index,key,label\n0,x,a\n", DataError, "line 2: .* has no image 'x' at '0'"),
        ("sample_index,key,label\n99,x,a\n", DataError, "has no image 'x' at '99'"),
        ("sample_index,key,label\nzero,x,a\n", DataError, "has no image 'x' at 'zero'"),
        ("sample_index,key,label\n", DataError, "has no label yet"),
        ("", DataError, "has no label yet"),
        ("sample_index,key,label\n0,{key}\n", DataError, "has no label yet"),
        ("sample_index,key,label\n0,{key},c\n", ConfigError, "line 2 'c'; known: a, b"),
        ("sample_index,key,label\n0,{key},a\n0,{key},b\n", DataError, "two different labels"),
    ],
)
def test_a_table_that_is_wrong_is_refused_with_its_line(
    partly: Manifest, tmp_path: Path, text: str, error: type[Exception], said: str
) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text.format(key=partly.key(0)))
    with pytest.raises(error, match=said):
        read_labels(path, partly)


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_table_that_a_spreadsheet_of_another_language_saved_is_read(
    partly: Manifest, tmp_path: Path, delimiter: str
) -> None:
    path = table(tmp_path / "t.csv", partly, {0: "b"})
    path.write_text("\ufeff" + path.read_text().replace(",", delimiter))
    assert read_labels(path, partly) == {0: 1}


def test_a_table_that_is_not_there_is_named(partly: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.csv does not exist; give the table that label-next wrote"):
        read_labels(tmp_path / "none.csv", partly)


def test_an_existing_folder_is_never_written_over(partly: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists; give another folder"):
        with_labels(partly, None, {0: 0}, tmp_path)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_encodings_of_spreadsheets_and_commas_in_titles_are_read(tmp_path: Path, encoding: str) -> None:
    rng = np.random.default_rng(0)
    for folder in ("Häuser, alt", "b", "pool"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "images" / folder / "0.png")
    command = ["convert", "imagefolder", str(tmp_path / "images"), "--unlabelled", str(tmp_path / "images/pool")]
    assert data([*command, "--out", str(tmp_path / "out")]) == 0
    manifest = read_manifest(tmp_path / "out")
    path = tmp_path / "t.csv"
    path.write_bytes(f'sample_index;key;label;"note, a, b"\n0;{manifest.key(0)};Häuser, alt;x\n'.encode(encoding))
    assert read_labels(path, manifest) == {0: manifest.classes.index("Häuser, alt")}
    path.write_text(f'sample_index,key,label,"note; a; b; c; d"\n0,{manifest.key(0)},b,x\n')
    assert read_labels(path, manifest) == {0: manifest.classes.index("b")}
