"""What the tests of conversions are fed with, and how they call `convert` and look at what it wrote."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data import main
from pipeline.datasets.manifest import read_manifest


def image(seed: int, form: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (24, 32, 3), np.uint8)).save(buffer, form)
    return buffer.getvalue()


def put(root: Path, *names: str) -> Path:
    """Write an image to each of the paths; equal names get equal bytes."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image(len(name)))
    return root


def labels(folder: Path) -> dict[str, str | None]:
    manifest = read_manifest(folder)
    names = [*manifest.classes, None]
    return {manifest.key(i): names[manifest.labels[i]] for i in range(manifest.num_samples)}


def convert(*words: object) -> int:
    return main(["convert", *map(str, words), "--processes", "1"])


def tar(folder: Path, members: list[tuple[str, bytes]], name: str = "000000.tar") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / name, "w") as file:
        for member, data in members:
            info = tarfile.TarInfo(member)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return folder


def parquet(path: Path, table: dict, metadata: dict | None = None) -> None:
    pa = pytest.importorskip("pyarrow", reason="parquet is an optional extra")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    made = pa.table(table)
    if metadata:
        made = made.replace_schema_metadata({b"huggingface": json.dumps(metadata).encode()})
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, made.schema) as writer:
            writer.write_table(made)
    else:
        pq.write_table(made, path)


def members(ending: str, values: list[str | None], picture: str = "jpg") -> list[tuple[str, bytes]]:
    found = []
    for k, value in enumerate(values):
        found.append((f"s{k}.{picture}", image(k)))
        if value is not None:
            found.append((f"s{k}.{ending}", value.encode()))
    return found
