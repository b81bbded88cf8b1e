"""LyapEMA's certificate against an adversary, and the cost of the teacher: `python -m benchmarks.lyapema`.

It prints one JSON object last. The times are those of one process on 2 threads and the 25.8 M weights of vim_small. Rivals
take turns, so that other work on the machine slows them together, and medians are compared.
"""

import argparse
import copy
import json
import math
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from pipeline.cli import guarded
from pipeline.models import build_model
from pipeline.ops.torchvision_cpu import allow_torchvision
from pipeline.ssl.config import LyapEMAConfig, PseudoLabelRule
from pipeline.ssl.inference_copy import blocks_of
from pipeline.ssl.lyapema import MEASURE_EVERY, LyapEMA
from pipeline.ssl.pseudo_labels import PseudoLabeller
from pipeline.ssl.teacher import Teacher
from pipeline.streaming.loader import Batch
from pipeline.train import distributed
from pipeline.train.config import EngineConfig, OptimConfig
from pipeline.train.engine import Engine
from stages.configs.semi import SemiConfig
from stages.semi import SemiTask

MODEL = "vim_small"
MOVES = 12_000
# V is measured on the stored numbers in float64, and this is what its own sums may be off; the guard needs no slack.
SLACK = 1e-14


def adversary(weights: list[Tensor], teacher: list[Tensor], rng: random.Random) -> None:
    """Set the gradients of one student move: random, straight away from the teacher, straight to it, or zero."""
    size = 10 ** rng.uniform(-5, 2)
    kind = rng.choice(["random", "away", "away", "towards", "still"])
    for w, t in zip(weights, teacher, strict=True):
        if kind == "still":
            direction = torch.zeros_like(w)
        elif kind == "random":
            direction = torch.randn_like(w)
        else:
            direction = (w.detach() - t) * (1 if kind == "away" else -1) + 1e-12 * torch.randn_like(w)
        w.grad = -size * direction / direction.norm().clamp(min=1e-30) / math.sqrt(len(weights))


