"""Manifests for WebDataset tars that exist already, here or behind a URL; the tars stay as they are."""

import functools
import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.datasets.convert.lock import converting
from pipeline.datasets.formats import is_hidden
from pipeline.datasets.manifest import (
    HEADER,
    NAMES,
    SAMPLES,
    Manifest,
    read_manifest,
)
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.scanned import USUAL, Indexed, ScannedTar, are_classes, has_texts_only, scan_tar, write_index
from pipeline.datasets.tars import MemberRules
from pipeline.errors import ConfigError, DataError
from pipeline.files import replace_bytes
from pipeline.jsonl import parse
from pipeline.storage.config import RemoteConfig
from pipeline.storage.remote import fetch, list_remote, remote_size

_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
# The largest file of a manifest that is fetched: it has the names of 1e9 images if they take 68 bytes each.
_MOST_BYTES = 2**36
_MOST_TARS = 1_000_000


def index_folder(folder: Path, classes: Sequence[str] | None, processes: int, rules: MemberRules = USUAL) -> Indexed:
    """Write a manifest beside the WebDataset tars of a folder, unless it is there already.

    Args:
        folder: Folder of the tars.
        classes: Names of the classes; None = the labels seen.
        processes: How many processes scan tars.
        rules: Which members are images and labels.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        DataError: There are no tars, one of them is damaged, two hold the same sample, or images cannot be decoded.
    """
    tars, left_out = _tars_of(folder)
    if (folder / HEADER).exists():
        return Indexed(_made_before(folder, tars, classes, rules), True, [])
    if not tars:
        raise DataError(f"{folder} has no .tar files; give a folder of WebDataset tars")
    with converting(folder) as lock:

        def scan(rules: MemberRules) -> list[ScannedTar]:
            work = functools.partial(scan_tar, num_classes=len(classes) if classes else None, rules=rules)
            return list(run_parallel(work, tars, processes, "shards", held=[lock]))

        found = scan(rules)
        if rules.label_key == "" and has_texts_only(found):
            named = scan(replace(rules, label_key="txt"))
            if are_classes([text for shard in named for text in shard.scan.texts]):
                found, rules = named, replace(rules, label_key="txt")
        return write_index(folder, classes, found, rules, left_out=left_out)


def _tars_of(folder: Path) -> tuple[list[Path], dict[str, list[str]]]:
    """Return the tars of a folder, and what is left out: hidden files.

    Raises:
        DataError: There are other archives, or tars in folders below, which would be lost.
    """
    found = sorted(folder.glob("*.tar"))
    tars = [path for path in found if not is_hidden(path.name)]
    hidden = [path.name for path in found if is_hidden(path.name)]
    archives = {path for path in folder.rglob("*") if path.name.lower().endswith(_ARCHIVES)}
    below = sorted(archives.difference(found))
    if lost := [path.relative_to(folder).as_posix() for path in below if not is_hidden(path.name)]:
        names = ", ".join(lost[:10]) + (" and more" if len(lost) > 10 else "")
        raise DataError(
            f"{folder} has {len(lost)} archives that are not read: {names}; unpack compressed ones to .tar (gunzip), and put all"
            " tars into the folder itself, or move these elsewhere"
        )
    return tars, {"hidden or of the system": hidden} if hidden else {}


def _made_before(folder: Path, tars: Sequence[Path], classes: Sequence[str] | None, rules: MemberRules) -> Manifest:
    """Open the manifest that a folder has already, if it is what would be made now.

    Raises:
        DataError: It lacks tars, or was made with other options.
    """
    manifest = read_manifest(folder)
    again = f"delete {folder / HEADER} to make it again"
    known = {shard.name for shard in manifest.shards}
    if new := [path.name for path in tars if path.name not in known]:
        raise DataError(f"{folder} has tars that its manifest lacks: {', '.join(new[:10])}; {again}")
    stated = json.loads((folder / HEADER).read_bytes()).get("member_rules")
    made = MemberRules(**stated) if stated else USUAL
    guessed = replace(made, label_key="") if made.label_key == "txt" else made
    if rules not in (made, guessed) or (classes is not None and tuple(classes) != manifest.classes):
        raise DataError(f"the manifest in {folder} was made with other options or classes; {again}")
    return manifest


