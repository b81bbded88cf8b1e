"""Run folders: damaged checkpoints that a stage continues from, and damaged books that commands read."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz import mutate
from tests.fuzz.kinds.base import ROOT, Case, Material, damaged, encoded

STEPS = 3  # The runs in `Material` have so many.
_BOOKS = (
    "config.yaml",
    "environment.json",
    "status.json",
    "metrics.jsonl",
    "log.txt",
    "report/flight_rank_00000.jsonl",
)


def stage_command(stage: str, have: Material, *more: str) -> list[str]:
    """Return the arguments of `python -m stages` for a run of a few steps on the small dataset."""
    data = [f"data.train={have.small}/train", f"data.split={have.small}/split.json", f"data.test={have.small}/test"]
    short = [f"loop.steps={STEPS}", "loop.save_every=1", "loop.keep_checkpoints=9", "data.loader.virtual_readers=2"]
    return [stage, str(ROOT / f"configs/{stage}/smoke.yaml"), *data, *short, "run.root=runs", *more]


def checkpoint(rng: random.Random, folder: Path, have: Material) -> Case:
    """A run whose last step is missing, and whose checkpoints or books were damaged. The stage continues it.

    Unless somebody has sealed wrong content again, the end is refused or it is that of the undisturbed run.
    """
    stage = rng.choice(("arm", "arm", "semi"))
    run = folder / "runs" / "smoke" / stage
    shutil.copytree(have.runs / "smoke" / stage, run)
    if stage == "semi":
        shutil.copytree(have.runs / "smoke" / "distill" / "export", run.parent / "distill" / "export")
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints" / f"step_{STEPS:08d}")
    newest = run / "checkpoints" / f"step_{STEPS - 1:08d}"
    what = rng.choice((_flip, _flip, _forge_state, _forge_shards, _forge_complete, _odd_entry, _odd_folder, _books))
    sealed = what(rng, newest if what is not _books else run)
    sound = have.runs / "smoke" / stage / "export" / "model.safetensors"
    return Case(
        "tests.fuzz.commands", ["resume", "" if sealed else str(sound), *stage_command(stage, have)], trains=True
    )


def _flip(rng: random.Random, newest: Path) -> bool:
    path = rng.choice(sorted(newest.iterdir()))
    path.write_bytes(mutate.data(rng, path.read_bytes()))
    return path.name == "COMPLETE"  # it holds the hashes of the others, and nothing holds its own


def _forge_state(rng: random.Random, newest: Path) -> bool:
    values = json.loads((newest / "state.json").read_text())
    part = rng.choice(("task", "loop", "inputs", ""))
    if part and rng.random() < 0.7:
        values[part] = mutate.tree(rng, values[part], rng.randrange(1, 4))
    else:
        values = mutate.tree(rng, values, rng.randrange(1, 3))
    (newest / "state.json").write_bytes(encoded(values))
    _seal(newest)
    return True


def _forge_shards(rng: random.Random, newest: Path) -> bool:
    path = newest / "shards_00000.safetensors"
    whole = path.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header, content = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    kind = rng.randrange(4)
    if kind == 0:
        header = mutate.tree(rng, header, rng.randrange(1, 4))
    elif kind == 1:
        names = sorted(header)
        header[rng.choice(("x", "master/x@0", f"{rng.choice(names)}9", "master/@", "@", "/"))] = header.pop(
            rng.choice(names)
        )
    elif kind == 2:
        place = 4 * rng.randrange(len(content) // 4)
        odd = rng.choice((float("nan"), float("inf"), 1e38, -1e38, 0.0))
        content = content[:place] + struct.pack("<f", odd) + content[place + 4 :]
    else:
        content = mutate.data(rng, content)
    text = encoded(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)
    if rng.random() < 0.1:
        shutil.copyfile(path, newest / "shards_00001.safetensors")
    _seal(newest)
    return True


def _forge_complete(rng: random.Random, newest: Path) -> bool:
    values = json.loads((newest / "COMPLETE").read_text())
    if rng.random() < 0.5:
        values[rng.choice(("../../x", "/etc/passwd", "shards_99999.safetensors", "COMPLETE", "", "x" * 300))] = "0" * 64
    else:
        values = mutate.tree(rng, values, rng.randrange(1, 3))
    (newest / "COMPLETE").write_bytes(encoded(values))
    return True


def _odd_entry(rng: random.Random, newest: Path) -> bool:
    """Something else lies where a file of the checkpoint, or the checkpoint, should be."""
    path = rng.choice((*sorted(newest.iterdir()), newest))
    odd(rng, path)
    return False


def _odd_folder(rng: random.Random, newest: Path) -> bool:
    """Folders beside the checkpoints, with names like theirs."""
    names = (
        "step_x",
        "step_",
        "step_99999999",
        f"step_{10**30}",
        "step_0000000²",
        ".step_00000003.tmp",
        "damaged_step_00000002",
    )
    other = newest.with_name(rng.choice(names))
    if rng.random() < 0.5:
        other.mkdir()
        (other / "COMPLETE").write_text(rng.choice(("", "{}", "[]", "x")))
    else:
        odd(rng, other)
    return False


def _books(rng: random.Random, run: Path) -> bool:
    for _ in range(rng.randrange(1, 4)):
        damage_a_book(rng, run, _BOOKS)
    return False


def _section(rng: random.Random, folder: Path) -> list[str]:
    """A section of somebody else for a report, whose parts are damaged, foreign or no drawing."""
    table = {"name": "t", "title": "T", "header": ["a"], "rows": [["1"], ["$\\x$ <b>"]], "note": ""}
    inside = rng.choice(
        ("<script>x</script>", "<g><path d='M0 0'/></g>", "<g>" * 10_000, "<a href='file:///x'/>", "&x;")
    )
    svg = rng.choice(("", "<!DOCTYPE svg>")) + f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    figure = {"name": "f", "title": "F", "note": "", "svg": svg, "wide": False}
    values = {"title": "S", "tables": [table], "figures": [figure]}
    folder.mkdir()
    (folder / "section.json").write_bytes(encoded(mutate.tree(rng, values, rng.randrange(3))))
    if rng.random() < 0.3:
        damage_a_book(rng, folder, ("section.json",))
    return ["--with", "section"]


def damage_a_book(rng: random.Random, run: Path, names: tuple[str, ...]) -> None:
    """Damage one of the files of a folder, or put something else in its place."""
    path = run / rng.choice(names)
    if not path.is_file() or rng.random() < 0.15:
        path.parent.mkdir(parents=True, exist_ok=True)
        odd(rng, path)
    elif path.suffix == ".jsonl" and rng.random() < 0.7:
        lines = path.read_bytes().splitlines() or [b"{}"]
        place = rng.randrange(len(lines))
        lines[place] = _changed(rng, lines[place])
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(damaged(rng, path))


def _changed(rng: random.Random, line: bytes) -> bytes:
    try:
        return encoded(mutate.tree(rng, json.loads(line), rng.randrange(1, 3)))
    except ValueError:
        return mutate.data(rng, line)


def odd(rng: random.Random, path: Path) -> None:
    """Put a folder, a FIFO, a link that leads nowhere or into itself, an empty file or a device there instead."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    made: tuple[Callable[[], Any], ...] = (
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to("nowhere"),
        lambda: path.symlink_to(path.name),
        path.touch,
        lambda: path.symlink_to("/dev/zero"),
    )
    rng.choice(made)()


