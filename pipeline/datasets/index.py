"""Manifests for WebDataset tars that exist already, here or behind a URL; the tars stay as they are."""

import functools
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from pipeline.datasets.convert.classes import class_labels
from pipeline.datasets.convert.lock import locked
from pipeline.datasets.convert.table import table
from pipeline.datasets.formats import is_hidden
from pipeline.datasets.manifest import (
    HEADER,
    NAMES,
    SAMPLES,
    Manifest,
    Shard,
    ShardIndex,
    read_manifest,
    write_manifest,
)
from pipeline.datasets.parallel import run_parallel
from pipeline.datasets.tars import MemberRules, Scan, scan_members
from pipeline.datasets.text import sample_key
from pipeline.errors import ConfigError, DataError
from pipeline.files import replace_bytes
from pipeline.images import UnreadableImage, decode
from pipeline.jsonl import parse
from pipeline.storage.config import RemoteConfig
from pipeline.storage.remote import fetch, list_remote, remote_size

_USUAL = MemberRules()
_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")
_MOST_BYTES = 2**36  # of a file of a manifest: 24 bytes and a name for each of a thousand million images
_MOST_TARS = 1_000_000
_MOST_LETTERS = 100  # longest class name; a longer text is a caption


@dataclass(frozen=True)
class _Found:
    """A scanned tar, and why some of its images cannot be used, by their place in it."""

    scan: Scan
    problems: dict[int, str]


class Indexed(NamedTuple):
    """A dataset of tars, whether its manifest was there already, and the table of what was found."""

    manifest: Manifest
    existed: bool
    table: list[str]


def index_folder(folder: Path, classes: Sequence[str] | None, processes: int, rules: MemberRules = _USUAL) -> Indexed:
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
    with locked(folder) as lock:

        def scan(rules: MemberRules) -> list[_Found]:
            work = functools.partial(_scan, num_classes=len(classes) if classes else None, rules=rules)
            return list(run_parallel(work, tars, processes, "shards", held=[lock]))

        found = scan(rules)
        if rules.label_key == "" and _has_texts_only(found):
            named = scan(replace(rules, label_key="txt"))
            if _are_classes([text for shard in named for text in shard.scan.texts]):
                found, rules = named, replace(rules, label_key="txt")
        return _write_index(folder, classes, found, rules, left_out=left_out)


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
    made = MemberRules(**stated) if stated else _USUAL
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
    rules: MemberRules = _USUAL,
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
    with locked(out) as lock:
        urls = _expanded(source) if "{" in source else _listed_tars(source, remote)
        if not urls:
            for name in (SAMPLES, NAMES, HEADER):
                content = io.BytesIO()
                url = f"{source.rstrip('/')}/{name}"
                size = remote_size(url, remote)
                if size > _MOST_BYTES:
                    raise DataError(f"{url} has {size} bytes, and a manifest at most {_MOST_BYTES}; check the address")
                fetch(url, 0, size, size, remote, content)
                data = content.getvalue()
                if name == HEADER:
                    data = _moved_to(data, source.rstrip("/"), url)
                replace_bytes(out / name, data)
            return Indexed(read_manifest(out), False, [])
        count = len(classes) if classes else None
        scan = functools.partial(_scan_remote, out=out, remote=remote, num_classes=count, rules=rules)
        found = list(run_parallel(scan, urls, processes, "shards", held=[lock]))
        return _write_index(out, classes, found, rules, urls[0].rpartition("/")[0])


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


def _scan(path: Path, num_classes: int | None, rules: MemberRules) -> _Found:
    """Scan a tar and decode all its images."""
    scan = scan_members(path, num_classes, rules)
    problems = {}
    with path.open("rb") as file:
        for place, (offset, length) in enumerate(zip(scan.index.offsets, scan.index.lengths, strict=True)):
            file.seek(offset)
            try:
                decode(file.read(length))
            except UnreadableImage as error:
                problems[place] = str(error)
    return _Found(scan, problems)


def _scan_remote(url: str, out: Path, remote: RemoteConfig, num_classes: int | None, rules: MemberRules) -> _Found:
    path = out / url.rpartition("/")[2]
    size = remote_size(url, remote)
    try:
        with path.open("wb") as file:
            fetch(url, 0, size, size, remote, file)
        return _scan(path, num_classes, rules)
    finally:
        path.unlink(missing_ok=True)


def _has_texts_only(found: Sequence[_Found]) -> bool:
    return any("member .txt" in shard.scan.left_out for shard in found) and not any(
        text for shard in found for text in shard.scan.texts
    )


