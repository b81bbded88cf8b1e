"""Datasets of Hugging Face as sources: saved ones, plain folders, and names on the hub; needs the optional `datasets`.

The library reads them, so splits, configurations, metadata files and archives are what it makes of them. It keeps its own copy
in HF_HOME. Images are taken as their bytes: nothing is decoded or encoded again.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pipeline.datasets.convert.columns import column_labels
from pipeline.datasets.convert.scan import find_images
from pipeline.datasets.convert.source import LeftOut, Problem, Source, UnreadableSource, make_keys, stored_extension
from pipeline.datasets.formats import HEAD, format_of
from pipeline.datasets.text import shown
from pipeline.errors import ConfigError, DataError, EnvironmentProblem

T = TypeVar("T")

_SAVED = ("state.json", "dataset_dict.json")  # what save_to_disk writes
_LABELS = ("label", "labels", "cls", "class")  # columns of classes that are not declared as such


@dataclass(kw_only=True)
class HuggingFace(Source):
    """One split of a dataset, a `Source`.

    Attributes:
        rows: The library's dataset of the image column alone, whose items are not decoded.
        column: The image column.
        roots: Folders that a row may name a file of.
    """

    name: str
    classes: Sequence[str]
    keys: Sequence[str]
    labels: Sequence[int]
    names: Sequence[str]
    files: Sequence[str]
    rows: Any
    column: str
    roots: Sequence[str]
    in_order: bool
    problems: Mapping[int, Problem] = field(default_factory=dict)
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def read(self, item: int) -> tuple[str, bytes]:
        """Return the file extension and the bytes of one image."""
        value = self.rows[item][self.column]
        where = f"{self.name}: row {item}"
        if value is None:
            raise UnreadableSource(f"{where} has no image in {self.column!r}")
        path, data = value["path"], value["bytes"]
        if data is None:
            data = self._read_file(path, where)
            return stored_extension(path, data), data
        if not format_of(data[:HEAD]):
            raise UnreadableSource(f"{where} is no image in {self.column!r}")
        return stored_extension("row", data), data

    def _read_file(self, path: Any, where: str) -> bytes:
        whole = os.path.normpath(path) if isinstance(path, str) and os.path.isabs(path) else ""
        if not any(whole.startswith(root + os.sep) for root in self.roots):
            raise UnreadableSource(f"{where} has no bytes, and its path {path!r} is no file of the dataset")
        try:
            with open(whole, "rb") as file:
                return file.read()
        except OSError as error:
            raise UnreadableSource(f"{where}: {shown(whole)} cannot be read ({error.strerror})") from None


def hugging_face(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes: Sequence[str] | None = None,
) -> dict[str, HuggingFace]:
    """Take the splits of a dataset, by their names; all have the same classes.

    Args:
        source: A folder of save_to_disk, or of files that `load_dataset` reads; or OWNER/NAME on the hub.
        config: The configuration, of a dataset that has several.
        split: The split to take, or a part of one in the library's words, such as `train[:10%]`; None = all splits.
        revision: Branch, tag or commit on the hub; None = its main branch.
        image_column: None = the only column of images, or `image`.
        label_column: None = the only column of declared classes, or one of `_LABELS`; `none` = no image has a label.
        classes: The classes to have; None = the declared ones, or else those seen in any split.

    Raises:
        ConfigError: A configuration, split or column does not exist, or must be chosen.
        DataError: There is no such dataset, or it cannot be read.
        EnvironmentProblem: The library is not installed, or the hub cannot be reached.
    """
    library = _library()
    found = _load(library, source, config, split, revision)
    parts: dict[str, Any] = dict(found) if isinstance(found, dict) else {split or "": found}
    features = next(iter(parts.values())).features
    image = _image_column(library, features, image_column, source)
    label = _label_column(library, features, image, label_column, source)
    names = list(getattr(features[label], "names", None) or ()) if label else []
    tables = {name: part.with_format("arrow")[:] for name, part in parts.items()}
    values = [tables[name].column(label).to_pylist() if label else [None] * len(parts[name]) for name in parts]
    known, labels = column_labels(
        [value for some in values for value in some], names, classes, f"column {label!r} of {source}"
    )
    root = os.path.abspath(source) if os.path.isdir(source) else ""
    caches = library.config.HF_DATASETS_CACHE, library.config.HF_CACHE_HOME, library.config.DOWNLOADED_DATASETS_PATH
    roots = list(dict.fromkeys(os.path.abspath(path) for path in (root, *caches) if str(path)))
    sources: dict[str, HuggingFace] = {}
    start = 0
    for name, part in parts.items():
        own = labels[start : start + len(part)]
        start += len(part)
        rows = _undecoded(library, part, image, source)
        paths = _paths(rows, image)
        whole = [path for path in paths if path and os.path.isabs(path)]
        in_files = bool(paths) and len(whole) == len(paths)
        keys, problems, file_names = _names(name, paths, root, len(part), in_files)
        files = whole if in_files else [cached["filename"] for cached in part.cache_files]
        title = f"{source}, {name}" if name else source
        sources[name] = HuggingFace(
            name=title,
            classes=known,
            keys=keys,
            labels=own,
            names=file_names,
            files=files,
            rows=rows,
            column=image,
            roots=roots,
            in_order=not in_files,
            problems=problems,
        )
    if root:
        _count_others(root, sources)
    return sources


def _library() -> Any:
    try:
        import datasets
    except ImportError:
        raise EnvironmentProblem(
            "datasets of Hugging Face need its library; type: pip install 'visionmamba-pipeline[huggingface]'"
        ) from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _load(library: Any, source: str, config: str | None, split: str | None, revision: str | None) -> Any:
    """Return the dataset, or a dictionary of its splits."""
    if not os.path.isdir(source):
        return _load_from_hub(library, source, config, split, revision)
    if config is None and any((Path(source) / name).is_file() for name in _SAVED):
        found = _explained(library, source, lambda: library.load_from_disk(source))
        if split is None:
            return found
        if not isinstance(found, dict) or split not in found:
            parts = f"it has {', '.join(found)}" if isinstance(found, dict) else "it has one part, without a name"
            raise ConfigError(f"{source} has no split {split!r}; {parts}; leave out --split or choose another")
        return found[split]
    return _explained(library, source, lambda: library.load_dataset(source, config, split=split))


def _load_from_hub(library: Any, source: str, config: str | None, split: str | None, revision: str | None) -> Any:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    from huggingface_hub.utils import logging as hub_logging

    try:
        validate_repo_id(source)
    except HFValidationError:
        raise DataError(
            f"{source} is no folder, and no name on Hugging Face's hub; give a folder, or OWNER/NAME"
        ) from None
    hub_logging.set_verbosity_error()  # five warnings that it tries again
    try:
        return library.load_dataset(source, config, split=split, revision=revision)
    except Exception as error:
        if not _is_out_of_reach(library, error):
            raise _explanation(library, source, error) from None
    # The library has looked for what it has prepared itself. A folder that `hf download` has filled is as good.
    try:
        folder = snapshot_download(source, repo_type="dataset", revision=revision, local_files_only=True)
    except Exception:
        offline = "HF_HUB_OFFLINE is set" if library.config.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise EnvironmentProblem(
            f"{source} is no folder here, {offline}, and the cache {library.config.HF_CACHE_HOME} has no such dataset; on a"
            f" machine with access type `hf download --repo-type dataset {source}`, and set HF_HOME to that cache"
        ) from None
    return _explained(library, source, lambda: library.load_dataset(folder, config, split=split))


def _is_out_of_reach(library: Any, error: Exception) -> bool:
    """Whether the hub was not reached or failed itself, as opposed to a refusal; the library has many exceptions for it."""
    said = (library.exceptions.DatasetsError, library.data_files.EmptyDatasetError)  # it was reached, and refused
    network = isinstance(error, OSError) and error.errno is None  # a full disk has a number
    return not isinstance(error, said) and (network or type(error).__module__.startswith("httpx"))


def _explained(library: Any, source: str, load: Callable[[], T]) -> T:
    try:
        return load()
    except Exception as error:
        raise _explanation(library, source, error) from None


def _explanation(library: Any, source: str, error: Exception) -> Exception:
    """Return the refusal for what the library raised; it raises nearly anything for files that it cannot read."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None and error.filename):
        return error
    if isinstance(error, library.exceptions.DatasetNotFoundError):
        return DataError(f"{text} If it is private, log in with `hf auth login` or set HF_TOKEN")
    if isinstance(error, ValueError) and ("onfig" in text or "split" in text):
        sentence = text.split(" Example of usage")[0].rstrip(".")
        return ConfigError(f"{source}: {sentence}; choose with --config and --split")
    cause = error.__cause__ or error
    return DataError(
        f"{source} cannot be read as a dataset ({type(cause).__name__}: {' '.join(str(cause).split())[:300]})"
    )


