"""`python -m launchers simulate`: what a restart reads, opens and sends on 8 to many ranks, without starting any.

The checks of the batches, the virtual readers, the order of the samples and the index of a restore are those of a real run. The
slices of the weights follow from the plan's arithmetic, which the tests compare with DeepSpeed's. Collectives are counted in
a process group that only pretends to have so many ranks (`fake_group.py`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launchers.chain import Step
from launchers.plan.profile import networks, trained_parameters
from launchers.plan.text import size
from launchers.simulate import fake_group, ranks
from pipeline.errors import ConfigError, HandoverError
from stages.check import written_by
from stages.configs.base import StageConfig

FEWEST = 8
# What a rank may not do more of in a larger world.
BOUNDED = ("files_per_rank", "opens", "bytes")
COUNTED = ("step", "save", "restore", "opened")


def run(steps: Sequence[Step], most: int) -> int:
    """Print what each rank would do at 8, 32, ... ranks, and one JSON object last.

    Args:
        steps: The stages.
        most: The largest number of ranks, a power of two.

    Returns:
        0; 1 if a rank does more in a larger world, or the ranks of two worlds serve other samples.

    Raises:
        ConfigError: `most` is no power of two from 8 on.
    """
    if most < FEWEST or most & (most - 1) or most > 2**16:
        raise ConfigError(f"--ranks {most}: give a power of two from {FEWEST} to {2**16}, for example 512")
    worlds = sorted({*(FEWEST * 4**k for k in range(8) if FEWEST * 4**k <= most), most})
    zero_stages = {step.config.engine.zero_stage for step in steps}
    seen = {world: fake_group.count(world, zero_stages) for world in sorted({worlds[0], worlds[-1]})}
    pending: dict[Path, StageConfig] = {}
    stages: dict[str, Any] = {}
    for step in steps:
        if not (step.folder / "export").is_dir():
            pending |= written_by(step.config)
        try:
            stages[step.stage] = _stage(step, worlds, seen, pending)
        except HandoverError as error:
            print(f"\n== {step.stage}: left out: {error}")
    problems = [f"{stage}: {problem}" for stage, told in stages.items() for problem in told["problems"]]
    print(
        "\nrank 0: collectives of a step, a save and a restore, and files that the restore opens, counted on a small model;"
        " otherwise opens and bytes are those of the rank with the most"
    )
    for problem in problems:
        print(f"! {problem}")
    print(json.dumps({"experiment": steps[0].folder.parent.name, "stages": stages, "problems": problems}))
    return int(bool(problems))


def _stage(
    step: Step,
    worlds: Sequence[int],
    seen: dict[int, dict[fake_group.ZeroStage, fake_group.Seen]],
    pending: dict[Path, StageConfig],
) -> dict[str, Any]:
    config, zero = step.config, step.config.engine.zero_stage
    data = ranks.data_of(config)
    workload, built = networks(config, data.classes, pending)
    parameters = trained_parameters(built["student"], config)
    best = (1 + len(workload.averages)) * (config.loop.select == "best")
    kinds = 1 + len(workload.averages) + best
    orders = ranks.Orders(config, data)
    weights = sum(p.numel for p in parameters)
    print(
        f"\n== {step.stage}: {step.path}, ZeRO {zero}, {weights / 1e6:.2f} M parameters, {orders.readers} virtual readers"
    )
    if data.manifest is None:
        print(f"   the data is absent: {ranks.IMAGES} samples in blocks of {ranks.BLOCK} stand in for it")
    counted = {world: asdict(at[zero]) for world, at in seen.items()}
    for world, told in counted.items():
        print(f"   rank 0 of {world}: " + ", ".join(f"{name} {told[name]}" for name in COUNTED))
    print("   ranks | files  opens/rank  read/rank | opens from 8 ranks' files | samples")
    found: dict[int, dict[str, Any]] = {}
    refused: dict[int, str] = {}
    for world in worlds:
        if reason := ranks.why_not(config, data, world):
            refused[world] = reason
            print(f"   {world:5} | not possible: {reason}")
            continue
        same = ranks.restore(parameters, kinds, zero, world, world)
        other = ranks.restore(parameters, kinds, zero, FEWEST, world)
        served = orders.served(world)
        print(
            f"   {world:5} | {same.files:5} {same.opens:6} {size(same.bytes):>13} | {other.opens:8} of {other.files:<14} |"
            f" {served}"
        )
        found[world] = asdict(same) | {
            "files_per_rank": same.files / world,
            "opens_from_8": other.opens,
            "samples": served,
        }
    grown = [*ranks.grows(counted, COUNTED), *(ranks.grows(found, BOUNDED) if found else ())]
    problems = [f"{key} grows with the ranks" for key in grown]
    if len({told["samples"] for told in found.values()}) > 1:
        problems.append("the ranks of two worlds serve other samples")
    return {
        "parameters": weights,
        "zero_stage": zero,
        "worlds": found,
        "rank_0": counted,
        "refused": refused,
        "problems": problems,
    }
