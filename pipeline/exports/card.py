"""The model card: what an export says of itself. Readable without torch, so parents are checked before any start.

EXPORT/
  model.json          this card; written last, so an export without it is incomplete
  README.md           the same for people, in Hugging Face's form
  config.json         the same for timm, if it knows the model
  model.safetensors   the weights, fp32
  fingerprint.safetensors   a few images and what the model said of them: whoever loads it must get the same answer
  labels/HASH.npy     for every label split seen by the model, its parents or its teacher: the labelled positions
"""

import hashlib
import json
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, ValidationError

from pipeline.config import Strict
from pipeline.errors import HandoverError
from pipeline.files import sha256_of
from pipeline.models.config import DecoderConfig, ModelConfig

WEIGHTS, PROBE, CARD = "model.safetensors", "fingerprint.safetensors", "model.json"


class Preprocessing(Strict):
    """How pixels reached the model: values in [0, 1], minus mean, over std, per channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class LabelsSeen(Strict):
    """One label split that has shaped the weights. `dataset` is the manifest's hash; `external` weights name none."""

    split: str
    protocol: str
    count: int
    dataset: str | None
    positions_sha256: str = Field("", description="of labels/SPLIT.npy")


class Parent(Strict):
    role: str  # init_from or teacher
    path: str
    weights_sha256: str


class Lineage(Strict):
    stage: str
    config_sha256: str
    commit: str
    dataset: str
    split: str | None
    parents: tuple[Parent, ...]


class Card(Strict):
    format: Literal[1] = 1
    kind: Literal["classifier", "pretrainer"]
    model: ModelConfig
    decoder: DecoderConfig | None = None
    classes: tuple[str, ...]
    class_counts: tuple[int, ...] = Field((), description="labelled training images of each class")
    class_groups: dict[str, tuple[int, ...]] = Field(default_factory=dict, description="head, medium, tail; ood")
    eval_batch: int = Field(
        256, ge=1, description="images per process and step when judged: other sizes round otherwise"
    )
    preprocessing: Preprocessing
    weights_sha256: str
    fingerprint_sha256: str
    lineage: Lineage
    labels_seen: tuple[LabelsSeen, ...]
    more_labels_than_claimed: bool = False
    metrics: dict[str, float] = Field(default_factory=dict)
    card_sha256: str = Field("", description="of all the above: a card that was edited says so")

    @classmethod
    def read(cls, folder: Path, remedy: str = "") -> Self:
        """The card of a complete export. Raises HandoverError naming what is missing; `remedy` is the command that makes it."""
        path = folder / CARD
        hint = f"; make it with: {remedy}" if remedy else ""
        if not folder.is_dir():
            raise HandoverError(f"no export at {folder}{hint}")
        for name in (CARD, WEIGHTS, PROBE):
            if not (folder / name).is_file():
                raise HandoverError(f"the export {folder} is incomplete: {name} is missing{hint}")
        try:
            return cls.model_validate(json.loads(path.read_text()))
        except (json.JSONDecodeError, ValidationError, UnicodeDecodeError) as error:
            raise HandoverError(f"{path} is not a model card: {str(error).splitlines()[0]}{hint}") from None

    def sealed(self) -> Self:
        """The card with its own hash."""
        return self.model_copy(update={"card_sha256": self._digest()})

    def _digest(self) -> str:
        values = self.model_dump(mode="json", exclude={"card_sha256"})
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def verify(self, folder: Path) -> None:
        """Raises HandoverError unless the card and every file's bytes are those that were exported."""
        if self.card_sha256 != self._digest():
            raise HandoverError(
                f"{folder / CARD} is damaged or was edited: its values do not match its own hash; export it again"
            )
        expected = {WEIGHTS: self.weights_sha256, PROBE: self.fingerprint_sha256}
        expected |= {f"labels/{seen.split}.npy": seen.positions_sha256 for seen in self.labels_seen if seen.dataset}
        for name, digest in expected.items():
            if not (folder / name).is_file():
                raise HandoverError(f"the export {folder} is incomplete: {name} is missing; export it again")
            found = sha256_of(folder / name)
            if found != digest:
                raise HandoverError(
                    f"{folder / name} is damaged: its sha256 is {found[:12]}…, the card says {digest[:12]}…; export it again"
                )

    def check_preprocessing(self, wanted: Preprocessing, folder: Path) -> None:
        if self.preprocessing != wanted:
            raise HandoverError(
                f"{folder} was trained on pixels with {self.preprocessing}, this run prepares them with {wanted};"
                " set data.mean and data.std alike"
            )

    def check_classes(self, classes: tuple[str, ...], folder: Path) -> None:
        """A classifier must know the dataset's classes, in their order; a pretrainer knows none."""
        if self.kind == "classifier" and self.classes != classes:
            raise HandoverError(
                f"{folder} knows {len(self.classes)} classes ({_some(self.classes)}), the dataset has {len(classes)}"
                f" ({_some(classes)}); start from an export trained on these classes"
            )

    def check_labels(self, folder: Path, dataset: str, labelled: np.ndarray, allow_more: bool) -> bool:
        """True if weights have seen labels outside `labelled`; raises HandoverError then, unless `allow_more`."""
        for seen in self.labels_seen:
            inside = seen.dataset == dataset and np.isin(sample_indices_seen(folder, seen), labelled).all()
            if not inside and not allow_more:
                raise HandoverError(
                    f"{folder} (or what it came from) has seen labels outside this stage's {len(labelled)}: {seen.count} of"
                    f" '{seen.protocol}'; start from another export, or set allow_more_labels=true to mark the result"
                )
            if not inside:
                return True
        return self.more_labels_than_claimed


def sample_indices_seen(folder: Path, seen: LabelsSeen) -> np.ndarray:
    """The labelled positions of one split that a verified export has seen."""
    return np.load(folder / "labels" / f"{seen.split}.npy", allow_pickle=False)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
