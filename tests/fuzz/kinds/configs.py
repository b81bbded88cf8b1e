"""Configs and the environment of a launcher."""

import random
from pathlib import Path
from typing import Any

import yaml

from tests.fuzz import mutate
from tests.fuzz.kinds.base import ROOT, Case, Material

_KEYS = (
    *(
        "run.seed",
        "model.depth",
        "optim.lr",
        "augment.rand_augment",
        "init_from",
        "run.experiment",
        "a.b",
        "run.tracker",
    ),
    *(
        "data.train",
        "data.split",
        "data.test",
        "run.root",
        "loop.global_batch",
        "engine.micro_batch",
        "data.loader.workers",
    ),
)


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
        words = (
            *mutate.WORDS,
            *map(str, mutate.HUGE),
            "9" * 5000,
            "!!int x",
            "*a",
            "[" * 999,
            "/dev/zero",
            "file:///etc",
        )
        overrides.append(f"{rng.choice(_KEYS)}={rng.choice(words)}")
    words = [stage, "config.yaml", *(o.replace("\x00", "\\0") for o in overrides)]
    if rng.random() < 0.15:
        return Case("launchers.__main__", ["plan", *words])
    return Case("stages.__main__", words)


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
