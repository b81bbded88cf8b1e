"""Ways in: what a person has becomes a dataset, with its labels or without, and every file is accounted for."""

import os
import tarfile
import unicodedata

import pytest
from PIL import Image

from pipeline.data import main
from pipeline.datasets.manifest import read_image, read_manifest
from tests.unit.datasets.sources import convert, image, labels, members, parquet, put, tar


def test_a_folder_without_classes_becomes_shards_without_labels(tmp_path, capsys):
    put(tmp_path / "in", "a.jpg", "deep/er/b.png", "deep/c.jpeg")
    assert convert("folder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert labels(tmp_path / "out") == {"a": None, "deep/er/b": None, "deep/c": None}
    assert read_manifest(tmp_path / "out").classes == ()
    with tarfile.open(tmp_path / "out" / "000000.tar") as file:
        assert not [name for name in file.getnames() if name.endswith("cls")]
    assert main(["verify", str(tmp_path / "out"), "--processes", "1"]) == 0
    assert main(["show", str(tmp_path / "out"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert convert("folder", tmp_path / "in" / "no", "--out", tmp_path / "no") == 3
    assert convert("imagefolder", put(tmp_path / "flat", "x.jpg"), "--out", tmp_path / "no") == 3
    assert f"convert folder {tmp_path / 'flat'}" in capsys.readouterr().err


def test_labelled_and_unlabelled_images_share_a_dataset(tmp_path, capsys):
    put(tmp_path / "in", "cat/1.jpg", "dog/1.jpg", "unlabelled/1.jpg")
    put(tmp_path / "pool", "1.jpg", "x/2.jpg")
    pool, inside = tmp_path / "pool", tmp_path / "in" / "unlabelled"
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "plain") == 0
    assert "'unlabelled' is taken as a class" in capsys.readouterr().out
    assert convert("imagefolder", tmp_path / "in", "--unlabelled", inside, pool, "--out", tmp_path / "out") == 0
    assert "5 samples of 2 classes (cat, dog), 3 of them without a label" in capsys.readouterr().out
    expected = {"unlabelled/0/1": None, "unlabelled/1/1": None, "unlabelled/1/x/2": None}
    assert labels(tmp_path / "out") == {"cat/1": "cat", "dog/1": "dog"} | expected
    assert main(["verify", str(tmp_path / "out"), "--processes", "1"]) == 0
    assert convert("imagefolder", tmp_path / "in", "--unlabelled", tmp_path / "no", "--out", tmp_path / "o") == 3


def test_hidden_files_of_systems_are_counted_and_are_no_class(tmp_path, capsys):
    put(tmp_path, *(f"in/{c}/{c}{k}.jpg" for c in ("cat", "dog") for k in range(4)))
    put(tmp_path / "in", ".ipynb_checkpoints/cat0-checkpoint.jpg", "__MACOSX/cat/._cat0.jpg", "@eaDir/cat0.jpg")
    (tmp_path / "in/cat/._cat0.jpg").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    (tmp_path / "in/cat/notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "in/cat/pipe.jpg")
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    text = capsys.readouterr().out
    assert "8 samples of 2 classes (cat, dog)" in text
    counts = [line.split()[-1] for line in text.splitlines()[1:4]]
    assert counts == ["14", "8", "6"]
    assert "4  hidden or of the system" in text
    assert "1  no image by ending and content: cat/notes.txt" in text
    assert "1  no regular file: cat/pipe.jpg" in text


def test_images_are_recognised_by_content_and_formats_that_are_not_read_are_named(tmp_path, capsys):
    endings = {
        "jpg": "JPEG",
        "avif": "AVIF",
        "jfif": "JPEG",
        "jpe": "JPEG",
        "pgm": "PPM",
        "data": "PNG",
        "2024": "JPEG",
    }
    for c in ("cat", "dog"):
        for ending, form in (endings | {"jp2": "JPEG2000", "heic": "PNG"}).items():
            path = tmp_path / "in" / c / f"{ending}_picture.{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L" if ending == "pgm" else "RGB", (30, 30), 99).save(path, form)
        (tmp_path / "in" / c / "bare").write_bytes(image(1))
    command = ["imagefolder", tmp_path / "in", "--out", tmp_path / "out"]
    assert convert(*command) == 3
    error = capsys.readouterr().err
    assert "4 of 20 images cannot be converted, and nothing was written" in error
    for name in ("cat/heic_picture.heic", "cat/jp2_picture.jp2", "dog/heic_picture.heic", "dog/jp2_picture.jp2"):
        assert name in error
    assert not (tmp_path / "out").exists()
    assert convert(*command, "--skip-unreadable") == 0
    assert "4  unreadable: cat/heic_picture.heic" in capsys.readouterr().out
    assert set(labels(tmp_path / "out")) == {
        f"{c}/{name}" for c in ("cat", "dog") for name in ["bare", "2024_picture_2024", "data_picture_data"]
    } | {f"{c}/{e}_picture" for c in ("cat", "dog") for e in ("jpg", "avif", "jfif", "jpe", "pgm")}
    assert main(["verify", str(tmp_path / "out"), "--processes", "1"]) == 0


def test_linked_folders_are_followed_and_loops_are_seen(tmp_path, capsys):
    put(tmp_path, "in/cat/1.jpg", "in/dog/1.jpg", "more/2.jpg", "owls/3.jpg")
    (tmp_path / "in/cat/extra").symlink_to(tmp_path / "more")
    (tmp_path / "in/owl").symlink_to(tmp_path / "owls")
    (tmp_path / "in/cat/loop").symlink_to(tmp_path / "in/cat")
    (tmp_path / "more/loop").symlink_to(tmp_path / "in")
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert set(labels(tmp_path / "out")) == {"cat/1", "cat/extra/2", "dog/1", "owl/3"}
    assert "2  link to a folder above it: cat/extra/loop, cat/loop" in capsys.readouterr().out
    (tmp_path / "in/dog/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert convert("imagefolder", tmp_path / "in", "--out", tmp_path / "other") == 3
    assert "dog/gone.jpg cannot be read (No such file or directory)" in capsys.readouterr().err


def test_a_test_set_may_lack_a_class_and_unicode_forms_are_one_class(tmp_path, capsys):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    put(
        tmp_path,
        f"train/{composed}/1.jpg",
        "train/dog/1.jpg",
        "train/owl/1.jpg",
        f"test/{apart}/1.jpg",
        "test/owl/1.jpg",
    )
    assert convert("imagefolder", tmp_path / "train", "--out", tmp_path / "a") == 0
    assert read_manifest(tmp_path / "a").classes == (composed, "dog", "owl")
    assert convert("imagefolder", tmp_path / "test", "--classes", tmp_path / "a", "--out", tmp_path / "b") == 0
    (tmp_path / "test/dog").mkdir()
    (tmp_path / "names.txt").write_bytes(("\ufeff" + f"{apart}\r\ndog\r\nowl\r\n").encode("utf-16-le"))
    assert convert("imagefolder", tmp_path / "test", "--out", tmp_path / "no") == 3
    assert "give the classes with --classes" in capsys.readouterr().err
    assert convert("imagefolder", tmp_path / "test", "--classes", tmp_path / "names.txt", "--out", tmp_path / "c") == 0
    for name in ("b", "c"):
        assert read_manifest(tmp_path / name).classes == (composed, "dog", "owl")
        assert labels(tmp_path / name) == {f"{apart}/1": composed, "owl/1": "owl"}
    put(tmp_path, "test/dgo/1.jpg")
    assert convert("imagefolder", tmp_path / "test", "--classes", tmp_path / "a", "--out", tmp_path / "d") == 3
    assert "1 classes that --classes does not name: 'dgo'" in (error := capsys.readouterr().err)
    assert "the nearest is 'dog'" in error


def test_nested_class_folders_by_option(tmp_path):
    put(tmp_path / "in", "animal/cat/1.jpg", "animal/dog/1.jpg", "plant/oak/1.jpg", "plant/2.jpg")
    assert convert("imagefolder", tmp_path / "in", "--nested", "--out", tmp_path / "out") == 0
    assert labels(tmp_path / "out") == {
        "animal/cat/1": "animal/cat",
        "animal/dog/1": "animal/dog",
        "plant/oak/1": "plant/oak",
        "plant/2": "plant",
    }


TABLES = {
    "spaces and quotes": ("t.csv", 'file, class\n"my photo (1).jpg", cat\n"a, b.jpg",dog\n', "utf-8"),
    "byte order mark": ("t.csv", "file;class\r\nmy photo (1).jpg;cat\r\na, b.jpg;dog\r\n", "utf-8-sig"),
    "utf-16": ("t.txt", "n\tfile\tclass\n1\tmy photo (1).jpg\tcat\n2\ta, b.jpg\tdog\n", "utf-16"),
    "no endings": ("t.csv", 'file|class\nmy photo (1)|cat\n"a, b"|dog\n', "utf-8"),
    "json lines": (
        "t.jsonl",
        '{"file": "my photo (1).jpg", "class": "cat"}\n{"file": "a, b.jpg", "class": "dog"}\n',
        "utf-8",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_as_programs_write_them(tmp_path, name):
    file, text, encoding = TABLES[name]
    put(tmp_path / "photos", "my photo (1).jpg", "a, b.jpg", "not listed.jpg")
    (tmp_path / file).write_bytes(text.encode(encoding))
    command = ["csv", tmp_path / file, "--image", "file", "--label", "class", "--root", tmp_path / "photos"]
    assert convert(*command, "--out", tmp_path / "out") == 0
    assert labels(tmp_path / "out") == {"my photo (1)": "cat", "a, b": "dog"}


def test_a_table_may_lack_labels_and_loses_no_row_without_a_word(tmp_path, capsys):
    put(tmp_path, "d/1.jpg", "d/2.jpg", "d/3.jpg", "caf\u00e9.jpg")
    rows = [
        "d\\1.jpg,0.0",
        "d/2.jpg,",
        "./d/3.jpg,10.0",
        "d/1.jpg,0.0",
        unicodedata.normalize("NFD", "caf\u00e9.jpg") + ",NaN",
    ]
    table = tmp_path / "t.csv"
    table.write_text("path,label\n" + "\n".join(rows) + "\n")
    command = ["csv", table, "--image", "path", "--label", "label"]
    assert convert(*command, "--out", tmp_path / "out") == 0
    assert labels(tmp_path / "out") == {"d/1": "0", "d/2": None, "d/3": "10", "caf\u00e9": None}
    assert "1  row repeated" in capsys.readouterr().out
    table.write_text(table.read_text() + "gone.jpg,0\nd/3.jpg,0\n")
    assert convert(*command, "--out", tmp_path / "no") == 3
    error = capsys.readouterr().err
    assert "row 6: 'gone.jpg' is no file below" in error
    assert "row 7: d/3.jpg has another label in an earlier row" in error
    assert not (tmp_path / "no").exists()
    assert convert(*command, "--out", tmp_path / "some", "--skip-unreadable") == 0
    assert "1  missing" in capsys.readouterr().out
    assert convert("csv", table, "--image", "file", "--out", tmp_path / "no") == 2
    assert "has no column 'file'; its first line has 'path', 'label'" in capsys.readouterr().err
    assert convert(*command, "--root", tmp_path / "nowhere", "--out", tmp_path / "no") == 3
    assert "nowhere is no folder; give that of the files which" in capsys.readouterr().err
    assert convert("csv", table, "--image", "path", "--out", tmp_path / "bare", "--skip-unreadable") == 0
    assert set(labels(tmp_path / "bare").values()) == {None}


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_damaged_byte_anywhere_in_a_table_of_images_ends_in_a_sentence(tmp_path, ending, capsys):
    pytest.importorskip("pyarrow", reason="parquet is an optional extra")
    (tmp_path / "in").mkdir()
    path = tmp_path / f"in/train.{ending}"
    parquet(path, {"image": [{"bytes": image(k, "PNG"), "path": None} for k in range(3)], "label": ["a", "b", "a"]})
    whole = path.read_bytes()
    for k in range(0, len(whole), max(1, len(whole) // 25)):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 0xFF]) + whole[k + 1 :])
        code = convert("parquet", tmp_path / "in", "--out", tmp_path / f"out{k}")
        assert code in (0, 3), (k, capsys.readouterr().err)


def test_a_name_that_no_text_can_hold_is_shown(tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text('{"image": "\\ud800", "label": "a"}\n')
    assert convert("csv", tmp_path / "t.jsonl", "--image", "image", "--label", "label", "--out", tmp_path / "out") == 3
    assert r"\ud800" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_hugging_face_rows_of_any_format_some_without_a_label(tmp_path, ending, capsys):
    forms = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"]
    rows = [{"bytes": image(k, form), "path": None} for k, form in enumerate(forms)]
    put(tmp_path / "in", "beside.jpg")
    rows.append({"bytes": None, "path": "beside.jpg"})
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    parquet(tmp_path / f"in/train.{ending}", {"image": rows, "label": [0, 1, None, -1, 0, 1, 1]}, names)
    assert convert("parquet", tmp_path / "in", "--out", tmp_path / "out") == 0
    assert list(labels(tmp_path / "out").values()) == ["cat", "dog", None, None, "cat", "dog", "dog"]
    assert read_image(read_manifest(tmp_path / "out"), 2) == image(2, "WEBP")
    assert convert("parquet", tmp_path / "in", "--label-column", "none", "--out", tmp_path / "bare") == 0
    assert read_manifest(tmp_path / "bare").classes == ()
    rows[2] = {"bytes": b"no image", "path": None}
    rows[6] = {"bytes": None, "path": "../../etc/passwd"}
    parquet(tmp_path / f"in/train.{ending}", {"image": rows, "label": ["b", "a", "b", None, "", "a", "b"]})
    capsys.readouterr()
    assert convert("parquet", tmp_path / "in", "--out", tmp_path / "no") == 3
    error = capsys.readouterr().err
    assert "2 of 7 images cannot be converted" in error
    assert "row 2 of row group 0 is no image" in error
    assert "'../../etc/passwd' is no file below" in error
    assert convert("parquet", tmp_path / "in", "--out", tmp_path / "some", "--skip-unreadable") == 0
    assert list(labels(tmp_path / "some").values()) == ["b", "a", None, None, "a"]
    parquet(tmp_path / f"in/train.{ending}", {"image": rows[:2], "label": [0, 20_000_000]})
    assert convert("parquet", tmp_path / "in", "--out", tmp_path / "no") == 3
    assert "row 1 has label 20000000, but no row has label 1" in capsys.readouterr().err


TARS = {
    "numbers, some missing": (members("cls", ["1", None, "0"]), [], ["1", None, "0"]),
    "none": (members("cls", [None, None]), [], [None, None]),
    "names in txt": (members("txt", ["cat", "dog", "cat\n"]), [], ["cat", "dog", "cat"]),
    "captions": (members("txt", [f"a cat\nnumber {k}" for k in range(3)]), [], [None] * 3),
    "names in cls": (members("cls", ["cat", None, "dog"]), ["--label-key", "cls"], ["cat", None, "dog"]),
    "json field": (
        members("json", ['{"label": 1}', '{"label": 0}', '{"label": null}', "{}"]),
        ["--label-key", "label"],
        ["1", "0", None, None],
    ),
    "json names": (members("json", ['{"kind": "b"}', '{"kind": "a"}']), ["--label-key", "kind"], ["b", "a"]),
    "compound": (
        members("output.cls", ["0", "1"], "input.jpg"),
        ["--image-key", "input.jpg", "--label-key", "output.cls"],
        ["0", "1"],
    ),
    "labels not wanted": (members("cls", ["0", "1"]), ["--label-key", "none"], [None, None]),
    "content": ([("s0.picture", image(0)), ("s0.cls", b"0"), ("s1.avif", image(1)), ("s1.cls", b"0")], [], ["0", "0"]),
}


@pytest.mark.parametrize("name", TARS)
def test_tars_as_others_write_them(tmp_path, name):
    content, options, expected = TARS[name]
    folder = tar(tmp_path / "in", content)
    assert convert("tars", folder, *options) == 0
    assert list(labels(folder).values()) == expected
    assert main(["verify", str(folder), "--processes", "1"]) == 0


def test_tars_whose_labels_have_a_gap_lose_an_image_or_do_not_decode_are_refused(tmp_path, capsys):
    folder = tar(tmp_path / "gap", members("cls", ["0", "20000000"]))
    assert convert("tars", folder) == 3
    assert "sample 's1' in 000000.tar has label 20000000" in capsys.readouterr().err
    (tmp_path / "names").write_text("a\nb\n")
    assert convert("tars", folder, "--classes", tmp_path / "names") == 3
    assert "is 20000000, but there are 2 classes" in capsys.readouterr().err
    folder = tar(tmp_path / "lost", [*members("cls", ["0"]), ("x.cls", b"0"), ("x.mov", b"?")])
    assert convert("tars", folder) == 3
    assert "1 labels have no image that is read here: x.cls" in capsys.readouterr().err
    assert convert("tars", folder, "--skip-unreadable") == 0
    assert "1  label without an image: x.cls" in capsys.readouterr().out
    bad = [("x.jpg", image(0)[:100]), ("x.cls", b"0"), ("y.heic", b"?"), ("y.cls", b"0")]
    folder = tar(tmp_path / "bad", [*members("cls", ["0"]), *bad])
    assert convert("tars", folder) == 3
    error = capsys.readouterr().err
    assert "2 of 3 images cannot be decoded, and nothing was written" in error
    assert "000000.tar: x.jpg: " in error
    assert "000000.tar: y.heic: " in error
    assert not (folder / "manifest.json").exists()
    assert convert("tars", folder, "--skip-unreadable") == 0
    assert labels(folder) == {"s0": "0"}
    assert main(["verify", str(folder), "--processes", "1"]) == 0


def test_two_equal_folders_convert_to_equal_bytes(tmp_path):
    for name in ("one", "two"):
        put(
            tmp_path / name,
            *(f"{c}/{k}.jpg" for c in "ab" for k in (range(5) if name == "one" else reversed(range(5)))),
        )
        assert convert("imagefolder", tmp_path / name, "--out", tmp_path / f"{name}.out") == 0
    first, second = (sorted((tmp_path / f"{name}.out").iterdir()) for name in ("one", "two"))
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
