"""The kinds of input: for each, a sound one to begin with, how it is damaged, and the command that meets it.

A case is made by `make(rng, folder)`, which writes the input into the case's folder and returns the command. The command
runs in a forked child (`law.py`), whose current folder is the case's.
"""

import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml

from tests.fuzz import mutate

ROOT = Path(__file__).resolve().parents[2]


class Case(NamedTuple):
    """A command: a module's `main`, its arguments, and variables of the environment."""

    module: str
    arguments: list[str]
    environment: Mapping[str, str] = MappingProxyType({})


class Material(NamedTuple):
    """What sound inputs are made of: the digits as shards, and exports of a tiny model."""

    digits: Path
    export: Path
    weights: Path  # a torch checkpoint of a tiny Vim in its released layout


def config(rng: random.Random, folder: Path, have: Material) -> Case:
    """A stage's config, as damaged values or as damaged text, and damaged overrides."""
    stage = rng.choice(("arm", "distill", "semi"))
    values: Any = yaml.safe_load((ROOT / f"configs/{stage}/smoke.yaml").read_text())
    if rng.random() < 0.6:
        values = mutate.tree(rng, values, rng.randrange(1, 4))
        text = _yaml(values)
    else:
        text = _bad_yaml(rng, _yaml(values))
    (folder / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    split = [f"data.train={have.digits}/train", f"data.split={have.digits}/split.json", f"data.test={have.digits}/test"]
    overrides = split if rng.random() < 0.7 else []
    overrides += ["run.root=runs"] if rng.random() < 0.8 else []
    if rng.random() < 0.4:
        key = rng.choice(
            ("run.seed", "model.depth", "optim.lr", "augment.rand_augment", "init_from", "run.experiment", "a.b")
        )
        overrides.append(
            f"{key}={rng.choice((*mutate.WORDS, *map(str, mutate.HUGE), '9' * 5000, '!!int x', '*a', '[' * 999))}"
        )
    return Case("stages.__main__", [stage, "config.yaml", *(o.replace("\x00", "\\0") for o in overrides)])


def _yaml(values: Any) -> str:
    try:
        return yaml.safe_dump(values, sort_keys=False)
    except (RecursionError, yaml.YAMLError):
        return "a: " + "[" * 2000


def _bad_yaml(rng: random.Random, text: str) -> str | bytes:
    lines = text.splitlines()
    place = rng.randrange(len(lines))
    key = lines[place].partition(":")[0]
    bad = (
        "0x_",
        "0b_",
        "2024-01-01",
        "9" * 5000,
        "!!int abc",
        "!!python/object:os.system {}",
        "!!timestamp x",
        "*x",
        "1:2:3",
    )
    bad += (
        "!!binary x",
        "!!set {a}",
        "!!float x",
        "!!bool x",
        '"\\0"',
        '"\\ud800"',
        "-.inf",
        ".nan",
        "1e999",
        "[" * 3000,
        "{" * 50,
    )
    bad += ("&a [1, 2]", "<<", "? x", "!!omap [a]", "'", "|\n  x", "- 1")
    lines[place] = f"{key}: {rng.choice(bad)}"
    if rng.random() < 0.2:
        lines += [
            "a: &a [x,x,x,x,x,x,x,x,x]",
            *(f"b{i}: &b{i} [{','.join(9 * [f'*b{i - 1}' if i else '*a'])}]" for i in range(12)),
        ]
    if rng.random() < 0.2:
        return mutate.data(rng, "\n".join(lines).encode())
    return "\n".join(lines)


def card(rng: random.Random, folder: Path, have: Material) -> Case:
    """A foreign export whose card was changed and sealed again, or not."""
    export = folder / "export"
    _copy(have.export, export)
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
    try:
        text = json.dumps(values).encode("utf-8", "surrogatepass")
    except RecursionError:
        text = b"[" * 10_000
    (export / "model.json").write_bytes(mutate.data(rng, text) if rng.random() < 0.1 else text)
    if rng.random() < 0.5:
        return Case("tests.fuzz.commands", ["load", "export"])
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
        try:
            text = json.dumps(header).encode()
        except RecursionError:
            text = b'{"a":' * 10_000
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


def environment(rng: random.Random, folder: Path, have: Material) -> Case:
    """Variables that a launcher sets, as garbage or in contradiction."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")
    names += (
        "SLURM_STEP_NUM_TASKS",
        "SLURM_LOCALID",
        "SLURM_STEP_NODELIST",
        "SLURM_JOB_ID",
        "SLURM_RESTART_COUNT",
        "HOME",
    )
    words = (
        "0",
        "1",
        "2",
        "-1",
        "x",
        "",
        "99999999999999999999",
        "1.5",
        "0x1",
        "²",
        "9" * 300,
        "127.0.0.1",
        "8.8.8.8",
        "[",
        "n[1-2]",
    )
    chosen = names[:5] if rng.random() < 0.4 else rng.sample(names, rng.randrange(1, 9))
    given = {name: rng.choice(words) for name in chosen}
    return Case("tests.fuzz.commands", ["meet"], given)


def manifest(rng: random.Random, folder: Path, have: Material) -> Case:
    """A dataset whose manifest or index was damaged."""
    _copy(have.digits / "train", folder / "data")
    names = [path for path in sorted((folder / "data").iterdir()) if path.suffix != ".tar"]
    path = rng.choice(names)
    path.write_bytes(_damaged(rng, path))
    return Case("pipeline.data", ["verify", "data"] if rng.random() < 0.5 else ["show", "data"])


def split(rng: random.Random, folder: Path, have: Material) -> Case:
    """A split file that was damaged."""
    path = folder / "split.json"
    path.write_bytes(_damaged(rng, have.digits / "split.json"))
    data = [f"data.train={have.digits}/train", "data.split=split.json", "data.test=null", "run.root=runs"]
    if rng.random() < 0.5:
        return Case("tests.fuzz.commands", ["split", f"{have.digits}/train", "split.json", f"{have.digits}/split.json"])
    return Case("stages.__main__", ["arm", str(ROOT / "configs/arm/smoke.yaml"), *data])


def tar(rng: random.Random, folder: Path, have: Material) -> Case:
    """A shard whose bytes were damaged."""
    _copy(have.digits / "test", folder / "data")
    path = rng.choice(sorted((folder / "data").glob("*.tar")))
    path.write_bytes(mutate.data(rng, path.read_bytes()))
    return Case("pipeline.data", ["verify", "data"])


def image(rng: random.Random, folder: Path, have: Material) -> Case:
    """A picture that was damaged, for the command that converts folders."""
    from PIL import Image

    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (24, 24), (9, 90, 200)).save(folder / "photos" / name / "sound.png")
    whole = io.BytesIO()
    kind = rng.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"))
    Image.new(rng.choice(("RGB", "L")), (rng.choice((1, 30)), 20)).save(whole, kind)
    found = (
        mutate.data(rng, whole.getvalue()) if rng.random() < 0.9 else b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n"
    )
    (folder / "photos" / "cat" / f"odd.{rng.choice(('png', 'jpg', 'webp'))}").write_bytes(found)
    return Case("pipeline.data", ["convert", "imagefolder", "photos", "--out", "out", "--processes", "1"])


def _damaged(rng: random.Random, path: Path) -> bytes:
    whole = path.read_bytes()
    try:
        values = json.loads(whole)
    except ValueError:
        return mutate.data(rng, whole)
    if rng.random() < 0.3:
        return mutate.data(rng, whole)
    try:
        return json.dumps(mutate.tree(rng, values, rng.randrange(1, 3))).encode("utf-8", "surrogatepass")
    except RecursionError:
        return b"[" * 10_000


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


Make = Callable[[random.Random, Path, Material], Case]
KINDS: dict[str, Make] = {
    "config": config,
    "card": card,
    "weights": weights,
    "environment": environment,
    "manifest": manifest,
    "split": split,
    "tar": tar,
    "image": image,
}