def index_remote(
    source: str,
    out: Path,
    classes: Sequence[str] | None,
    remote: RemoteConfig,
    processes: int,
    rules: MemberRules = USUAL,
) -> Indexed:
    """Write a manifest in `out` for shards that stay at a URL, unless it is there already.

    Args:
        source: URL of a folder with a manifest, which is copied. Or URLs of tars with a range of numbers in braces, as
            WebDataset writes it (https://host/train-{000000..000063}.tar), or the URL of a folder of tars in an object
            store; each tar is then read once.
        out: Folder for the manifest.
        classes: Names of the classes; None = the labels seen.
        remote: How the shards are fetched.
        processes: How many processes scan tars.
        rules: Which members are images and labels.

    Returns:
        The manifest, and whether it was there already.

    Raises:
        DataError: A tar cannot be fetched or is damaged, two hold the same sample, or images cannot be decoded.
    """
    if (out / HEADER).exists():
        return Indexed(read_manifest(out), True, [])
    out.mkdir(parents=True, exist_ok=True)
    with converting(out) as lock:
        urls = _expanded(source) if "{" in source else _listed_tars(source, remote)
        if not urls:
            _copy_manifest(source.rstrip("/"), out, remote)
            return Indexed(read_manifest(out), False, [])
        count = len(classes) if classes else None
        scan = functools.partial(_scan_remote, out=out, remote=remote, num_classes=count, rules=rules)
        found = list(run_parallel(scan, urls, processes, "shards", held=[lock]))
        return write_index(out, classes, found, rules, urls[0].rpartition("/")[0])


def _copy_manifest(source: str, out: Path, remote: RemoteConfig) -> None:
    """Copy the files of a manifest, which then says that its shards are at the source; the header comes last.

    Raises:
        DataError: A file cannot be fetched, or is none of a manifest.
    """
    for name in (SAMPLES, NAMES, HEADER):
        url = f"{source}/{name}"
        size = remote_size(url, remote)
        if size > _MOST_BYTES:
            raise DataError(f"{url} has {size} bytes, and a manifest at most {_MOST_BYTES}; check the address")
        content = io.BytesIO()
        fetch(url, 0, size, size, remote, content)
        data = content.getvalue()
        replace_bytes(out / name, _moved_to(data, source, url) if name == HEADER else data)


def _expanded(source: str) -> list[str]:
    """Return the addresses that a range in braces stands for.

    Raises:
        ConfigError: The braces cannot be read, or stand for too many.
    """
    from webdataset.shardlists import expand_urls

    many = ConfigError(f"{source[:200]}: the braces stand for more than {_MOST_TARS} tars; give a smaller range")
    counts = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"\{(\d{1,30})\.\.(\d{1,30})", source)]
    if math.prod(counts) > _MOST_TARS:
        raise many
    try:
        urls: list[str] = expand_urls(source)
    except ValueError as error:
        raise ConfigError(
            f"{source[:200]}: the braces cannot be read ({str(error)[:80]}); write {{000000..000063}}"
        ) from None
    if len(urls) > _MOST_TARS:
        raise many
    return urls


def _moved_to(data: bytes, location: str, url: str) -> bytes:
    """Return the bytes of a manifest's header that names another place of its shards."""
    try:
        header = parse(data)
    except ValueError as error:
        raise DataError(f"{url} is no manifest ({str(error)[:80]}); check the address") from None
    if not isinstance(header, dict):
        raise DataError(f"{url} is no manifest (it is no JSON object); check the address")
    return json.dumps(header | {"location": location}, indent=1).encode()


def _listed_tars(source: str, remote: RemoteConfig) -> list[str]:
    """Return the tars below the address of an object store; none if a manifest is there, or no list can be had."""
    if source.startswith("http"):
        return []
    names = list_remote(source, remote)
    tars = [f"{source.rstrip('/')}/{name}" for name in names if name.endswith(".tar")]
    if not tars:
        raise DataError(
            f"{source} has no .tar files (it has {len(names)} other files); give the address of a folder of tars"
        )
    return [] if HEADER in names else tars


def _scan_remote(url: str, out: Path, remote: RemoteConfig, num_classes: int | None, rules: MemberRules) -> ScannedTar:
    path = out / url.rpartition("/")[2]
    size = remote_size(url, remote)
    try:
        with path.open("wb") as file:
            fetch(url, 0, size, size, remote, file)
        return scan_tar(path, num_classes, rules)
    finally:
        path.unlink(missing_ok=True)
