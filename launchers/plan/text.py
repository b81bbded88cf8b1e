"""A plan as text, for a person."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def show(plan: Mapping[str, Any], folder: Path | None) -> None:
    """`folder`: where its files are; None if there are none."""
    for s in plan["stages"]:
        zero = str(s["zero_stage"])
        needs = s["memory"][zero]
        epochs = ", ".join(f"{n:.1f} epochs of {name}" for name, n in s["epochs"].items())
        print(f"\n== {s['stage']}: {s['steps']} steps, {s['samples']} samples{' = ' + epochs if epochs else ''}")
        print(
            f"   {s['world_size']} ranks x {s['accumulation']} micro-batches of {s['micro_batch']};"
            f" {s['virtual_readers']} virtual readers over {s['shards']} shards; possible worlds: {_some(s['worlds_possible'])}"
        )
        print(f"   {s['parameters'] / 1e6:.2f} M parameters, {s['flops_per_step'] / 1e12:.4g} TFLOP a step")
        host = f" + {size(needs['host'])} of the host" if needs["host"] else ""
        print(f"   memory a rank, ZeRO {zero}: {size(needs['device'])}{_room(plan['cluster'])}{host}:")
        names = (
            "parameters",
            "gradients",
            "masters",
            "moments",
            "teacher",
            "working_teacher",
            "frozen_teacher",
            "buckets",
            "activations",
        )
        print("     " + ", ".join(f"{name.replace('_', ' ')} {size(needs[name])}" for name in names if needs[name]))
        others = ", ".join(f"ZeRO {z} {size(s['memory'][z]['device'])}" for z in s["memory"] if z != zero)
        print(f"     ({others})")
        print(
            f"   checkpoint {size(s['checkpoint_bytes'])}, {s['checkpoints_written']} written; on disk {size(s['disk_bytes'])}"
        )
        print(
            f"   {s['step_seconds']:.3g} s a step, {s['hours']:.3g} hours, {s['device_hours']:.3g} device-hours,"
            f" {size(s['sent_bytes_per_step'])} sent a rank and step; {_starts(s, plan['cluster'])}"
        )
        print("   scaling (ranks: images/s, efficiency): " + "  ".join(map(_point, s["scaling"])))
        for how, command in s["commands"].items():
            print(f"   {how}: {command}")
    disk = plan["disk"]
    print(f"\ndisk: {size(disk['needed'])} needed, {size(disk['free'])} free")
    print("assumptions:\n" + "\n".join(f"  - {line}" for line in plan["assumptions"]))
    for problem in plan["problems"]:
        print(f"! {problem}")
    if folder is None:
        print("not written: the experiment has begun, and keeps the plan it has")
        return
    print(
        f"the resolved configs and the batch scripts, to be read: {folder / 'plan'}; all numbers: {folder / 'plan.json'}"
    )


def _room(cluster: Mapping[str, Any]) -> str:
    if not cluster["gpus_per_node"]:
        return ""
    there = cluster["device_memory_gb"]
    return f" of {there:g} GB" if there else " (of a GPU whose device_memory_gb the preset does not tell: not compared)"


def _starts(stage: Mapping[str, Any], cluster: Mapping[str, Any]) -> str:
    if not stage["starts"]:
        return "no start is long enough"
    enough = (
        ""
        if stage["starts"] - 1 <= cluster["max_requeues"]
        else f"  ! more than max_requeues {cluster['max_requeues']}"
    )
    return f"{stage['starts']} starts of {cluster['time']} ({stage['starts'] - 1} requeues){enough}"


def _point(scale: Mapping[str, Any]) -> str:
    if not scale["possible"]:
        return f"{scale['world_size']}: -"
    return f"{scale['world_size']}: {scale['images_per_second']:.4g}, {100 * scale['efficiency']:.0f} %"


def _some(worlds: Sequence[int]) -> str:
    return ", ".join(map(str, worlds)) if len(worlds) < 12 else ", ".join(map(str, worlds[:10])) + f", ... {worlds[-1]}"


def size(number: float) -> str:
    """Bytes, in powers of a thousand."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