def _image_column(library: Any, features: Mapping[str, Any], wanted: str | None, source: str) -> str:
    images = [name for name, feature in features.items() if isinstance(feature, library.Image)]
    if wanted in features:
        return str(wanted)
    if wanted is None and len(images) == 1:
        return images[0]
    if wanted is None and "image" in features:
        return "image"
    lack = f"has no column {wanted!r}" if wanted else f"has {len(images)} columns of images"
    raise ConfigError(f"{source} {lack}; it has {_listed(features)}; choose one with --image-column")


def _label_column(library: Any, features: Mapping[str, Any], image: str, wanted: str | None, source: str) -> str | None:
    """Return the column of the classes; None if no image has a label."""
    if wanted == "none" or (wanted is None and set(features) == {image}):
        return None
    if wanted in features:
        return wanted
    declared = [name for name, feature in features.items() if isinstance(feature, library.ClassLabel)]
    if wanted is None and len(declared) == 1:
        return declared[0]
    candidates = declared or list(features)
    if wanted is None and (likely := [name for name in _LABELS if name in candidates]):
        return likely[0]
    lack = f"no column {wanted!r}" if wanted else f"{len(declared)} columns of classes"
    raise ConfigError(
        f"{source} has {lack}; it has {_listed(features)}; choose one with --label-column (none = without labels)"
    )


