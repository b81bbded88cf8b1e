"""Labels of unlabelled samples never reach a loss: whatever they are, the weights are the same."""

import json
from pathlib import Path

import numpy as np

from pipeline.datasets.manifest import read_manifest
from pipeline.datasets.splits import read_split
from tests.conftest import Stages
from tests.relabel import relabelled


def poisoned(digits: Path, folder: Path) -> Path:
    """The digits with random labels on all but the labelled and validation samples, and the same split of them."""
    manifest = read_manifest(digits / "train")
    split = read_split(digits / "split.json", manifest)
    hidden = np.concatenate([split.subset("unlabelled"), split.subset("unused")])
    labels = manifest.labels.copy()
    labels[hidden] = np.random.default_rng(0).permutation(labels[hidden])
    changed = relabelled(manifest, folder / "train", labels)
    assert (read_manifest(folder / "train").labels != manifest.labels).sum() > 0.7 * len(hidden)
    content = json.loads((digits / "split.json").read_text()) | {"manifest": changed.hash}
    del content["sha256"]
    (folder / "split.json").write_text(json.dumps(content))
    return folder


def test_random_labels_on_unlabelled_samples_leave_every_weight_of_stage_3_identical(chain: Stages, tmp_path: Path):
    folder = poisoned(chain.digits, tmp_path / "poisoned")
    parent = f"init_from={chain.runs / 'smoke' / 'distill' / 'export'}"
    # To the lineage this is another dataset, so the parent's labels count as foreign ones.
    data = [f"data.train={folder / 'train'}", f"data.split={folder / 'split.json'}", "allow_more_labels=true"]
    run = chain.complete("semi", parent, *data, "run.experiment=poisoned")
    straight = chain.runs / "smoke" / "semi" / "export" / "model.safetensors"
    assert (run / "export" / "model.safetensors").read_bytes() == straight.read_bytes()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(row.get("ssl/mask_rate", 0) for row in rows) > 0  # unlabelled samples did count
