"""What `convert` reads: tables, folders, benchmarks' archives, parquet, tars, and addresses of a web server."""

import io
import json
import os
import pickle
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.kinds.base import Case, Material
from tests.fuzz.kinds.pictures import picture
from tests.fuzz.kinds.runs import odd


def source(rng: random.Random, folder: Path, have: Material) -> Case:
    """A source of images that is damaged, contradicts itself, or is no such source at all."""
    words = rng.choice((_table, _table, _folder, _folder, _cifar, _svhn, _parquet, _tars, _tars))(rng, folder)
    more = [*rng.choice(([], ["--skip-unreadable"])), "--processes", "1"]
    if words[0] != "tars":
        more += ["--out", rng.choice(("out", "out", "out", "in/out", "x" * 300)), *rng.choice(([], ["--resize", "8"]))]
    return Case("pipeline.data", ["convert", *words, *more])


def _sound() -> bytes:
    from PIL import Image

    whole = io.BytesIO()
    Image.new("RGB", (9, 9), (1, 2, 3)).save(whole, "PNG")
    return whole.getvalue()


def _table(rng: random.Random, folder: Path) -> list[str]:
    ending = rng.choice(("csv", "tsv", "jsonl", "json"))
    (folder / "in").mkdir()
    for name in ("a", "b"):
        (folder / "in" / f"{name}.png").write_bytes(_sound())
    names = [rng.choice(("a.png", "b.png", *mutate.WORDS, "../../../etc/passwd", "/dev/zero")) for _ in range(6)]
    rows: Any = [{"image": name, "label": rng.choice(("cat", "dog", "", *mutate.WORDS))} for name in names]
    if ending in ("csv", "tsv"):
        mark = "," if ending == "csv" else "\t"
        lines = [mark.join(("image", "label")), *(mark.join(map(str, row.values())) for row in rows)]
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
    else:
        rows = mutate.tree(rng, rows, rng.randrange(3))
        rows = rows if isinstance(rows, list) else [rows]
        found = [json.dumps(row) for row in rows]
        text = ("\n".join(found) if ending == "jsonl" else f"[{','.join(found)}]").encode()
    text = mutate.data(rng, text) if rng.random() < 0.4 else text
    text = rng.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"")) + text if rng.random() < 0.2 else text
    (folder / "in" / f"t.{ending}").write_bytes(text)
    if rng.random() < 0.05:
        odd(rng, folder / "in" / f"t.{ending}")
    return ["csv", f"in/t.{ending}", "--image", rng.choice(("image", "image", "label", "x")), "--label", "label"]


def _folder(rng: random.Random, folder: Path) -> list[str]:
    """Names that few expect, and things that are no files."""
    root = os.fsencode(folder / "in")
    for name in (b"cat", b"dog"):
        os.makedirs(root + b"/" + name)
        Path(os.fsdecode(root + b"/" + name + b"/a.png")).write_bytes(_sound())
    names = (
        b"\xff.png",
        b"a\nb.png",
        b"x" * 251 + b".png",
        b"..png",
        b" .png",
        b"-rf.png",
        b"a.b.c.png",
        "é.png".encode(),
    )
    names += ("e\u0301.png".encode(), b"a.PNG", b"*.png", b"a\\b.png", b"a\x7f\x1b[31m.png", b"con.png", b"{0}.png")
    for name in rng.sample(names, rng.randrange(1, 6)):
        place = os.path.join(root, rng.choice((b"cat", b"dog", b"d" * 255, b"deep/" + b"/".join([b"n"] * 100))))
        os.makedirs(place, exist_ok=True)
        Path(os.fsdecode(os.path.join(place, name))).write_bytes(picture(rng))
    if rng.random() < 0.3:
        odd(rng, folder / "in" / "cat" / rng.choice(("odd.png", "odd")))
    if rng.random() < 0.2:
        (folder / "in" / "dog" / "loop").symlink_to(folder / "in")
    return [rng.choice(("imagefolder", "folder")), "in"]


def _cifar(rng: random.Random, folder: Path) -> list[str]:
    root = folder / "in" / "cifar-10-batches-py"
    root.mkdir(parents=True)
    import numpy as np

    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]:
        content: Any = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]}
        (root / name).write_bytes(pickle.dumps(content, protocol=2))
    names = {"label_names": [f"c{k}" for k in range(10)]}
    (root / "batches.meta").write_bytes(pickle.dumps(names, protocol=2))
    path = rng.choice(sorted(root.iterdir()))
    hostile: tuple[Callable[[], bytes], ...] = (
        lambda: mutate.data(rng, path.read_bytes()),
        lambda: mutate.data(rng, path.read_bytes(), 20),
        lambda: pickle.dumps(mutate.tree(rng, {"data": [1], "labels": [0, 10**9], "label_names": ["a"]}), protocol=2),
        lambda: b"cos\nsystem\n(S'touch executed'\ntR.",
        lambda: b"\x80\x02" + b"]" * 10**5 + b".",
        lambda: b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        lambda: b"\x80\x02X\xff\xff\xff\x7f.",
        lambda: b"\x80\x02(r\xff\xff\xff\x7f.",
        lambda: b"\x80\x02" + b"((lp0\n" + b"I1\na" * 1000 + b".",
    )
    path.write_bytes(rng.choice(hostile)())
    return ["cifar", "in"]


