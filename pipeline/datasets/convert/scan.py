"""Find the images below a folder: linked folders are followed, nothing else is passed over without a count."""

import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from pipeline.datasets.convert.source import LeftOut
from pipeline.datasets.formats import FOREIGN_EXTENSIONS, HEAD, IMAGE_EXTENSIONS, extension_of, format_of, is_hidden
from pipeline.datasets.parallel import counted
from pipeline.datasets.text import shown
from pipeline.files import real_path


def find_images(root: Path, left_out: LeftOut, exclude: Collection[Path] = ()) -> list[str]:
    """Return the sorted paths, relative to `root` and with `/`, of all images below it.

    A file is an image if it has the ending of one, or begins like one. Images of formats that are not read are
    returned too, since a dataset must not lose them without a word.

    Args:
        root: The folder.
        left_out: Takes the names of all other files, by the reason.
        exclude: Resolved folders that are passed over.
    """
    found = []
    for name, entry in counted(_files_below(root, left_out, exclude), "files found"):
        mode = _mode(entry)
        extension = extension_of(entry.name)
        if not (mode is None or stat.S_ISREG(mode)):
            _leave_out(left_out, "no regular file", name)
        elif extension in IMAGE_EXTENSIONS or extension in FOREIGN_EXTENSIONS or _begins_like_an_image(entry.path):
            found.append(name)
        else:
            _leave_out(left_out, "no image by ending and content", name)
    return sorted(found)


def _files_below(root: Path, left_out: LeftOut, exclude: Collection[Path]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield the relative name and the entry of everything below `root` that is no folder.

    A folder behind two links or more on one path is entered once. So folders that link to one another, of which there are
    as many paths as orders of them, take a time that grows with the square of their number.
    """
    open_folders: list[tuple[str, str, tuple[tuple[int, int], ...], int]] = [
        (str(root), "", (_identity(str(root)),), 0)
    ]
    far: set[tuple[int, int]] = set()  # folders that were entered behind two links or more
    while open_folders:
        folder, prefix, ancestors, links = open_folders.pop()
        with os.scandir(folder) as entries:
            listed = sorted(entries, key=lambda entry: entry.name, reverse=True)
        for entry in listed:
            name = prefix + entry.name
            folder_inside = _is_folder(entry)
            if folder_inside and is_hidden(entry.name):
                for parent, _, files in os.walk(entry.path):
                    below = os.path.relpath(parent, root)
                    for file in files:
                        _leave_out(left_out, "hidden or of the system", f"{below}/{file}")
            elif is_hidden(entry.name):
                _leave_out(left_out, "hidden or of the system", name)
            elif not folder_inside:
                yield name, entry
            elif (identity := _identity(entry.path)) in ancestors:
                _leave_out(left_out, "link to a folder above it", name)
            elif links + entry.is_symlink() > 1 and identity in far:
                _leave_out(left_out, "folder taken already through other links", name)
            elif not exclude or real_path(entry.path) not in exclude:
                behind = links + entry.is_symlink()
                far.update([identity] if behind > 1 else [])
                open_folders.append((entry.path, name + "/", (*ancestors, identity), behind))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _mode(entry: os.DirEntry[str]) -> int | None:
    """Return the kind of a file, behind links; None for a link that leads nowhere, which is named when it is read."""
    try:
        return entry.stat().st_mode
    except OSError:
        return None


def _begins_like_an_image(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return bool(format_of(file.read(HEAD)))
    except OSError:
        return False


def _leave_out(left_out: LeftOut, reason: str, name: str) -> None:
    left_out.setdefault(reason, []).append(shown(name))
