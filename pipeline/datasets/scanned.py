"""What tars hold that were scanned: their images, the labels in numbers, and the manifest that they make."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from pipeline.datasets.convert.classes import class_labels
from pipeline.datasets.convert.table import table
from pipeline.datasets.manifest import Manifest, Shard, ShardIndex, write_manifest
from pipeline.datasets.tars import MemberRules, Scan, scan_members
from pipeline.datasets.text import sample_key
from pipeline.errors import DataError
from pipeline.images import UnreadableImage, decode

USUAL = MemberRules()
_MOST_LETTERS = 100  # A longer text is a caption and no class name.


@dataclass(frozen=True)
class ScannedTar:
    """A scanned tar, and why some of its images cannot be used, by their place in it."""

    scan: Scan
    problems: dict[int, str]


class Indexed(NamedTuple):
    """A dataset of tars, whether its manifest was there already, and the table of what was found."""

    manifest: Manifest
    existed: bool
    table: list[str]


def scan_tar(path: Path, num_classes: int | None, rules: MemberRules) -> ScannedTar:
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
    return ScannedTar(scan, problems)


def has_texts_only(found: Sequence[ScannedTar]) -> bool:
    """Return whether no image has a label, and `txt` members lie beside them."""
    return any("member .txt" in shard.scan.left_out for shard in found) and not any(
        text for shard in found for text in shard.scan.texts
    )


def are_classes(texts: Sequence[str]) -> bool:
    """Return whether texts are class names and not captions: short, one line each, and mostly repeated."""
    given = [text for text in texts if text]
    short = all(len(text) <= _MOST_LETTERS and "\n" not in text for text in given)
    return bool(given) and short and len(set(given)) <= max(20, len(given) // 4)


def write_index(
    folder: Path,
    classes: Sequence[str] | None,
    found: Sequence[ScannedTar],
    rules: MemberRules,
    location: str = "",
    left_out: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Indexed:
    """Write the manifest of scanned tars.

    Args:
        folder: Folder of the manifest.
        classes: Names of the classes; None = the labels seen.
        found: The tars.
        rules: The rules that they were scanned by.
        location: Where the tars are, if not in the folder.
        left_out: Names of what was not scanned, by the reason.

    Raises:
        DataError: Two tars hold the same sample, images cannot be decoded, no image is left, or the labels are no classes.
    """
    _check_keys(found)
    unreadable = [
        f"{shard.scan.index.shard.name}: {shard.scan.index.members[place]}: {reason}"
        for shard in found
        for place, reason in shard.problems.items()
    ]
    num_images = sum(len(shard.scan.index.members) for shard in found)
    if unreadable and not rules.skip_unreadable:
        refusal = (
            f"{folder}: {len(unreadable)} of {num_images} images cannot be decoded, and nothing was written; repair or remove"
            " them, or leave them out with --skip-unreadable:"
        )
        raise DataError("\n  ".join([refusal, *unreadable]))
    if rules.label_key not in ("", "none") and not any(text for shard in found for text in shard.scan.texts):
        raise DataError(
            f"no sample of {folder} has a label in {rules.label_key!r}; give another --label-key: the ending of a member, or a"
            " field of the json members (--label-key none = without labels)"
        )
    names, indices = _labelled(classes, found, folder)
    kept = [_without(index, shard.problems) for index, shard in zip(indices, found, strict=True)]
    if not any(index.shard.count for index in kept):
        raise DataError(f"the tars of {folder} hold no image that can be read; nothing was written")
    manifest = write_manifest(folder, names, kept, location, None if rules == USUAL else asdict(rules))
    lost: dict[str, list[str]] = {reason: list(members) for reason, members in left_out.items()}
    for shard in found:
        for reason, members in shard.scan.left_out.items():
            lost.setdefault(reason, []).extend(members)
    # A member that holds a caption or a number is found with its sample; it is no loss.
    told = {reason: members for reason, members in lost.items() if not reason.startswith("member ")}
    lines = table(num_images, told, {"unreadable": unreadable} if unreadable else {})
    others = {reason: members for reason, members in lost.items() if reason.startswith("member ")}
    lines += [f"{'':<12}{len(members):>10,}  {reason} not used" for reason, members in sorted(others.items())]
    if others and not names and rules.label_key != "none":
        lines.append("no sample has a label; --label-key ENDING reads labels from other members")
    return Indexed(manifest, False, lines)


def _check_keys(found: Sequence[ScannedTar]) -> None:
    """Refuse a sample that is in two tars."""
    seen: dict[str, str] = {}
    for shard in found:
        name = shard.scan.index.shard.name
        for member in shard.scan.index.members:
            key = sample_key(member)
            if (first := seen.setdefault(key, name)) != name:
                raise DataError(f"sample {key!r} is in {first} and in {name}; remove one")


def _labelled(
    classes: Sequence[str] | None, found: Sequence[ScannedTar], folder: Path
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


def _check_gap(num_classes: int, found: Sequence[ScannedTar]) -> None:
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
