"""The printed form of a plan."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def show(plan: Mapping[str, Any], folder: Path | None) -> None:
    """Print a plan.

    Args:
        plan: As in plan.json.
        folder: The experiment's folder, if the plan is written there; None if it is printed only.
    """
    for s in plan["stages"]:
        zero = str(s["zero_stage"])
        needs = s["memory"][zero]
        epochs = ", ".join(f"{n:.1f} epochs of {name}" for name, n in s["epochs"].items())
        print(f"\n== {s['stage']}: {s['steps']} steps, {s['samples']} samples{' = ' + epochs if epochs else ''}")
        print(
            f"   {s['world_size']} ranks x {s['accumulation']} micro-batches of {s['micro_batch']};"
            f" {s['virtual_readers']} virtual readers over {s['shards']} shards;"
            f" possible world sizes: {_some(s['worlds_possible'])}"
        )
        tflop = s["flops_per_step"] / 1e12
        print(
            f"   {s['parameters'] / 1e6:.2f} M parameters, {s['images_per_step']} images and {tflop:.4g} TFLOP per step"
        )
        host = f" + {size(needs['host'])} on the host" if needs["host"] else ""
        print(f"   memory per rank, ZeRO {zero}: {size(needs['device'])}{_limit(plan['cluster'])}{host}:")
        names = (
            "parameters",
            "gradients",
            "masters",
            "moments",
            "averages",
            "best",
            "inference_copies",
            "frozen",
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
            f"   {s['step_seconds']:.3g} s per step (at least {s['step_seconds_least']:.3g}), {s['hours']:.3g} hours (at least"
            f" {s['hours_least']:.3g}), {s['device_hours']:.3g} device-hours,"
            f" {size(s['sent_bytes_per_step'])} sent per rank and step; {_starts(s, plan['cluster'])}"
        )
        print(
            "     " + ", ".join(f"{name} {_seconds(part)}" for name, part in s["step_parts"].items() if part["likely"])
        )
        if s["step_parts"]["decoding"]["likely"] >= s["step_seconds"] and s["workers"]:
            print(
                f"     steps wait for images: {s['workers']} workers decode per rank (the fewer of data.loader.workers and"
                " cluster:cpus_per_task)"
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
        print("not written: the experiment has begun, and keeps the plan that it has")
        return
    print(f"resolved configs and batch scripts: {folder / 'plan'}; all numbers: {folder / 'plan.json'}")


def _seconds(part: Mapping[str, float]) -> str:
    """Format the least and the likely seconds of a part of a step."""
    least, likely = f"{part['least']:.2g}", f"{part['likely']:.2g}"
    return f"{least} s" if least == likely else f"{least} to {likely} s"


def _limit(cluster: Mapping[str, Any]) -> str:
    if not cluster["gpus_per_node"]:
        return ""
    there = cluster["device_memory_gb"]
    return f" of {there:g} GB" if there else " (not compared: the preset states no device_memory_gb)"


def _starts(stage: Mapping[str, Any], cluster: Mapping[str, Any]) -> str:
    if not stage["starts"]:
        return "no start is long enough to train"
    enough = (
        ""
        if stage["starts"] - 1 <= cluster["max_requeues"]
        else f"  ! more than max_requeues {cluster['max_requeues']}"
    )
    number = stage["starts"]
    words = "1 start" if number == 1 else f"{number} starts"
    return f"{words} of {cluster['time']} ({number - 1} requeues){enough}"


def _point(scale: Mapping[str, Any]) -> str:
    if not scale["possible"]:
        return f"{scale['world_size']}: -"
    return f"{scale['world_size']}: {scale['images_per_second']:.4g}, {100 * scale['efficiency']:.0f} %"


def _some(worlds: Sequence[int]) -> str:
    return ", ".join(map(str, worlds)) if len(worlds) < 12 else ", ".join(map(str, worlds[:10])) + f", ... {worlds[-1]}"


def size(number: float) -> str:
    """Format a number of bytes, in powers of a thousand."""
    for unit in ("B", "KB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
