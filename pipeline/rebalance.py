"""Balance the head of an exported classifier for a long tail; the backbone is not trained (Kang et al. 2020).

    python -m pipeline.rebalance EXPORT --split FILE --train DATA [--method crt|tau-norm] [--tau T] [--out FOLDER]

crt trains a new head on the split's labelled subset with all classes alike, on evaluation views. tau-norm divides each class's
weights by their norm to the power of tau, which it chooses on the split's validation subset if --tau is not given.
The result is an export of its own, and takes seconds. Exit codes: those of `python -m stages`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pipeline.cli import guarded
from pipeline.datasets.config import add_opening, opening_of
from pipeline.datasets.joint import read_manifests, with_classes
from pipeline.datasets.manifest import Manifest
from pipeline.datasets.splits import Split, read_split
from pipeline.errors import ConfigError
from pipeline.exports.card import FINGERPRINT, Card, LabelsSeen, Lineage, Parent, sample_indices_seen

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.evaluate.rebalanced_head import LinearHead


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return guarded(_run, sys.argv[1:] if arguments is None else arguments)


def _run(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.rebalance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="folder of a classifier's export, with model.json")
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="DATA", help="dataset of --split")
    parser.add_argument(
        "--split", type=Path, required=True, metavar="FILE", help="the split that the export learnt from"
    )
    parser.add_argument("--method", choices=("crt", "tau-norm"), default="crt", help="default: crt")
    parser.add_argument("--tau", type=float, help="tau-norm: the exponent, 0 to 2 (default: the best on validation)")
    parser.add_argument(
        "--weight-decay", type=float, default=1e-3, help="crt: penalty on the new head's weights (default 0.001)"
    )
    add_opening(parser)
    parser.add_argument("--out", type=Path, help="folder to write (default: EXPORT-METHOD)")
    given = parser.parse_args(arguments)
    _check(given)
    rebalance(given)
    return 0


def _check(given: argparse.Namespace) -> None:
    if given.tau is not None and (given.method == "crt" or not 0 <= given.tau <= 2):
        raise ConfigError(f"--tau {given.tau} must lie in 0 to 2 and goes with --method tau-norm")
    if not 0 < given.weight_decay <= 1e6:
        raise ConfigError(f"--weight-decay {given.weight_decay} must be above 0 and at most 1,000,000")
    given.out = given.out or given.export.with_name(f"{given.export.name}-{given.method}")
    if given.out.resolve() == given.export.resolve():
        raise ConfigError(f"--out {given.out} is the export itself, which stays as it is; choose another folder")
    if given.out.exists() and not (given.out / FINGERPRINT).is_file():
        raise ConfigError(f"--out {given.out} exists and is no export; choose another folder")


class _Rows(NamedTuple):
    """Scaled inputs of all classifier layers (n, F), and the classes (n,)."""

    features: "Tensor"
    labels: "Tensor"


def rebalance(given: argparse.Namespace) -> None:
    """Balance the head of `given.export` and write `given.out`; the arguments are those of the command.

    Raises:
        PipelineError: The export, the data or the split does not fit.
    """
    card = Card.read(given.export)
    card.check_classifier(given.export)
    train = read_manifests(given.train, opening_of(given))
    if {*train.classes} <= {*card.classes}:
        train = with_classes(train, card.classes)
    card.check_classes(train.classes, given.export)
    split = read_split(given.split, train)
    if given.method == "tau-norm" and given.tau is None and not len(split.subset("validation")):
        raise ConfigError(f"{given.split} has no validation subset to choose tau on; give --tau")

    import torch

    from pipeline.evaluate import rebalanced_head as maths
    from pipeline.exports.export import load_export, write_export
    from pipeline.exports.fingerprint import Fingerprint
    from pipeline.models.classifier_layers import classifier_layers

    model, _ = load_export(given.export)
    layers = classifier_layers(model, len(card.classes))
    images = Fingerprint.read(given.export / FINGERPRINT).images
    shares = maths.shares_of(model, layers, images)
    old = maths.read_head(layers, shares)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    held_out = _rows(model, layers, shares, card, train, split.subset("validation"))
    if given.method == "crt":
        bank = _rows(model, layers, shares, card, train, split.subset("labelled"))
        new = maths.retrained(bank.features, bank.labels, len(card.classes), weight_decay=given.weight_decay)
        how = "a new head, all classes alike"
    else:
        tau = maths.best_tau(old, *held_out) if given.tau is None else given.tau
        new = maths.tau_normalised(old, tau)
        how = f"weights over their norm to the power of {tau:g}"
    model.cpu()
    maths.write_head(new, layers, shares)
    measured = _measure(held_out, {"before": old, "after": new})
    seen = _labels_seen(given.export, card, train, split)
    rebalanced = card.model_copy(
        update={
            "lineage": Lineage(
                stage=f"rebalance {given.method}",
                config_sha256=card.lineage.config_sha256,
                commit=card.lineage.commit,
                dataset=train.hash,
                split=split.hash,
                parents=(Parent(role="init_from", path=str(given.export), weights_sha256=card.weights_sha256),),
            ),
            "labels_seen": tuple(known for known, _ in seen),
            "metrics": {},
        }
    )
    write_export(
        given.out,
        card=rebalanced,
        weights=model.state_dict(),
        fingerprint_images=images,
        labels={known.split: indices for known, indices in seen if indices is not None},
    )
    print(f"{given.method}: {how}; written to {given.out}")
    for name, found in measured.items():
        print(f"{name:6s}  balanced accuracy {found:6.2f} % on {len(held_out.labels)} validation images")


def _rows(
    model: "nn.Module",
    layers: dict[str, "nn.Linear"],
    shares: dict[str, float],
    card: Card,
    data: Manifest,
    sample_indices: np.ndarray,
) -> _Rows:
    """Compute the features of samples, on evaluation views as the card says."""
    import torch

    from pipeline.evaluate.features import features_of
    from pipeline.streaming.loader import evaluation_batches
    from pipeline.streaming.transforms import eval_views

    sample_indices = sample_indices[data.labels[sample_indices] >= 0]
    if not len(sample_indices):
        return _Rows(
            torch.zeros(0, sum(layer.in_features for layer in layers.values())), torch.zeros(0, dtype=torch.int64)
        )
    look, columns, device = card.preprocessing, [], next(model.parameters()).device
    views = eval_views(card.model.image_size, mean=look.mean, std=look.std, view=look.view, decoding=look.decoding)
    for name, layer in layers.items():
        batches = evaluation_batches(
            data, sample_indices, batch_size=card.eval_batch, rank=0, world_size=1, views=views, device=device
        )
        found = features_of(model, layer, batches, device)
        columns.append(shares[name] * found.values.cpu())
    return _Rows(torch.cat(columns, dim=1), found.labels.cpu())


def _measure(held_out: _Rows, heads: dict[str, "LinearHead"]) -> dict[str, float]:
    from pipeline.evaluate.rebalanced_head import balanced_accuracy

    if not len(held_out.labels):
        return {}
    return {name: balanced_accuracy(head, *held_out) for name, head in heads.items()}


def _labels_seen(export: Path, card: Card, train: Manifest, split: Split) -> list[tuple[LabelsSeen, np.ndarray | None]]:
    """What the export has seen, and the labelled subset of this split if that is new."""
    known = [(seen, sample_indices_seen(export, seen) if seen.dataset else None) for seen in card.labels_seen]
    if any(seen.split == split.hash for seen, _ in known):
        return known
    labelled = split.subset("labelled")
    own = LabelsSeen(split=split.hash, protocol=split.protocol, count=len(labelled), dataset=train.hash)
    return [*known, (own, labelled)]


if __name__ == "__main__":
    sys.exit(main())
