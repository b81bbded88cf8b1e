"""The model card of an export. It is readable without torch, so the launcher checks parents before it starts anything.

EXPORT/
  model.json                this card
  README.md                 the same for people, in Hugging Face's form
  config.json               the same for timm, if timm knows the model
  model.safetensors         the weights, fp32
  fingerprint.safetensors   `images` and the model's `outputs` for them; a loaded model must return the same outputs
  labels/SPLIT.npy          sample indices of the labelled images, for every label split that the model, its parents or
                            its teacher have seen
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, ValidationError, model_validator

from pipeline.config import Strict
from pipeline.decoding import WHITE, Decoding
from pipeline.errors import ConfigError, HandoverError, first_line
from pipeline.evaluation_view import USUAL, EvaluationView
from pipeline.exports.selected import Selected
from pipeline.files import sha256_of
from pipeline.models.config import DecoderConfig, ModelConfig, VisionMambaConfig, check_taps

WEIGHTS, FINGERPRINT, CARD = "model.safetensors", "fingerprint.safetensors", "model.json"
MAX_BYTES = 8 * 2**20  # largest card; one of 100,000 classes has about 3 MiB
_MAX_LABELS = 10**9  # labelled images of one split

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # a file in this folder and in no other

Mean = Annotated[float, Field(ge=0, le=1)]
Spread = Annotated[float, Field(ge=1e-3, le=1)]
Channels = tuple[Mean, Mean, Mean]
Spreads = tuple[Spread, Spread, Spread]
Words = Annotated[str, Field(max_length=10_000)]
Level = Annotated[int, Field(ge=0, le=255)]


class Preprocessing(Strict):
    """How pixels become the model's input: values in [0, 1], minus mean, over std, per channel."""

    mean: Channels
    std: Spreads
    ground: tuple[Level, Level, Level] = Field(WHITE, description="red, green and blue behind transparent pixels")
    view: EvaluationView = Field(
        USUAL, description="how an evaluation resizes and crops an image; training does not use it"
    )

    @property
    def decoding(self) -> Decoding:
        """How images are decoded for the model."""
        return Decoding(ground=self.ground)


# Most ImageNet models expect these values: they are timm's default, and the released Vim, ARM and EfficientViM have them.
IMAGENET = Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


class LabelsSeen(Strict):
    """One label split that has shaped the weights."""

    split: str = Field(
        pattern=r"^[^/\\\x00-\x1f]*$", max_length=200, description="hash of the split; for weights from outside, a name"
    )
    protocol: Words = Field(description="how the split was made, for people")
    count: int = Field(ge=0, le=_MAX_LABELS, description="labelled images; 0 if unknown")
    dataset: Words | None = Field(description="hash of the manifest; null for weights from outside")
    sample_indices_sha256: Words = Field("", description="SHA-256 of labels/SPLIT.npy")

    @model_validator(mode="after")
    def _plain_file_name(self) -> Self:
        if self.dataset is not None and not _PLAIN_NAME.fullmatch(self.split):
            raise ValueError(
                f"split {self.split[:60]!r} is no hash; it names a file, so it may hold letters, digits, `_`, `.` and `-` only"
            )
        return self


class Parent(Strict):
    """An export or file whose weights this model started from or learnt from. Its identity is the hash."""

    role: Words = Field(description="init_from or teacher; for a converted file, its layout")
    path: Words = Field(description="where it was read from; information only, it may have moved since")
    weights_sha256: Words = Field(description="SHA-256 of the parent's weights file")


class Lineage(Strict):
    """What the weights were made from. Configs, data, splits and parents are named by hash."""

    stage: Words
    config_sha256: Words = Field(description="SHA-256 of the config fields that are the run's identity")
    commit: Words = Field(description="git commit of the code")
    dataset: Words = Field(description="hash of the manifest of the training images")
    split: Words | None = Field(description="hash of the split; null if all images were labelled")
    parents: tuple[Parent, ...]


