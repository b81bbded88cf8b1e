"""A file or folder is whole or absent, whatever stops its writer."""

import hashlib
import os
from pathlib import Path

import pytest

from pipeline.files import publish, replace_bytes, replace_text, replacing, sha256_of, temporary_of


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_replaced_file_has_the_new_bytes_and_the_returned_hash(tmp_path: Path) -> None:
    path = tmp_path / "above" / "a.json"
    for text in ("first", "second, ä"):
        digest = replace_text(path, text)
        assert path.read_bytes() == text.encode()
        assert digest == sha256_of(path) == hashlib.sha256(text.encode()).hexdigest()
    assert replace_bytes(path, b"\x00") == sha256_of(path)
    assert names(path.parent) == ["a.json"]


@pytest.mark.parametrize("sync", [True, False])
def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path, sync: bool) -> None:
    path = tmp_path / "a"
    replace_text(path, "old")

    def write_half() -> None:
        with replacing(path, sync=sync) as temporary:
            temporary.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_a_block_that_raises_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "export"
    with replacing(path) as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "a").write_text("old")

    def write_nothing() -> None:
        with replacing(path) as temporary:
            temporary.mkdir()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_nothing()
    assert (path / "inner" / "a").read_text() == "old"
    assert names(tmp_path) == ["export"]


def test_a_folder_takes_the_place_of_a_folder_with_other_files(tmp_path: Path) -> None:
    path = tmp_path / "step_1"
    for name in ("one", "two"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
            assert not (path / name).exists()
    assert names(path) == ["two"]
    assert names(tmp_path) == ["step_1"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_a_folder_takes_the_place_of_what_is_no_folder(tmp_path: Path, make) -> None:
    make(tmp_path / "x")
    with replacing(tmp_path / "x") as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "new"]


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_hashed_and_not_waited_for(tmp_path: Path, make) -> None:
    make(tmp_path / "x")
    with pytest.raises(OSError):
        sha256_of(tmp_path / "x")


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    """A kill runs no clean-up: the temporary path stays, as a file or as a folder, until the next writer comes."""
    path = tmp_path / "a"
    temporary_of(path).mkdir()
    (temporary_of(path) / "half").write_text("half")
    replace_text(path, "whole")
    temporary_of(path).write_text("half")
    with replacing(path) as temporary:
        assert not temporary.exists()
        temporary.write_text("again")
    assert path.read_text() == "again"
    assert names(tmp_path) == ["a"]


def test_writers_that_fill_a_folder_together_publish_it_once(tmp_path: Path) -> None:
    path = tmp_path / "step_1"
    temporary_of(path).mkdir()
    for rank in range(2):
        replace_text(temporary_of(path) / f"rank_{rank}", str(rank))
    assert not path.exists()
    publish(temporary_of(path), path)
    assert names(path) == ["rank_0", "rank_1"]
    assert names(tmp_path) == ["step_1"]


def test_no_pattern_for_finished_files_matches_an_unfinished_one(tmp_path: Path) -> None:
    with replacing(tmp_path / "000.tar") as temporary:
        temporary.write_bytes(b"")
        assert not [*tmp_path.glob("*.tar"), *tmp_path.glob("000*")]