def _seal(newest: Path) -> None:
    from pipeline.files import sha256_of

    files = {path.name: sha256_of(path) for path in sorted(newest.iterdir()) if path.name != "COMPLETE"}
    (newest / "COMPLETE").write_text(json.dumps(files))


def books(rng: random.Random, folder: Path, have: Material) -> Case:
    """A finished experiment whose books were damaged, for the commands that read them."""
    shutil.copytree(have.runs, folder / "runs", ignore=shutil.ignore_patterns("checkpoints"))
    experiment = folder / "runs" / "smoke"
    stage = rng.choice(("arm", "distill", "semi"))
    files = tuple(
        str(p.relative_to(experiment))
        for p in sorted(experiment.rglob("*"))
        if p.is_file() and p.suffix in (".json", ".jsonl", ".yaml", ".npz", ".npy") and "export" not in p.parts
    )
    more = ("plan.json", "data-check.json", "folds.json", f"{stage}/incidents.jsonl", f"{stage}/quarantine.jsonl")
    for _ in range(rng.randrange(1, 4)):
        damage_a_book(rng, experiment, files if rng.random() < 0.8 else (*more, f"{stage}/export/model.json"))
    command = rng.choice(("report", "status", "label-next", "replay"))
    if command == "report":
        for export in experiment.glob("*/export"):  # without pictures of where the models look, which take seconds
            shutil.rmtree(export)
        more = _section(rng, folder / "section") if rng.random() < 0.5 else []
        return Case("pipeline.report.__main__", ["runs/smoke", "--out", "page.html", *more])
    if command == "status":
        return Case("launchers.__main__", ["status", "--root", "runs"])
    if command == "label-next":
        return Case("pipeline.data", ["label-next", "runs/smoke", "--number", "3", "--out", "picks"])
    return Case("stages.__main__", ["arm", "--replay", "runs/smoke/arm", "1"])