class Card(Strict):
    """What an export says of itself."""

    format: Literal[1] = 1
    kind: Literal["classifier", "pretrainer"]
    model: ModelConfig
    decoder: DecoderConfig | None = Field(None, description="of a pretrainer")
    classes: tuple[Words, ...] = Field(description="names, in the order of the logits; empty for a pretrainer")
    class_counts: tuple[int, ...] = Field((), description="labelled training images of each class")
    class_groups: dict[str, tuple[int, ...]] = Field(
        default_factory=dict,
        description="class indices of the groups head, medium, tail and ood, by the labelled images alone",
    )
    eval_batch: int = Field(
        256, ge=1, le=2**20, description="images per process and step of an evaluation; other sizes round differently"
    )
    preprocessing: Preprocessing
    temperature: float = Field(
        1.0, ge=0.01, le=100, description="what the logits are divided by before the softmax that gives probabilities"
    )
    calibration: Words = Field("", description="how the temperature was found, or why it is 1; for people")
    selected: Selected | None = Field(None, description="which state of the run the weights are")
    weights_sha256: str
    fingerprint_sha256: str
    lineage: Lineage
    labels_seen: tuple[LabelsSeen, ...]
    more_labels_than_claimed: bool = Field(
        False, description="whether the model, a parent or a teacher has seen labels outside the split"
    )
    assumptions: tuple[Words, ...] = Field(
        (), description="of a converted file: what its shapes do not tell, and how it was decided; for people"
    )
    metrics: dict[str, float] = Field(default_factory=dict, description="last validation and test results")
    card_sha256: str = Field("", description="SHA-256 of all other values except the parents' paths; shows edits")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Refuse fields that contradict one another, before they become a model of other shapes."""
        number = len(self.classes)
        if self.kind == "pretrainer":
            if self.decoder is None or not isinstance(self.model, VisionMambaConfig):
                raise ValueError("a pretrainer has a decoder and a Vision Mamba")
            check_taps(self.decoder, self.model)
            if number:
                raise ValueError(f"a pretrainer names no classes, but {number} are given")
        elif self.decoder is not None:
            raise ValueError("a classifier has no decoder")
        elif number != self.model.num_classes:
            raise ValueError(f"{number} classes are named, but the model has {self.model.num_classes}")
        if self.class_counts and (len(self.class_counts) != number or min(self.class_counts) < 0):
            raise ValueError(f"class_counts needs {number} counts, one of each class")
        for group, members in self.class_groups.items():
            if len(set(members)) != len(members) or any(not 0 <= index < number for index in members):
                raise ValueError(f"class_groups.{group[:40]} must hold indices of the {number} classes, each once")
        return self

    @classmethod
    def read(cls, folder: Path, remedy: str = "") -> Self:
        """Read the card of a complete export; `verify` then proves the files.

        Args:
            folder: The export.
            remedy: Command that makes the export, for the error's sentence.

        Raises:
            HandoverError: If the folder or one of its files is missing, or the card cannot be read.
        """
        path = folder / CARD
        hint = f"; make it with: {remedy}" if remedy else ""
        try:
            if not folder.is_dir():
                raise HandoverError(f"no export at {folder}{hint or _known_exports()}")
            for name in (CARD, WEIGHTS, FINGERPRINT):
                if not (folder / name).is_file():
                    known = hint or (_known_exports(folder) if name == CARD else "")
                    raise HandoverError(f"the export {folder} is incomplete: {name} is missing{known}")
            if (size := path.stat().st_size) > MAX_BYTES:
                raise HandoverError(
                    f"{path} is not a model card: it has {size} bytes, at most {MAX_BYTES} are read{hint}"
                )
            return cls.model_validate(_read_values(path))
        except ValidationError as error:
            raise HandoverError(f"{path} is not a model card: {_problem(error)}{hint}") from None
        except (
            ValueError,
            RecursionError,
        ) as error:  # no JSON, no UTF-8, a number of 5000 digits, or nested too deeply
            raise HandoverError(f"{path} is not a model card: {first_line(error)}{hint}") from None
        except OSError as error:
            raise HandoverError(
                f"{path} cannot be read: {error.strerror}; ask its owner, or make it readable"
            ) from None

    def sealed(self) -> Self:
        """Return the card with its own hash."""
        return self.model_copy(update={"card_sha256": card_digest(self.model_dump(mode="json"))})

    def verify(self, folder: Path) -> None:
        """Prove that the card and the bytes of every file are those that were exported.

        Raises:
            HandoverError: If a file is missing or its hash differs.
        """
        if self.card_sha256 != card_digest(_read_values(folder / CARD)):
            raise HandoverError(
                f"{folder / CARD} is damaged or was edited: its values do not match its own hash; export it again"
            )
        expected = {WEIGHTS: self.weights_sha256, FINGERPRINT: self.fingerprint_sha256}
        expected |= {
            f"labels/{seen.split}.npy": seen.sample_indices_sha256 for seen in self.labels_seen if seen.dataset
        }
        for name, digest in expected.items():
            if not (folder / name).is_file():
                raise HandoverError(f"the export {folder} is incomplete: {name} is missing; export it again")
            try:
                found = sha256_of(folder / name)
            except OSError as error:
                raise HandoverError(
                    f"{folder / name} cannot be read: {error.strerror}; ask its owner, or make it readable"
                ) from None
            if found != digest:
                raise HandoverError(
                    f"{folder / name} is damaged: its SHA-256 is {found[:12]}…, the card says {digest[:12]}…; export it again"
                )

    def check_classifier(self, folder: Path) -> None:
        """Raise ConfigError unless the export holds a classifier."""
        if self.kind != "classifier":
            raise ConfigError(f"{folder} holds a pretrainer, which names no classes; give the export of a classifier")

    def check_preprocessing(self, wanted: Preprocessing, folder: Path) -> None:
        """Raise HandoverError unless the model was trained on pixels that were prepared in the wanted way."""
        if self.preprocessing.model_copy(update={"view": wanted.view}) != wanted:  # a stage may evaluate in its own way
            there, here = (
                f"mean {list(p.mean)} and std {list(p.std)} on the ground {list(p.ground)}"
                for p in (self.preprocessing, wanted)
            )
            raise HandoverError(
                f"{folder} was trained on pixels normalised by {there}, this run uses {here};"
                " set data.mean, data.std and data.ground to the export's values"
            )

    def check_classes(self, classes: tuple[str, ...], folder: Path) -> None:
        """Raise HandoverError unless a classifier has the dataset's classes in their order. A pretrainer has none."""
        if self.kind == "classifier" and self.classes != classes:
            raise HandoverError(
                f"{folder} knows {len(self.classes)} classes ({_some(self.classes)}), the dataset has {len(classes)}"
                f" ({_some(classes)}); start from an export that was trained on these classes"
            )

    def check_labels(self, folder: Path, datasets: Mapping[str, int], labelled: np.ndarray, allow_more: bool) -> bool:
        """Compare the labels that the weights have seen with those that a stage claims to use.

        Args:
            folder: The export.
            datasets: Hash of each dataset of the stage's training data -> its first sample index there.
            labelled: Sample indices of the stage's labelled images.
            allow_more: Whether other labels are accepted.

        Returns:
            Whether the weights have seen labels outside `labelled`.

        Raises:
            HandoverError: If they have and `allow_more` is false.
        """
        for seen in self.labels_seen:
            first = datasets.get(seen.dataset or "")
            inside = first is not None and np.isin(first + sample_indices_seen(folder, seen), labelled).all()
            if not inside and not allow_more:
                raise HandoverError(
                    f"{folder} or one of its parents has seen labels outside this stage's {len(labelled)}: {seen.count} of"
                    f" '{seen.protocol}'; start from another export, or set allow_more_labels=true to mark the result"
                )
            if not inside:
                return True
        return self.more_labels_than_claimed


