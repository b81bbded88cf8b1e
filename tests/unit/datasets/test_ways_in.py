"""Nothing that a person gives becomes another image, another label or nothing without a word."""

import bz2
import gzip
import io
import json
import lzma
import os
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.losses import Entry, changed_or_lost, corpus, silent_losses, unnamed
from pipeline.data import main
from pipeline.datasets.lists import read_list
from pipeline.datasets.manifest import read_manifest
from pipeline.errors import DataError
from pipeline.images import decode
from tests.unit.datasets.sources import convert, image, labels, members, parquet, put, tar

READ_TABLES = {
    "Excel's own first line": ("sep=;\r\nfile;kind\r\na.jpg;cat\r\nb.jpg;dog\r\n", {"a": "cat", "b": "dog"}),
    "old Mac": ("file,kind\ra.jpg,cat\rb.jpg,dog\r", {"a": "cat", "b": "dog"}),
    "a quoted line break": ('file,note,kind\na.jpg,"two\nlines",cat\nb.jpg,x,dog\n', {"a": "cat", "b": "dog"}),
    "a quote between tabs": ('file\tnote\tkind\na.jpg\t"x, y" z\tcat\n'.replace('" z', '"'), {"a": "cat"}),
    "a long field": ("file,note,kind\na.jpg," + "x" * 200_000 + ",cat\n", {"a": "cat"}),
    "-1 is no label": ("file,kind\na.jpg,-1\nb.jpg,0\n", {"a": None, "b": "0"}),
    "-1.0 is no label": ("file,kind\na.jpg,-1.0\nb.jpg,1.0\n", {"a": None, "b": "1"}),
    "-1 among names is one": ("file,kind\na.jpg,-1\nb.jpg,dog\n", {"a": "-1", "b": "dog"}),
    "empty fields at the end": ("file,kind,,\na.jpg,cat,,\nb.jpg,dog,,,,\n", {"a": "cat", "b": "dog"}),
}