def _are_classes(texts: Sequence[str]) -> bool:
    """Return whether texts are class names and not captions: short, one line each, and mostly repeated."""
    given = [text for text in texts if text]
    short = all(len(text) <= _MOST_LETTERS and "\n" not in text for text in given)
    return bool(given) and short and len(set(given)) <= max(20, len(given) // 4)


def _write_index(
    folder: Path,
    classes: Sequence[str] | None,
    found: list[_Found],
    rules: MemberRules,
    location: str = "",
    left_out: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Indexed:
    seen: dict[str, str] = {}
    for shard in found:
        index = shard.scan.index
        for member in index.members:
            if seen.setdefault(sample_key(member), index.shard.name) != index.shard.name:
                first = seen[sample_key(member)]
                raise DataError(f"sample {sample_key(member)!r} is in {first} and in {index.shard.name}; remove one")
    unreadable = [
        f"{shard.scan.index.shard.name}: {shard.scan.index.members[place]}: {reason}"
        for shard in found
        for place, reason in shard.problems.items()
    ]
    if unreadable and not rules.skip_unreadable:
        raise DataError(
            "\n  ".join(
                [
                    f"{folder}: {len(unreadable)} of {sum(len(s.scan.texts) for s in found)} images cannot be decoded, and "
                    "nothing was written; repair or remove them, or leave them out with --skip-unreadable:",
                    *unreadable,
                ]
            )
        )
    if rules.label_key not in ("", "none") and not any(text for shard in found for text in shard.scan.texts):
        raise DataError(
            f"no sample of {folder} has a label in {rules.label_key!r}; give another --label-key: the ending of a member, or a"
            " field of the json members (--label-key none = without labels)"
        )
    names, indices = _labelled(classes, found, folder)
    kept = [_without(index, shard.problems) for index, shard in zip(indices, found, strict=True)]
    if not any(index.shard.count for index in kept):
        raise DataError(f"the tars of {folder} hold no image that can be read; nothing was written")
    lost: dict[str, list[str]] = {reason: list(names) for reason, names in left_out.items()}
    for shard in found:
        for reason, members in shard.scan.left_out.items():
            lost.setdefault(reason, []).extend(members)
    # A member that holds a caption or a number is found with its sample; it is no loss.
    told = {reason: members for reason, members in lost.items() if not reason.startswith("member ")}
    usual = rules == _USUAL
    manifest = write_manifest(folder, names, kept, location, None if usual else asdict(rules))
    lines = table(len(seen), told, {"unreadable": unreadable} if unreadable else {})
    others = {reason: members for reason, members in lost.items() if reason.startswith("member ")}
    lines += [f"{'':<12}{len(members):>10,}  {reason} not used" for reason, members in sorted(others.items())]
    if others and not names and rules.label_key != "none":
        lines.append("no sample has a label; --label-key ENDING reads labels from other members")
    return Indexed(manifest, False, lines)


def _labelled(
    classes: Sequence[str] | None, found: Sequence[_Found], folder: Path
) -> tuple[list[str], list[ShardIndex]]:
    """Return the classes, and the shards with the labels by number."""
    given = {text for shard in found for text in shard.scan.texts if text}
    if all(text.isascii() and text.isdigit() for text in given):
        if classes is None:
            classes = [str(label) for label in sorted({max(-1, label) for s in found for label in s.scan.index.labels})]
            classes = [name for name in classes if name != "-1"]
            _check_gap(len(classes), found)
        return list(classes), [shard.scan.index for shard in found]
    known, label_of = class_labels(given, classes, str(folder))
    label_of[""] = -1
    return known, [replace(s.scan.index, labels=[label_of[text] for text in s.scan.texts]) for s in found]


def _check_gap(num_classes: int, found: Sequence[_Found]) -> None:
    """Refuse class numbers that do not count from 0 without a gap, and name a sample."""
    for shard in found:
        index = shard.scan.index
        for member, label in zip(index.members, index.labels, strict=True):
            if label >= num_classes:
                raise DataError(
                    f"sample {sample_key(member)!r} in {index.shard.name} has label {label}, but only {num_classes} "
                    "different labels are there; labels count from 0 without a gap; give all classes with --classes"
                )


def _without(index: ShardIndex, problems: dict[int, str]) -> ShardIndex:
    if not problems:
        return index
    kept = [place for place in range(len(index.members)) if place not in problems]
    shard = index.shard
    return ShardIndex(
        shard=Shard(name=shard.name, size=shard.size, sha256=shard.sha256, count=len(kept)),
        members=[index.members[place] for place in kept],
        offsets=np.array(index.offsets)[kept].tolist(),
        lengths=np.array(index.lengths)[kept].tolist(),
        labels=np.array(index.labels)[kept].tolist(),
    )
