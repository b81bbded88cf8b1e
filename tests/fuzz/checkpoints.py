"""The kind `checkpoint`: a run that was stopped before its last step, with its checkpoints or its books damaged.

A restart may refuse in a sentence, or continue. If what was damaged is not sealed again, continuing means to end with the
very weights of a run that was never damaged: from the newest sound checkpoint, or from the start.
"""

import itertools
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

from pipeline.files import replace_text, sha256_of
from pipeline.train.saved_state import COMPLETE, STATE, complete
from tests.fuzz import mutate

STEPS = 3
WEIGHTS = "arm/export/model.safetensors"


def overrides(runs: str, digits: Path) -> list[str]:
    """The config and the overrides of the run; it takes a second."""
    root = Path(__file__).resolve().parents[2]
    data = [f"data.train={digits}/train", f"data.split={digits}/split.json", "data.test=null", f"run.root={runs}"]
    loop = [f"loop.steps={STEPS}", "loop.save_every=1", "loop.keep_checkpoints=9", "loop.global_batch=4"]
    less = ["optim.warmup_steps=1", "linear_probe=null", "run.experiment=finished"]
    return [str(root / "configs/arm/smoke.yaml"), *data, *loop, *less]


def stop_before_the_end(finished: Path, stopped: Path) -> None:
    """Copy a finished experiment as it was before its last step."""
    shutil.copytree(finished, stopped)
    shutil.rmtree(stopped / "arm/export")
    shutil.rmtree(complete(stopped / "arm/checkpoints")[0])


def damage(rng: random.Random, experiment: Path) -> bool:
    """Damage a stopped experiment; returns whether continuing must end with the weights of the undamaged one."""
    kinds = (_bytes, _removal, _complete, _other_world, _names, _special, _books, _resealed_state, _resealed_shards)
    chosen = rng.choice(kinds)
    chosen(rng, experiment / "arm")
    return chosen not in (_resealed_state, _resealed_shards)


def _newest(rng: random.Random, run: Path) -> Path:
    found = complete(run / "checkpoints")
    return found[0] if rng.random() < 0.7 or len(found) < 2 else found[1]


def _bytes(rng: random.Random, run: Path) -> None:
    path = rng.choice(sorted(p for p in _newest(rng, run).iterdir() if p.is_file()))
    path.write_bytes(mutate.data(rng, path.read_bytes()))


def _removal(rng: random.Random, run: Path) -> None:
    for checkpoint in complete(run / "checkpoints"):
        for path in sorted(checkpoint.iterdir()):
            if rng.random() < 0.4:
                path.unlink()


def _complete(rng: random.Random, run: Path) -> None:
    path = _newest(rng, run) / COMPLETE
    files = json.loads(path.read_text())
    name = rng.choice(sorted(files))
    hostile = ("../../../outside", "/etc/passwd", "a\x00b", "", ".", "x" * 300, "\ud800", "shards_00000.safetensors/..")
    kind = rng.randrange(5)
    if kind == 0:
        files[rng.choice(hostile)] = files[name]
    elif kind == 1:
        files[rng.choice(hostile)] = files.pop(name)
    elif kind == 2:
        files[name] = mutate.value(rng)
    elif kind == 3:
        files.pop(name)
    else:
        files = mutate.tree(rng, files, 2)
    _write(path, files)


def _resealed_state(rng: random.Random, run: Path) -> None:
    checkpoint = _newest(rng, run)
    state = mutate.tree(rng, json.loads((checkpoint / STATE).read_text()), rng.randrange(1, 4))
    _write(checkpoint / STATE, state)
    _reseal(checkpoint)


def _resealed_shards(rng: random.Random, run: Path) -> None:
    checkpoint = _newest(rng, run)
    path = checkpoint / "shards_00000.safetensors"
    header, values = _open(path)
    if rng.random() < 0.5:
        header = mutate.tree(rng, header, rng.randrange(1, 4))
    else:
        key = rng.choice(sorted(header))
        bad = (
            "master/x@-5",
            "master/x@1.5",
            "x",
            "master/@0",
            "/x@0",
            f"master/x@{9**30}",
            "master/../../x@0",
            "a/b@²",
        )
        header[rng.choice(bad)] = header.pop(key)
    try:
        text = json.dumps(header).encode("utf-8", "surrogatepass")
    except RecursionError:
        text = b'{"a":' * 10_000
    path.write_bytes(struct.pack("<Q", len(text)) + text + values)
    _reseal(checkpoint)


