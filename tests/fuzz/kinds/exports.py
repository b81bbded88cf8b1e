"""Exports and weights files from somebody else."""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.kinds.base import ROOT, Case, Material, encoded


def card(rng: random.Random, folder: Path, have: Material) -> Case:
    """A foreign export whose card was changed and sealed again, or not."""
    export = folder / "export"
    shutil.copytree(have.export, export)
    values = json.loads((export / "model.json").read_text())
    if rng.random() < 0.3:
        seen = values["labels_seen"][0]
        seen["split"] = rng.choice(mutate.WORDS)
        seen["dataset"] = rng.choice(("data", None, "x"))
    else:
        values = mutate.tree(rng, values, rng.randrange(1, 3))
    if rng.random() < 0.2:
        name = rng.choice(("model.safetensors", "fingerprint.safetensors", "labels/s.npy"))
        (export / name).write_bytes(mutate.data(rng, (export / name).read_bytes()))
        _rehash(export, values)
    if rng.random() < 0.85:
        values = _sealed(values)
    text = encoded(values)
    (export / "model.json").write_bytes(mutate.data(rng, text) if rng.random() < 0.1 else text)
    way = rng.random()
    if way < 0.4:
        return Case("tests.fuzz.commands", ["load", "export"])
    if way < 0.5:
        return Case("pipeline.predict", ["export", str(have.small.parent / "images/test/c0"), "--csv", "out.csv"])
    if way < 0.52:
        return Case("pipeline.evaluate.__main__", ["export", str(have.digits / "test"), "--out", "out"])
    if way < 0.54:
        data = ["--train", str(have.digits / "train"), "--split", str(have.digits / "split.json")]
        return Case("pipeline.rebalance", ["export", *data, "--method", "tau-norm", "--tau", "1", "--out", "out"])
    if way < 0.56:
        return Case("pipeline.models.__main__", ["onnx", "export", "--out", "model.onnx"])
    split = [f"data.train={have.digits}/train", f"data.split={have.digits}/split.json", "data.test=null"]
    split += ["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "allow_more_labels=true"]
    return Case(
        "stages.__main__", ["semi", str(ROOT / "configs/semi/smoke.yaml"), *split, "run.root=runs", "init_from=export"]
    )


def _rehash(export: Path, values: Any) -> None:
    from pipeline.files import sha256_of

    if isinstance(values, dict):
        values["weights_sha256"] = sha256_of(export / "model.safetensors")
        values["fingerprint_sha256"] = sha256_of(export / "fingerprint.safetensors")
        if isinstance(seen := values.get("labels_seen"), list) and seen and isinstance(seen[0], dict):
            seen[0]["sample_indices_sha256"] = sha256_of(export / "labels/s.npy")


def _sealed(values: Any) -> Any:
    """What somebody would do who forges a card: let the card compute its own hash, if it takes the values."""
    from pipeline.exports.card import Card

    try:
        return Card.model_validate(values).sealed().model_dump(mode="json")
    except Exception:
        return values


def weights(rng: random.Random, folder: Path, have: Material) -> Case:
    """A weights file: its header, its archive, its pickle or its bytes are damaged."""
    kind = rng.randrange(6)
    path = folder / rng.choice(("w.pth", "w.safetensors", "w.bin"))
    if kind == 0:
        path.write_bytes(mutate.data(rng, have.weights.read_bytes()))
    elif kind == 1:
        whole = (have.export / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", whole[:8])[0]
        header = mutate.tree(rng, json.loads(whole[8 : 8 + size]), rng.randrange(1, 4))
        text = encoded(header)
        path.write_bytes(
            struct.pack("<Q", len(text) if rng.random() < 0.8 else rng.choice((0, 2**63, 10**9)))
            + text
            + whole[8 + size :]
        )
    elif kind == 2:
        with zipfile.ZipFile(have.weights) as old, zipfile.ZipFile(path, "w", rng.choice((0, 0, 8))) as new:
            for member in old.infolist():
                content = old.read(member)
                if rng.random() < 0.3 or member.filename.endswith(".pkl"):
                    content = mutate.data(rng, content) if rng.random() < 0.9 else content * 1000
                if rng.random() < 0.95:
                    new.writestr(member.filename, content)
    elif kind == 3:
        path.write_bytes(pickle.dumps(mutate.value(rng), protocol=2))
    elif kind == 4:
        path.write_bytes(_odd_checkpoint(rng))
    else:
        path.write_bytes(
            rng.choice(
                (b"", b"PK\x05\x06", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02" + b"]" * 10**5 + b".")
            )
        )
    return Case("pipeline.models.__main__", ["convert", path.name, "--out", "out"])


class _Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def _odd_checkpoint(rng: random.Random) -> bytes:
    """A well-formed checkpoint of tensors that no state dict has."""
    import torch

    one = torch.zeros(1)
    odd = {
        "meta": lambda: torch.empty(10**9, 512, device="meta"),
        "expanded": lambda: one.expand(10**9, 512),
        "sparse": lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**9, 512)),
        "complex": lambda: torch.zeros(3, dtype=torch.complex64),
        "empty": lambda: torch.zeros(0, 5),
        "scalar": lambda: torch.zeros(()),
        "bool": lambda: torch.zeros(3, dtype=torch.bool),
        "runs": lambda: _Runs(),
    }
    names = [
        "patch_embed.proj.weight",
        "layers.0.mixer.A_log",
        "layers.0.mixer.A_b_log",
        "pos_embed",
        "head.weight",
        "x",
    ]
    state = {name: odd[rng.choice(list(odd))]() for name in names if rng.random() < 0.7}
    state |= {f"layers.{i}.x": one for i in range(rng.choice((0, 0, 3, 30_000)))}
    whole = io.BytesIO()
    wrapped = state if rng.random() < 0.5 else {rng.choice(("model", "state_dict", "args")): state}
    torch.save(wrapped, whole, _use_new_zipfile_serialization=rng.random() < 0.7)
    return whole.getvalue()
