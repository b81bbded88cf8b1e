"""Where a model comes from: the exports that it starts from, and every label that it or they have seen."""

from pathlib import Path

import numpy as np
from torch import nn

from pipeline.datasets.manifest import Manifest
from pipeline.datasets.splits import Split
from pipeline.errors import HandoverError
from pipeline.exports.card import Card, LabelsSeen, Lineage, Parent, sample_indices_seen
from pipeline.exports.export import load_export
from pipeline.train.distributed import World, any_rank
from pipeline.train.run import Run
from stages import spec_of
from stages.check import check_parent
from stages.configs.base import StageConfig
from stages.spec import Subsets


class Ancestry:
    """The parents of one run and the labels that travel with its result.

    Args:
        config: The stage's config.
        manifest: The training manifest.
        split: Its split, or None.
        subsets: The subsets of the split.
        world: The processes.
    """

    def __init__(
        self, config: StageConfig, manifest: Manifest, split: Split | None, subsets: Subsets, world: World
    ) -> None:
        self._config, self._manifest, self._split, self._subsets = config, manifest, split, subsets
        self._world = world
        self._parents: list[tuple[str, Path, Card]] = []
        self._labels: dict[str, tuple[LabelsSeen, np.ndarray | None]] = {}
        self.more_labels_than_claimed = False

    def folder(self, role: str) -> Path:
        """Return the folder of a parent's export."""
        return spec_of(self._config).parents(self._config)[role]

    def card(self, role: str) -> Card:
        """Return the card of a parent that has been loaded."""
        return next(card for known, _, card in self._parents if known == role)

    def load(self, role: str) -> nn.Module:
        """Load and verify the model of a parent (collective). The labels that it saw count as seen by this run's result.

        One rank of each node hashes the files.

        Raises:
            PipelineError: The export is missing or damaged, or does not fit.
        """
        folder = self.folder(role)
        problem = None
        try:
            if self._world.leads_node:
                Card.read(folder).verify(folder)
        except HandoverError as error:
            problem = error
        if any_rank(problem is not None, self._world):
            raise problem or HandoverError(f"{folder} is damaged, as another rank has found; export it again")
        model, card = load_export(folder, hashed=True)
        self.more_labels_than_claimed |= check_parent(self._config, role, folder, card, self._manifest, self._subsets)
        self._parents.append((role, folder, card))
        for seen in card.labels_seen:
            self._labels[seen.split] = (seen, sample_indices_seen(folder, seen) if seen.dataset else None)
        return model

    def saw_external_labels(self, name: str) -> None:
        """Note that weights from outside were trained on labels that nobody here can list."""
        seen = LabelsSeen(split=name, protocol=f"whatever {name} was trained on", count=0, dataset=None)
        self._labels[name] = (seen, None)
        self.more_labels_than_claimed |= self._split is not None

    def saw_own_labels(self) -> None:
        """Note that this run trains on the labels of its labelled subset."""
        name = self._split.hash if self._split else f"all-{self._manifest.hash}"
        seen = LabelsSeen(
            split=name,
            protocol=self._split.protocol if self._split else "all labels",
            count=len(self._subsets.labelled),
            dataset=self._manifest.hash,
        )
        self._labels[name] = (seen, self._subsets.labelled)

    def labels_seen(self) -> tuple[LabelsSeen, ...]:
        """Return the descriptions of all labels seen, for the card."""
        return tuple(seen for seen, _ in self._labels.values())

    def labelled_indices(self) -> dict[str, np.ndarray]:
        """Map each split whose labels were seen to its sample indices, where they are known."""
        return {name: indices for name, (_, indices) in self._labels.items() if indices is not None}

    def lineage(self, run: Run) -> Lineage:
        """Describe the origin of this run's result, for the card."""
        return Lineage(
            stage=self._config.stage,
            config_sha256=run.config_sha256,
            commit=run.commit,
            dataset=self._manifest.hash,
            split=self._split.hash if self._split else None,
            parents=tuple(
                Parent(role=role, path=str(folder), weights_sha256=card.weights_sha256)
                for role, folder, card in self._parents
            ),
        )