def _svhn(rng: random.Random, folder: Path) -> list[str]:
    import numpy as np
    from scipy.io import savemat

    (folder / "in").mkdir()
    for name in ("train", "test"):
        values = {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]], np.uint8)}
        savemat(folder / "in" / f"{name}_32x32.mat", values, do_compression=rng.random() < 0.5)
    path = folder / "in" / f"{rng.choice(('train', 'test'))}_32x32.mat"
    whole = bytearray(path.read_bytes())
    if rng.random() < 0.5:  # a size in the header of a variable
        place = rng.randrange(128, len(whole) - 4) & ~3
        whole[place : place + 4] = struct.pack("<I", rng.choice((0, 2**31 - 1, 2**32 - 1, 10**6, 14, 15)))
    path.write_bytes(whole if rng.random() < 0.5 else mutate.data(rng, bytes(whole)))
    return ["svhn", "in"]


def _parquet(rng: random.Random, folder: Path) -> list[str]:
    (folder / "in").mkdir()
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        (folder / "in" / "a.parquet").write_bytes(b"PAR1")
        return ["parquet", "in"]
    words = [word for word in mutate.WORDS if word != "\ud800"]  # pyarrow refuses to write it
    table = pa.table(
        {
            "image": [{"bytes": _sound(), "path": rng.choice((None, *words))} for _ in range(3)],
            "label": rng.choice(([0, 1, 0], ["a", "b", ""], [0, None, 10**9], [True, False, True], [0.5, 1.0, 2.0])),
        }
    )
    path = folder / "in" / "a.parquet"
    if rng.random() < 0.3:
        path = path.with_suffix(".arrow")
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.parquet.write_table(table, path)
    whole = path.read_bytes()
    if rng.random() < 0.5:  # the footer says where everything is
        place = len(whole) - rng.randrange(1, min(600, len(whole)))
        whole = whole[:place] + rng.randbytes(rng.choice((1, 4))) + whole[place + 4 :]
    path.write_bytes(mutate.data(rng, whole) if rng.random() < 0.7 else whole)
    return ["parquet", "in"]


def _tars(rng: random.Random, folder: Path) -> list[str]:
    """Archives with links, devices, holes, long records, or an archive within."""
    (folder / "in").mkdir()
    with tarfile.open(folder / "in" / "0.tar", "w", format=rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT))) as tar:
        for k in range(3):
            _add(tar, f"s{k}.png", _sound() if rng.random() < 0.7 else picture(rng))
            _add(tar, f"s{k}.cls", rng.choice((b"0", b"1", b"9" * 5000, b"20000000", b"-1", b"\xff", b"cat", b"")))
        name = rng.choice(
            ("../../x.png", "/etc/x.png", "a/" * 60 + "x.png", "s0.png", "s9.png", "\udcff.png", "x" * 300)
        )
        info = tarfile.TarInfo(name)
        info.type = rng.choice(
            (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, b"S", b"x", b"L", b"7")
        )
        info.linkname = rng.choice(("s0.png", "/etc/passwd", "../../x"))
        if rng.random() < 0.4:
            info.pax_headers = {
                rng.choice(("path", "size", "GNU.sparse.size", "x")): rng.choice(("9" * 30, "y" * 60_000, "-5", "../x"))
            }
        tar.addfile(info)
    path = folder / "in" / "0.tar"
    if rng.random() < 0.4:
        path.write_bytes(mutate.data(rng, path.read_bytes()))
    elif rng.random() < 0.2:
        odd(rng, path)
    return ["tars", "in", *rng.choice(([], ["--label-key", "cls"], ["--image-key", "png"]))]


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def served(rng: random.Random, folder: Path, have: Material) -> Case:
    """A dataset behind an address whose server lies about sizes, never ends, redirects, or serves damaged files."""
    address = f"{have.server}/{rng.choice(FAULTS)}/{rng.randrange(10**6)}/train"
    if rng.random() < 0.5:
        tars = rng.choice(("{000000..000001}", "000000", "{0..99999999}", "{0..", "{a..b}", "000000.tar#/../x"))
        address += f"/{tars}.tar"
    return Case("tests.fuzz.commands", ["index", address])


FAULTS = (
    "none",
    "damaged",
    "total",
    "tiny",
    "negative",
    "endless",
    "file",
    "round",
    "other",
    "status",
    "empty",
    "json",
)