def _listed(features: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items())


def _undecoded(library: Any, part: Any, image: str, source: str) -> Any:
    """Return the image column with the bytes or paths of its images."""
    try:
        rows = part.with_format(None).select_columns([image]).cast_column(image, library.Image(decode=False))
    except Exception as error:  # the library's and pyarrow's own
        raise DataError(f"{source}: column {image!r} holds no images ({' '.join(str(error).split())[:200]})") from None
    return rows


def _paths(rows: Any, image: str) -> list[str | None]:
    import pyarrow.compute as compute

    column = rows.with_format("arrow")[:].column(image)
    found: list[str | None] = compute.struct_field(column, "path").to_pylist()
    return found


def _names(
    part: str, paths: Sequence[str | None], root: str, count: int, in_files: bool
) -> tuple[list[str], dict[int, Problem], list[str]]:
    """Return the keys, their problems and the names of the rows: those of their files, where they are in files."""
    below = f"{root}{os.sep}"
    if root and in_files and all(str(path).startswith(below) for path in paths):
        names = [str(path).removeprefix(below) for path in paths]
        return *make_keys(names), names
    return [f"{part.split('[')[0] or 'row'}/{row:07d}" for row in range(count)], {}, []


def _count_others(root: str, sources: Mapping[str, HuggingFace]) -> None:
    """Count the images of a folder that no row names; the library says nothing of them."""
    taken = {path for source in sources.values() for path in source.files}
    left_out: LeftOut = {}
    found = find_images(Path(root), left_out)
    if others := [shown(name) for name in found if os.path.join(root, name) not in taken]:
        left_out["image in no row of the dataset"] = others
    if taken.intersection(os.path.join(root, name) for name in found):  # images in files, and not in tables
        next(iter(sources.values())).left_out = left_out