def violations(mode: str, dtype: torch.dtype) -> tuple[int, float]:
    """Count the moves after which V exceeds max(V before, R²/2), and find the largest relative error of V' = a²|d|²/2."""
    torch.manual_seed(0)
    rng = random.Random(0)
    weights = [nn.Parameter(torch.randn(n, dtype=dtype)) for n in (700, 1, 50)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    config = LyapEMAConfig.model_validate({"mode": mode, "radius_steps": 2.0, "warmup_steps": 0, "max_decay": 0.999})
    ema = LyapEMA(weights, optimizer, config)

    def energy() -> float:
        return sum(float((s.detach().double() - t.double()).square().sum()) for s, t in ema.teacher.items()) / 2

    found, error, before = 0, 0.0, 0.0
    for _ in range(MOVES):
        adversary(weights, list(ema.teacher.values()), rng)
        optimizer.step()
        report = ema.update()
        after, said = energy(), float(report["ema/alpha"].total * report["ema/d"].total) ** 2 / 2
        radius = config.radius_steps * float(ema.mean_step)
        found += after > max(before, radius**2 / 2) * (1 + SLACK)
        if after > 1e-12:
            error = max(error, abs(after - said) / after)
        before = after
    return found, error


def certificate_rows() -> dict[str, float]:
    """Attack the certificate with and without the guard."""
    guarded, error = violations("guarded", torch.float64)
    rounded, _ = violations("guarded", torch.float32)
    return {
        "certificate_moves": MOVES,
        "certificate_violations": guarded,
        "certificate_violations_fp32": rounded,
        "certificate_slack_fp32": SLACK,
        "unguarded_violations": violations("lyap", torch.float64)[0],
        "identity_error": error,
    }


def cost_rows(rounds: int) -> dict[str, float]:
    """Time a whole update, with its share of measured steps, against timm's average of the same model."""
    allow_torchvision()
    from timm.utils import ModelEmaV3

    model = build_model(MODEL)
    weights = list(model.parameters())
    rival = ModelEmaV3(model, decay=0.999)
    teachers = {}
    for name, pull in (("update", 0.0), ("pull", 1e-4)):
        optimizer = torch.optim.SGD(weights, lr=0.0)
        teachers[name] = (LyapEMA(weights, optimizer, LyapEMAConfig(warmup_steps=0, pull=pull)), optimizer)
    for w in weights:
        w.grad = w.detach()  # the hooks skip weights without a gradient
    seconds: dict[str, list[float]] = {name: [] for name in ("ema", "update", "pull", "measured", "pull measured")}

    def clock(name: str, run: Any) -> None:
        begin = time.perf_counter()
        run()
        seconds[name].append(time.perf_counter() - begin)

    def whole(name: str, measured: bool) -> None:
        ema, optimizer = teachers[name]
        ema.updates = 2 * MEASURE_EVERY + (not measured)
        ema._before_step(optimizer)
        ema._after_step(optimizer)
        ema.update()

    for _ in range(rounds + 1):
        clock("ema", lambda: rival.update(model))
        clock("update", lambda: whole("update", False))
        clock("pull", lambda: whole("pull", False))
        clock("measured", lambda: whole("update", True))
        clock("pull measured", lambda: whole("pull", True))
    typical = {name: statistics.median(values[1:]) for name, values in seconds.items()}

    def amortised(plain: str, measured: str) -> float:
        return typical[plain] + (typical[measured] - typical[plain]) / MEASURE_EVERY

    update, with_pull = amortised("update", "measured"), amortised("pull", "pull measured")
    return {
        "parameters": sum(p.numel() for p in weights),
        "ema_ms": 1e3 * typical["ema"],
        "update_ms": 1e3 * update,
        "update_vs_ema": update / typical["ema"],
        "update_with_pull_vs_ema": with_pull / typical["ema"],
    }


def semi_config() -> SemiConfig:
    """Return stage 3's defaults; nothing is read from the paths."""
    return SemiConfig.model_validate(
        {
            "run": {"experiment": "benchmark"},
            "data": {"train": "unused", "split": "unused"},
            "init_from": "distill",
            "optim": {"lr": 1e-4},
            "loop": {"steps": 10, "global_batch": 16},
            "unlabelled_ratio": 1,
            "pseudo": {"threshold": 0.0},
        }
    )


def engine_of(model: nn.Module, zero_stage: int) -> Engine:
    """Return an engine for micro-batches of 16."""
    return Engine(
        model,
        distributed.start(600.0),
        optim=OptimConfig(lr=1e-4),
        config=EngineConfig(zero_stage=zero_stage, bucket_bytes=2**24),  # type: ignore[arg-type]
        micro_batch=16,
        accumulation=1,
    )


def step_seconds() -> float:
    """Time a step of stage 3 at 224 px with 16 labelled and 16 unlabelled images; return the faster of two."""
    model, config = build_model(MODEL), semi_config()
    teacher = copy.deepcopy(model)
    engine = engine_of(model, 0)
    prior = torch.full((1000,), 1e-3, dtype=torch.float64)
    task = SemiTask(engine, teacher, PseudoLabeller(prior, PseudoLabelRule(threshold=0.0)), config, prior, None)
    images = torch.randn(2, 16, 3, 224, 224)
    indices, labels = torch.arange(16), torch.randint(1000, (16,))
    batch = {
        "labelled": Batch(images=images[0], labels=labels, indices=indices, virtual_readers=8),
        "unlabelled": Batch(
            images=images[1], strong=images[1], labels=labels - 1000, indices=indices, virtual_readers=8
        ),
    }
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        output = task.loss(engine.model, batch)
        engine.backward(output.loss)
        engine.step(1e-4)
        task.after_step(output.loss.detach())
        seconds.append(time.perf_counter() - begin)
    engine.close()
    distributed.stop()
    return min(seconds)


def _sharded(rank: int, zero_stage: int, port: int, results: Any) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    model = build_model(MODEL)
    module = copy.deepcopy(model)
    blocks = [sum(4 * p.numel() for p in parameters.values()) for _, parameters in blocks_of(module)]
    engine = engine_of(model, zero_stage)
    teacher = Teacher(engine, module, LyapEMAConfig())
    held = sum(4 * p.numel() for p in teacher.module.parameters())
    if teacher.copy.by_blocks:  # nothing between forward passes; inside one, what is outside of blocks and one block
        held = blocks[-1] + max(blocks[:-1])
    own = sum(4 * t.numel() for t in teacher.sharded_state().values())
    results.put((zero_stage, own / (4 * engine.num_weights / 2), held, 4 * engine.num_weights))
    engine.close()
    distributed.stop()


def memory_rows() -> dict[str, Any]:
    """Measure the teacher's bytes on a rank over 4P/N at two processes, and what the inference copy holds and moves."""
    context = multiprocessing.get_context("spawn")
    ratios, copies, gathered = {}, {}, 0
    for zero_stage in (1, 2, 3):
        results = context.Queue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [context.Process(target=_sharded, args=(rank, zero_stage, port, results)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        rows = [results.get(timeout=600) for _ in ranks]
        for rank in ranks:
            rank.join()
        ratios[zero_stage] = max(row[1] for row in rows)
        copies[f"zero{zero_stage}"], gathered = rows[0][2], rows[0][3]
    return {
        "teacher_bytes_per_rank_vs_4P_over_N": max(ratios.values()),
        "inference_copy_bytes": copies,
        "all_gather_bytes": gathered,
        "all_gather_per": "update under ZeRO 1 and 2, forward pass under ZeRO 3",
    }


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark and return its exit code."""
    return guarded(_run, arguments)


def _run(words: list[str]) -> int:
    """Print all numbers."""
    parser = argparse.ArgumentParser("python -m benchmarks.lyapema", description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args(words).rounds
    torch.set_num_threads(2)
    rows: dict[str, Any] = certificate_rows()
    rows |= memory_rows()
    rows |= cost_rows(rounds)
    rows["step_seconds"] = step_seconds()
    rows["update_share_of_step"] = rows["update_ms"] / 1e3 / rows["step_seconds"]
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