def _other_world(rng: random.Random, run: Path) -> None:
    """Cut every parameter at random places, as ranks of another world would have written it; sometimes lose a file."""
    checkpoint, ranks = _newest(rng, run), rng.choice((2, 3, 8))
    header, values = _open(checkpoint / "shards_00000.safetensors")
    parts: list[dict[str, bytes]] = [{} for _ in range(ranks)]
    for key, entry in header.items():
        begin, end = entry["data_offsets"]
        place, _, start = key.rpartition("@")
        count = (end - begin) // 4
        cuts = sorted(rng.randrange(count + 1) for _ in range(ranks - 1))
        for part, low, high in zip(parts, [0, *cuts], [*cuts, count], strict=True):
            if low < high:
                part[f"{place}@{int(start) + low}"] = values[begin + 4 * low : begin + 4 * high]
    order = list(range(ranks))
    rng.shuffle(order)
    for number, part in zip(order, parts, strict=True):
        offsets = itertools.accumulate((len(piece) for piece in part.values()), initial=0)
        entries = {
            key: {"dtype": "F32", "shape": [len(piece) // 4], "data_offsets": [first, first + len(piece)]}
            for (key, piece), first in zip(part.items(), offsets, strict=False)
        }
        text = json.dumps(entries).encode()
        path = checkpoint / f"shards_{number:05d}.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(part.values()))
    kind = rng.randrange(4)
    if kind == 0:  # a rank's file is lost: refused, whether or not the list of files is of before
        (checkpoint / f"shards_{rng.randrange(ranks):05d}.safetensors").unlink()
    if kind != 1:
        _reseal(checkpoint)
    if kind == 2:  # two ranks' files exchange names, which the hashes notice
        a, b, c = (checkpoint / f"shards_{k}.safetensors" for k in ("00000", "00001", "x"))
        a.rename(c), b.rename(a), c.rename(b)


def _names(rng: random.Random, run: Path) -> None:
    newest = _newest(rng, run)
    name = rng.choice(
        ("step_x", "step_", f"step_{9**30}", "step_-0000001", "step_00000001.5", "step_²", "step_\n", "step_1")
    )
    shutil.copytree(newest, newest.with_name(name))
    if rng.random() < 0.5:
        shutil.copytree(newest, newest.with_name(f"damaged_{newest.name}"))
        _bytes(rng, run)
    if rng.random() < 0.3:
        newest.with_name(f".{newest.name}.tmp").mkdir()


def _special(rng: random.Random, run: Path) -> None:
    path = rng.choice(sorted(_newest(rng, run).iterdir()))
    path.unlink()
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/etc/passwd", path.name, "nowhere")))
    else:
        path.touch()


def _books(rng: random.Random, run: Path) -> None:
    (run / "heartbeat").mkdir(exist_ok=True)
    (run / "heartbeat" / rng.choice(("rank_x", "rank_", "rank_99999999999999999999", "rank_-1"))).touch()
    names = (
        "metrics.jsonl",
        "status.json",
        "environment.json",
        "incidents.jsonl",
        "log.txt",
        "quarantine.jsonl",
        "config.yaml",
    )
    path = run / rng.choice(names)
    before = path.read_bytes() if path.is_file() else b"{}"
    path.write_bytes(mutate.data(rng, before) if rng.random() < 0.7 else b"\xff\x00{" * 99)


def _write(path: Path, values: Any) -> None:
    try:
        path.write_bytes(json.dumps(values).encode("utf-8", "surrogatepass"))
    except RecursionError:
        path.write_bytes(b"[" * 10_000)


def _reseal(checkpoint: Path) -> None:
    files = [p for p in sorted(checkpoint.iterdir()) if p.name != COMPLETE]
    replace_text(checkpoint / COMPLETE, json.dumps({p.name: sha256_of(p) for p in files}))


def _open(path: Path) -> tuple[dict[str, Any], bytes]:
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]