@pytest.mark.parametrize("name", READ_TABLES)
def test_tables_that_are_read(tmp_path: Path, name: str) -> None:
    text, expected = READ_TABLES[name]
    put(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_bytes(text.encode())
    command = ["csv", tmp_path / "t.csv", "--image", "file", "--label", "kind"]
    assert convert(*command, "--out", tmp_path / "out") == 0
    assert labels(tmp_path / "out") == expected


REFUSED_TABLES = {
    "an open quote": ('file,kind\na.jpg,"cat\nb.jpg,dog\n', "line 3: a quote is left open"),
    "an open quote that another closes": (
        'file,kind\na.jpg,"cat\nb.jpg,"\n',
        "line 3: the image or the label has a line",
    ),
    "a comma without quotes": ("file,kind\na.jpg,cat,big\nb.jpg,dog\n", "line 2: 3 fields, but 2 titles"),
    "two columns of a title": ("file,kind,file\na.jpg,cat,b.jpg\n", "2 columns 'file'"),
    "a list as label": ('{"file": "a.jpg", "kind": ["cat", "dog"]}\n', "is no text and no number"),
    "no Unicode": ('{"file": "a.jpg", "kind": "\\ud800"}\n', "is no text of one line"),
    "a label of two lines": ('{"file": "a.jpg", "kind": "cat\\ndog"}\n', "is no text of one line"),
}


@pytest.mark.parametrize("name", REFUSED_TABLES)
def test_tables_that_would_lose_or_change_a_row_are_refused(tmp_path: Path, name: str, capsys) -> None:
    text, expected = REFUSED_TABLES[name]
    put(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text(text)
    command = ["csv", tmp_path / "t.csv", "--image", "file", "--label", "kind"]
    assert convert(*command, "--out", tmp_path / "out") == 3
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_table_beside_the_folder_of_all_images_leaves_the_others_without_a_label(tmp_path: Path, capsys) -> None:
    put(tmp_path / "all", "a.jpg", "b.jpg", "deep/c.jpg")
    put(tmp_path / "more", "d.jpg")
    (tmp_path / "t.csv").write_text("file,kind\na.jpg,cat\ndeep/c.jpg,dog\n")
    command = ["csv", tmp_path / "t.csv", "--root", tmp_path / "all", "--image", "file", "--label", "kind"]
    pools = ["--unlabelled", tmp_path / "all", tmp_path / "more"]
    assert convert(*command, *pools, "--out", tmp_path / "out") == 0
    expected = {"a": "cat", "deep/c": "dog", "unlabelled/0/b": None, "unlabelled/1/d": None}
    assert labels(tmp_path / "out") == expected
    assert "2  taken already: a.jpg, deep/c.jpg" in capsys.readouterr().out
    assert convert("folder", tmp_path / "more", "--out", tmp_path / "pool") == 0
    outside = tmp_path.parent / f"{tmp_path.name}-twice"
    twice = ["--unlabelled", tmp_path / "more", tmp_path / "more", tmp_path]
    assert convert(*command, *twice, "--out", outside) == 0
    assert sorted(labels(outside))[:3] == ["a", "deep/c", "unlabelled/0/d"]
    assert sorted(labels(outside))[3:] == ["unlabelled/2/all/b"]
    assert convert(*command, "--unlabelled", tmp_path / "all", "--out", tmp_path / "all" / "out") == 2


def test_a_link_to_itself_is_named_with_the_broken_ones(tmp_path: Path, capsys) -> None:
    put(tmp_path / "in", "cat/a.jpg", "dog/b.jpg")
    (tmp_path / "in/cat/loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "in/cat/broken.jpg").symlink_to("gone.jpg")
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 3
    error = capsys.readouterr().err
    assert "2 of 4 images cannot be converted" in error
    assert "loop.jpg cannot be read" in error
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out", "--skip-unreadable") == 0
    assert labels(tmp_path / "out") == {"cat/a": "cat", "dog/b": "dog"}


def test_classes_that_are_perhaps_none_are_shown(tmp_path: Path, capsys) -> None:
    put(tmp_path / "case", "Polar_Bear/a.jpg", "polar bear/b.jpg", "dog/c.jpg")
    assert convert("imagefolder", tmp_path / "case", "--out", tmp_path / "o1") == 0
    assert "kept apart: 'Polar_Bear' and 'polar bear'" in capsys.readouterr().out
    put(tmp_path / "parts", "train/cat/a.jpg", "train/dog/b.jpg", "val/cat/c.jpg")
    assert convert("imagefolder", tmp_path / "parts", "--out", tmp_path / "o2") == 0
    out = capsys.readouterr().out
    assert "'train', 'val' are taken as classes" in out
    assert "train/cat/a.jpg; if the folders below are the classes, add --nested" in out
    put(tmp_path / "plain", "cat/a.jpg", "dog/deep/b.jpg")
    assert convert("imagefolder", tmp_path / "plain", "--out", tmp_path / "o3") == 0
    assert "note" not in capsys.readouterr().out


def test_images_that_differ_in_their_ending_alone_are_all_kept_and_a_list_finds_them(tmp_path: Path) -> None:
    put(tmp_path / "in", "cat/1.jpg", "cat/2.jpg", "dog/1.jpg")
    for name, kind in (("cat/1.png", "PNG"), ("cat/1.webp", "WEBP")):
        (tmp_path / "in" / name).write_bytes(image(7, kind))
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    found = labels(tmp_path / "out")
    assert found == {"cat/1_jpg": "cat", "cat/1_png": "cat", "cat/1_webp": "cat", "cat/2": "cat", "dog/1": "dog"}
    manifest = read_manifest(tmp_path / "out")
    (tmp_path / "list").write_text("cat/1.png\ncat/1.jpg\ndog/1.jpg\n")
    keys = {manifest.key(int(k)) for k in read_list(tmp_path / "list", manifest)[0]}
    assert keys == {"cat/1_png", "cat/1_jpg", "dog/1"}
    (tmp_path / "list").write_text("cat/1.gif\n")
    with pytest.raises(DataError, match="name no image"):
        read_list(tmp_path / "list", manifest)


def test_no_file_of_the_corpus_is_lost_or_changed_without_a_word(tmp_path: Path) -> None:
    assert len(corpus()) >= 40
    assert silent_losses(tmp_path) == []


def test_a_changed_a_lost_and_an_unnamed_file_are_seen(tmp_path: Path) -> None:
    first, second, third = corpus()[:3]
    entries = [first, second, third, Entry("bad.jpg", b"", shows=False)]
    changed = Image.fromarray(decode(second.data)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for label in ("cat", "dog"):
        (tmp_path / "in" / label).mkdir(parents=True)
        (tmp_path / "in" / label / first.name).write_bytes(first.data)
        changed.save(tmp_path / "in" / label / second.name)
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    names = [f"{label}/{second.name} shows something else or has another label" for label in ("cat", "dog")]
    assert sorted(changed_or_lost(entries, tmp_path / "out")) == sorted(
        [*names, "an image is missing", "an image is missing"]
    )
    assert unnamed(entries, "nothing") == ["bad.jpg"]


def test_an_empty_path_is_no_folder(tmp_path: Path, capsys) -> None:
    put(tmp_path / "in", "cat/a.jpg")
    with pytest.raises(SystemExit, match="2"):
        convert("imagefolder", tmp_path / "in", "--out", "")
    assert "the path is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        convert("folder", "", "--out", tmp_path / "out")


OTHER_ARCHIVES = ["more.tgz", "more.tar.gz", "MORE.TAR", "more.zip", "below/more.tar"]


@pytest.mark.parametrize("name", OTHER_ARCHIVES)
def test_archives_beside_the_tars_that_are_not_read_are_named(tmp_path: Path, name: str, capsys) -> None:
    folder = tar(tmp_path / "in", members("cls", ["0", "1"]))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    assert convert("tars", folder) == 3
    assert f"1 archives that are not read: {name}" in capsys.readouterr().err
    (folder / name).unlink()
    (folder / "._000000.tar").write_bytes(b"Mac OS X")
    assert convert("tars", folder) == 0
    assert "1  hidden or of the system: ._000000.tar" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_a_compressed_tar_is_called_that(tmp_path: Path, name: str, pack, capsys) -> None:
    path = tar(tmp_path / "in", members("cls", ["0", "1"])) / "000000.tar"
    path.write_bytes(pack(path.read_bytes()))
    assert convert("tars", tmp_path / "in") == 3
    assert f"it is compressed with {name}, decompress it" in capsys.readouterr().err


def test_a_manifest_of_other_tars_or_options_is_not_taken_for_this_one(tmp_path: Path, capsys) -> None:
    rows = [json.dumps({"kind": name, "size": {"name": size}}) for name, size in (("a", "s"), ("b", "l"))]
    folder = tar(tmp_path / "in", members("json", rows))
    assert convert("tars", folder, "--label-key", "kind") == 0
    assert convert("tars", folder, "--label-key", "kind") == 0
    assert convert("tars", folder, "--label-key", "size.name") == 3
    assert "made with other options or classes; delete" in capsys.readouterr().err
    tar(folder, members("json", rows[:1]), "000001.tar")
    assert convert("tars", folder, "--label-key", "kind") == 3
    assert "has tars that its manifest lacks: 000001.tar" in capsys.readouterr().err
    (folder / "000001.tar").unlink()
    (folder / "manifest.json").unlink()
    assert convert("tars", folder, "--label-key", "size.name") == 0
    assert labels(folder) == {"s0": "s", "s1": "l"}
    assert main(["verify", str(folder), "--processes", "1"]) == 0


def test_tars_without_the_label_that_was_asked_for_or_without_an_image_are_refused(tmp_path: Path, capsys) -> None:
    folder = tar(tmp_path / "in", members("json", ['{"kind": "a"}']))
    assert convert("tars", folder, "--label-key", "klass") == 3
    assert "has a label in 'klass'; give another --label-key" in capsys.readouterr().err
    assert convert("tars", folder) == 0
    assert "no sample has a label; --label-key ENDING reads labels from other members" in capsys.readouterr().out
    assert convert("tars", tar(tmp_path / "empty", [])) == 3
    assert "hold no image that can be read; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "empty/manifest.json").exists()


def test_an_empty_member_can_be_left_out_and_minus_one_is_no_label(tmp_path: Path, capsys) -> None:
    content = [*members("cls", ["0", "-1", "1"]), ("z.jpg", b""), ("z.cls", b"0")]
    folder = tar(tmp_path / "in", content)
    assert convert("tars", folder) == 3
    assert "z.jpg: not a readable image (it is empty)" in capsys.readouterr().err
    assert convert("tars", folder, "--skip-unreadable") == 0
    assert labels(folder) == {"s0": "0", "s1": None, "s2": "1"}
    assert main(["verify", str(folder), "--processes", "1"]) == 0


def test_labels_of_parquet_as_pandas_writes_them(tmp_path: Path, capsys) -> None:
    rows = [{"bytes": image(k), "path": None} for k in range(3)]
    for name, values, expected in (
        ("floats", [0.0, float("nan"), 1.0], ["0", None, "1"]),
        ("truth", [True, False, None], ["True", "False", None]),
    ):
        parquet(tmp_path / name / "part.parquet", {"image": rows, "label": values})
        (tmp_path / name / "._part.parquet").write_bytes(b"Mac OS X")
        assert convert("parquet", tmp_path / name, "--out", tmp_path / f"{name}-out") == 0
        assert list(labels(tmp_path / f"{name}-out").values()) == expected
    os.rename(tmp_path / "floats/part.parquet", tmp_path / "floats/train-0.parquet")
    parquet(tmp_path / "floats/test-0.parquet", {"image": rows, "label": [0, 1, 0]})
    capsys.readouterr()
    assert convert("parquet", tmp_path / "floats", "--out", tmp_path / "both") == 0
    assert "parts of one dataset (test, train)" in capsys.readouterr().out


def test_every_converter_takes_a_list_of_classes(tmp_path, capsys):
    (tmp_path / "names").write_text("\n".join(("none of it", *"9876543210")))
    assert main(["convert", "digits", "--out", str(tmp_path / "digits")]) == 0
    named = ["--classes", str(tmp_path / "names"), "--processes", "1"]
    assert main(["convert", "digits", "--out", str(tmp_path / "turned"), *named]) == 0
    plain, turned = read_manifest(tmp_path / "digits/test"), read_manifest(tmp_path / "turned/test")
    assert turned.classes == ("none of it", *"9876543210")
    assert turned.labels.tolist() == (10 - plain.labels).tolist()
    (tmp_path / "names").write_text("0\n1\n")
    assert main(["convert", "digits", "--out", str(tmp_path / "few"), *named]) == 3
    assert "has 8 classes that --classes does not name: '2'" in capsys.readouterr().err
    options = {kind: main_help(kind, capsys) for kind in ("folder", "letters", "cifar", "stl10", "svhn", "huggingface")}
    assert all("--classes FILE" in text for text in options.values())


def main_help(kind: str, capsys) -> str:
    with pytest.raises(SystemExit):
        main(["convert", kind, "--help"])
    return capsys.readouterr().out


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_long_work_shows_counts_and_the_time_left_on_a_terminal(tmp_path, monkeypatch):
    put(tmp_path / "in", "cat/1.jpg", "dog/2.jpg", "dog/3.jpg")
    (tmp_path / "table.csv").write_text("file,kind\ncat/1.jpg,cat\ndog/2.jpg,dog\n")
    monkeypatch.setattr("pipeline.datasets.parallel.BAR_AFTER_SECONDS", 0)
    monkeypatch.setattr("sys.stderr", terminal := _Terminal())
    table = ["--image", "file", "--label", "kind", "--root", tmp_path / "in"]
    assert convert("csv", tmp_path / "table.csv", *table, "--out", tmp_path / "rows") == 0
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert main(["verify", str(tmp_path / "out"), "--processes", "1"]) == 0
    assert main(["check", str(tmp_path / "out"), "--processes", "1"]) == 0
    bars = terminal.getvalue()
    for unit in ("files found", "rows", "files", "images checked", "images", "shards", "comparisons of all images"):
        assert f" {unit}" in bars
    assert re.search(r"3/3 \[\d\d:\d\d<\d\d:\d\d", bars)  # done, elapsed and left


def test_folders_that_link_to_one_another_take_the_square_of_their_number_and_not_every_order_of_them(tmp_path, capsys):
    count = 12  # 12 factorial orders
    for number in range(count):
        put(tmp_path / "in", f"{number:02d}/{'x' * number}.jpg")
        for other in range(count):
            if other != number:
                (tmp_path / f"in/{number:02d}/to {other:02d}").symlink_to(f"../{other:02d}")
    (tmp_path / "out of it/deep").mkdir(parents=True)
    put(tmp_path / "out of it", "deep/y.jpg")
    (tmp_path / "in/00/far").symlink_to(tmp_path / "out of it")
    (tmp_path / "out of it/deeper").symlink_to("deep")  # behind two links, and entered once
    assert convert("folder", tmp_path / "in", "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    keys = labels(tmp_path / "out")
    assert {f"{number:02d}/{'x' * number}" for number in range(1, count)} <= set(keys)
    assert {"00/far/deep/y", "00/far/deeper/y", "00/to 01/x"} <= set(keys)
    assert len(keys) < count * count + count + 10
    assert "folder taken already through other links: " in text
    assert "link to a folder above it: " in text