def card_digest(values: Mapping[str, Any]) -> str:
    """Return the hash of a card's values as its file has them, without the hash itself and where parents lay.

    It is a hash of what was written and not of the schema. So a field that a later version adds, at any depth, changes no
    hash of an older card.
    """
    kept = {key: value for key, value in values.items() if key != "card_sha256"}
    with suppress(LookupError, TypeError, AttributeError):  # no card: its hash will not match
        parents = [{k: v for k, v in parent.items() if k != "path"} for parent in kept["lineage"]["parents"]]
        kept["lineage"] = {**kept["lineage"], "parents": parents}
        look = kept["preprocessing"]
        if look.get("ground") == list(WHITE):  # this one was added while the hash was one of the schema
            kept["preprocessing"] = {key: value for key, value in look.items() if key != "ground"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _read_values(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def sample_indices_seen(folder: Path, seen: LabelsSeen) -> np.ndarray:
    """Return the sample indices of the labelled images of one split that a verified export has seen.

    Raises:
        HandoverError: If the file holds anything but `seen.count` whole numbers. Its header is checked first, since numpy
            allocates what a header claims.
    """
    path = folder / "labels" / f"{seen.split}.npy"
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
            held = path.stat().st_size - file.tell()
        if shape != (seen.count,) or dtype.kind not in "iu" or held != seen.count * dtype.itemsize:
            raise ValueError(f"it holds {shape} values of {dtype}")
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise HandoverError(
            f"{path} is no list of {seen.count} sample indices ({first_line(error, 100)}); start from another export"
        ) from None


def _problem(error: ValidationError) -> str:
    """One line about the first of the problems."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("tagged-", "function-")))
    return f"{where[:100] or 'its fields'}: {first['msg'].removeprefix('Value error, ')[:300]}"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _known_exports(near: Path = Path("runs")) -> str:
    """Name the newest exports below a folder, or say how to make one."""
    cards = (card for depth in (0, 1, 2) for card in near.glob(f"{'*/' * depth}export/{CARD}"))
    found = sorted(cards, key=lambda path: -path.stat().st_mtime)[:3]
    if not found:
        return "; `make chain NAME=mine` makes runs/mine/semi/export"
    return f"; there {'are' if len(found) > 1 else 'is'} {', '.join(str(path.parent) for path in found)}"
