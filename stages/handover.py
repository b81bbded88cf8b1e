"""The end of a stage: the export that the next stage starts from, with its card."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from pipeline.evaluate.calibration import Calibration
from pipeline.exports.card import Card
from pipeline.exports.export import write_export
from pipeline.identity import flatten
from pipeline.models.config import DecoderConfig
from pipeline.models.family import FamilyConfig
from pipeline.report.tensorboard import Board
from stages.context import StageContext

logger = logging.getLogger(__name__)

_OF_GROUPS = tuple(f"{separator}{group}" for separator in "/_" for group in ("head", "medium", "tail", "ood"))


def export(
    s: StageContext[Any],
    weights: Mapping[str, Tensor],
    *,
    model: FamilyConfig,
    decoder: DecoderConfig | None = None,
    measured: dict[str, float],
    name: str = "student",
    companions: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write the export of a stage. Rank 0 writes; the other ranks do nothing.

    Args:
        s: The stage's context.
        weights: The model's weights by name, whole.
        model: The config of the model.
        decoder: The decoder of a pretrainer; None for a classifier, which has learnt from this run's labels.
        measured: Numbers for the card.
        name: The model's name in an evaluation, by which its temperature is known.
        companions: Weights of models that were trained beside it, by name; each is exported into export-NAME.
    """
    classifier = decoder is None
    if classifier:
        s.ancestry.saw_own_labels()
    if not s.world.is_main:
        return
    # The groups of the run count hidden labels too. An export carries only what its own labels say.
    groups = s.evaluator.groups(hidden=False) if classifier else {}
    told = {name: value for name, value in measured.items() if not name.endswith(_OF_GROUPS)}
    card = Card(
        kind="classifier" if classifier else "pretrainer",
        model=model,
        decoder=decoder,
        classes=s.manifest.classes if classifier else (),
        class_counts=tuple(s.evaluator.class_counts().tolist()) if classifier else (),
        class_groups={name: tuple(classes.tolist()) for name, classes in groups.items()},
        eval_batch=s.config.data.eval_batch,
        preprocessing=s.config.data.preprocessing,
        selected=s.selected,
        weights_sha256="",
        fingerprint_sha256="",
        lineage=s.ancestry.lineage(s.run),
        labels_seen=s.ancestry.labels_seen(),
        more_labels_than_claimed=s.ancestry.more_labels_than_claimed,
        metrics=told,
    )
    images, labels = s.fingerprint_images(model.image_size), s.ancestry.labelled_indices()
    for other, others in (companions or {}).items():
        folder = s.run.folder / f"export-{other}"
        own = _calibrated(card, s.evaluator.calibration(other))
        write_export(folder, card=own, weights=others, fingerprint_images=images, labels=labels)
    card = _calibrated(card, s.evaluator.calibration(name))
    write_export(s.run.export, card=card, weights=weights, fingerprint_images=images, labels=labels)
    logger.info("exported %s", s.run.export)
    loop = s.config.loop
    board = Board(s.run.folder / "tb", loop.steps, loop.global_batch)
    board.hparams(flatten(s.config.model_dump(mode="json")), measured, loop.steps)
    board.close()
    last = {key: value for key, value in measured.items() if not key.startswith("val/")}  # the log has the validations
    s.run.track(last | {"step": s.selected.trained})


def _calibrated(card: Card, calibration: Calibration) -> Card:
    return card.model_copy(update={"temperature": calibration.temperature, "calibration": calibration.words})
