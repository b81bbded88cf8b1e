"""A list labels the images that it names, and never others."""

import os
import unicodedata
from pathlib import Path

import pytest

from pipeline.data import main
from pipeline.datasets.lists import read_list
from pipeline.datasets.manifest import read_manifest
from pipeline.errors import DataError
from tests.unit.datasets.sources import convert, put

NAMES = (
    "cat/my photo (1).jpg",
    "dog/my photo (1).jpg",
    "cat/IMG_1.jpg",
    "dog/IMG_1.jpg",
    "cat/IMG_9.jpg",
    "dog/a, b.jpg",
)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    put(tmp_path / "in", *NAMES)
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    return tmp_path / "out"


def named(dataset: Path, content: bytes | str) -> set[str]:
    path = dataset.parent / "list"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    manifest = read_manifest(dataset)
    return {manifest.key(int(sample_index)) for sample_index in read_list(path, manifest)[0]}


PHOTOS = {"cat/my photo (1)", "dog/my photo (1)"}
IMAGES = {"cat/IMG_1", "dog/IMG_1"}
LISTS = {
    "spaces": ("cat/my photo (1).jpg\ndog/my photo (1).jpg\n", PHOTOS),
    "spaces and a label": ("cat/my photo (1).jpg 0\ndog/my photo (1).jpg 1\n", PHOTOS),
    "spaces and columns": ("file,label\ncat/my photo (1).jpg,0\n1,dog/my photo (1).jpg\n", PHOTOS),
    "quotes": ('"dog/a, b.jpg",dog\n', {"dog/a, b"}),
    "commas in the name": ("dog/a, b.jpg\n", {"dog/a, b"}),
    "byte order mark and Windows' ends": (b"\xef\xbb\xbfcat/IMG_1.jpg\r\ndog/IMG_1.jpg\r\n", IMAGES),
    "utf-16": ("cat/IMG_1.jpg\r\ndog/IMG_1.jpg\r\n".encode("utf-16"), IMAGES),
    "backslashes": ("cat\\IMG_1.jpg\ndog\\IMG_1.jpg\n", IMAGES),
    "a folder above": ("C:\\data\\train\\cat\\IMG_1.jpg\n./train/dog/IMG_1.JPEG 7\n", IMAGES),
    "without ending": ("cat/IMG_1\ndog/IMG_1\n", IMAGES),
    "alone": ("IMG_9.jpg\n", {"cat/IMG_9"}),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_names_images_by_whole_lines_columns_and_folders(dataset, name):
    content, expected = LISTS[name]
    assert named(dataset, content) == expected


WRONG = {
    "another folder": "dog/IMG_9.jpg\ndog/IMG_1.jpg\n",
    "several": "IMG_1.jpg\ncat/IMG_9.jpg\n",
    "gone, in the first line": "dog/gone.jpg\ndog/IMG_1.jpg\n",
    "gone, without folder or digits": "gone.jpg\ndog/IMG_1.jpg\n",
    "a class is no image": "cat,nothing.jpg\n",
    "a number below 0": "-1\n3\n",
    "a name before numbers": "dog/gone.jpg\n0\n1\n",
}


@pytest.mark.parametrize("name", WRONG)
def test_a_name_of_another_folder_or_of_several_images_is_no_match(dataset, name):
    with pytest.raises(DataError, match="name no image of the dataset, or more than one"):
        named(dataset, WRONG[name])


def test_a_first_line_is_a_title_only_if_it_names_nothing(tmp_path, caplog):
    put(tmp_path / "in", "cat/alpha.jpg", "dog/alpha.jpg", "cat/beta.jpg")
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert named(tmp_path / "out", "cat/alpha.jpg\ndog/alpha.jpg\n") == {"cat/alpha", "dog/alpha"}
    assert named(tmp_path / "out", "cat/alpha\nbeta\n") == {"cat/alpha", "cat/beta"}
    assert not caplog.records
    assert named(tmp_path / "out", "image,label\nbeta.jpg,cat\n") == {"cat/beta"}
    assert "'image,label', names no image and is taken for column titles" in caplog.text


def test_a_unicode_form_and_a_dot_in_a_name_make_no_difference(tmp_path):
    name = unicodedata.normalize("NFD", "caf\u00e9.1.jpg")
    put(tmp_path / "in", f"cat/{name}", "dog/x.jpg")
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert named(tmp_path / "out", "cat/caf\u00e9.1.jpg\n") == {unicodedata.normalize("NFD", "cat/caf\u00e9_1")}


PLACES = (
    "cat/a.jpg",
    "cat/a-b.jpg",
    "cat/a.1.jpg",
    "cat/a0.jpg",
    "cat/sub/z.jpg",
    "cat/sub-2/z.jpg",
    "Dog/b.jpg",
    "dog/b.png",
)


def as_torchvision(root: Path) -> list[str]:
    """The samples of torchvision.datasets.ImageFolder, by the loops of its `make_dataset`."""
    found = []
    for name in sorted(entry.name for entry in os.scandir(root) if entry.is_dir()):
        for folder, _, files in sorted(os.walk(root / name, followlinks=True)):
            found += [str(Path(folder, file).relative_to(root)) for file in sorted(files)]
    return found


@pytest.mark.parametrize("resize", [False, True])
def test_bare_numbers_are_places_in_torchvisions_imagefolder(tmp_path, caplog, resize):
    put(tmp_path / "in", *PLACES)
    put(tmp_path / "pool", "a.jpg", "0.jpg")
    options = ["--unlabelled", tmp_path / "pool", *(["--resize", "8"] if resize else [])]
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out", *options) == 0
    theirs = as_torchvision(tmp_path / "in")
    assert sorted(theirs) == sorted(PLACES)
    for place, name in enumerate(theirs):
        folder, _, file = name.rpartition("/")
        key = f"{folder}/{file.rpartition('.')[0].replace('.', '_')}"
        assert named(tmp_path / "out", f"{place}\n") == {key}
    assert "they are read as places" in caplog.text
    with pytest.raises(DataError, match="has number 8, but 8 samples are counted from 0"):
        named(tmp_path / "out", "8\n")


def test_the_command_says_how_it_reads_numbers(dataset, tmp_path, capsys):
    (tmp_path / "list").write_text("0\n1\n")
    assert main(["split", str(dataset), "--out", str(tmp_path / "s"), "--labelled-list", str(tmp_path / "list")]) == 0
    assert "2 labelled" in capsys.readouterr().out
