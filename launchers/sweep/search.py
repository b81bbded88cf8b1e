"""Run a sweep: `python -m launchers sweep STAGE|chain CONFIG|NAME [key=value ...] --over key=values ... [--trials N] [--jobs N]`.

ROOT/EXPERIMENT-sweep/
  sweep.json                 what is searched; another search is refused
  journal.log                the trials (Optuna's journal)
  logs/trial-NNN.log         what a trial printed
  sweep.csv, .md, .tex       the table

Trials are the experiments EXPERIMENT-sweep-NNN. A sweep that was stopped or killed continues when it is typed again: first the
trials that were open, each from its newest checkpoint, then new ones. On this machine `--jobs` trials run at a time, each in a
process of its own. With `--cluster` one call is one round: what has ended is noted, and as many trials as `array_parallel`
allows are submitted as arrays.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launchers.chain import CHAIN, Step
from launchers.config import ClusterConfig
from launchers.local import die_with_parent
from launchers.sweep.study import Study, Trial
from launchers.sweep.trials import Order, check_axes, score_of, steps_of, words_of
from pipeline.books import read_status
from pipeline.errors import ConfigError, PipelineError
from pipeline.exit_codes import ExitCode
from pipeline.files import replace_text
from pipeline.jsonl import read_object
from pipeline.locks import locked
from pipeline.report.tables import Table
from stages import spec_of
from stages.check import check, is_complete

# A trial that ends so has values that cannot be trained with; after any other code every trial would end alike.
ITS_OWN_FAULT = (ExitCode.CONFIG, ExitCode.DIVERGED)
HOPELESS = 3  # So many failures without a success end the sweep.
GRACE_SECONDS = 60.0  # what stages have to save when the sweep is stopped


def run(order: Order, cluster: ClusterConfig | None = None) -> int:
    """Run a sweep, or with a cluster one round of it, and print its table.

    Returns:
        0, or the exit code of the trial that ended the sweep.

    Raises:
        PipelineError: Something is refused before a trial starts, or another process runs this sweep.
    """
    check_axes(order)
    last = order.base[-1].config
    order.folder.mkdir(parents=True, exist_ok=True)
    busy = f"another process runs the sweep {order.folder}; wait for its end, or stop it"
    with locked(order.folder / "lock", busy):
        _refuse_other(order)
        study = Study(
            order.folder / "journal.log",
            order.axes,
            sampler=order.sampler,
            seed=order.seed,
            minimise=spec_of(last).minimises(last),
        )
        code = _locally(order, study) if cluster is None else _round(order, study, cluster)
        table = results(order, study)
        table.write(order.folder)
    print(f"\n{table.title}\n\n{table.markdown()}", flush=True)
    return code


def results(order: Order, study: Study) -> Table:
    """Return the trials as a table, the best first, with the command that trains the best one for good."""
    keys = [axis.key for axis in order.axes]
    name, rows = "validation", []
    for trial in study.ranked():
        score = "" if trial.score is None else f"{trial.score:.4g}"
        rows.append([f"{trial.number:03d}", trial.state, *(trial.values.get(key, "") for key in keys), score])
    best = study.best()
    note = "No trial is complete yet."
    if best is not None:
        with suppress(PipelineError):  # its folder may have been removed since
            name = score_of(steps_of(order, best)).name
        words = " ".join([*order.overrides, *best.overrides])
        note = (
            f"Trial {best.number:03d} has the best validation; no trial has seen a test set. Train it with the config's test set:"
            f" `python -m launchers local {order.stage} {order.config} {words}`"
        )
    return Table(
        name="sweep", title=f"Sweep {order.folder}", header=["trial", "state", *keys, name], rows=rows, note=note
    )


def _locally(order: Order, study: Study) -> int:
    """Run trials until there are enough, `order.jobs` at a time."""
    running: dict[int, tuple[Trial, subprocess.Popen[bytes]]] = {}
    free, ended = list(range(order.jobs)), ExitCode.COMPLETE
    checked = False
    try:
        while True:
            while free and not ended and (trial := _next(order, study, {t.number for t, _ in running.values()})):
                if (steps := _valid(order, study, trial)) is None:
                    continue
                if not checked:  # once, and before any process: what ends one trial so ends all
                    check(steps[0].config, order.nproc)
                    checked = True
                slot = free.pop(0)
                running[slot] = trial, _start(order, trial, slot)
            if not running:
                return ended
            for slot, (trial, process) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[slot]
                    free.append(slot)
                    ended = ended or _tell(order, study, trial, code)
            time.sleep(0.05)
    finally:
        _stop([process for _, process in running.values()])


def _next(order: Order, study: Study, running: set[int]) -> Trial | None:
    """Return a trial that is open and not running, or a new one; None if there are enough."""
    trials = study.trials()
    for trial in trials:
        if trial.state == "open" and trial.number not in running:
            return trial
    return study.ask() if len(trials) < order.trials else None


def _valid(order: Order, study: Study, trial: Trial) -> list[Step] | None:
    """Return the steps of a trial; None if its values do not go together, and it has failed."""
    try:
        return steps_of(order, trial)
    except ConfigError as error:
        study.tell(trial.number, None)
        _say(trial, f"failed: {str(error).splitlines()[-1].strip()}")
        return None


def _start(order: Order, trial: Trial, slot: int) -> subprocess.Popen[bytes]:
    words = words_of(order, trial.number, trial.overrides)
    command = [
        sys.executable,
        "-m",
        "launchers",
        "local",
        order.stage,
        order.config,
        *words,
        "--nproc",
        str(order.nproc),
    ]
    command += ["--no-report"] if order.stage == CHAIN else []
    _say(trial, " ".join(trial.overrides))
    with _log(order, trial).open("ab") as log:
        return subprocess.Popen(
            command,
            env=os.environ | _share(order, slot),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on once
            preexec_fn=die_with_parent,
        )


def _share(order: Order, slot: int) -> Mapping[str, str]:
    """Give a trial its part of the machine: threads, and GPUs of its own if several trials run at a time."""
    if order.jobs == 1:
        return {}
    threads = max(1, (os.cpu_count() or 1) // (order.jobs * order.nproc))
    share = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    known = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = known.split(",") if known else [str(n) for n in range(len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))]
    if len(gpus) > 1:
        first = slot * order.nproc % len(gpus)
        share["CUDA_VISIBLE_DEVICES"] = ",".join((gpus * 2)[first : first + min(order.nproc, len(gpus))])
    return share


def _tell(order: Order, study: Study, trial: Trial, code: int) -> ExitCode:
    """Tell what a trial reached; return the code that ends the sweep, or 0."""
    if code == ExitCode.COMPLETE:
        score = score_of(steps_of(order, trial))
        study.tell(trial.number, score.value)
        _say(trial, f"{score.name} {score.value:.4g}")
        return ExitCode.COMPLETE
    lines = _log(order, trial).read_text(errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    known = code in ExitCode._value2member_map_
    if code not in ITS_OWN_FAULT:
        print(f"error: trial {trial.number:03d} ended with {code}: {said}", file=sys.stderr, flush=True)
        return ExitCode(code) if known else ExitCode.DISTRIBUTED
    study.tell(trial.number, None)
    _say(trial, f"failed: {said}")
    trials = study.trials()
    if sum(t.state == "failed" for t in trials) >= HOPELESS and not any(t.state == "complete" for t in trials):
        print(
            f"error: the first {HOPELESS} trials failed; look at {order.folder / 'logs'}", file=sys.stderr, flush=True
        )
        return ExitCode(code)
    return ExitCode.COMPLETE


def _round(order: Order, study: Study, cluster: ClusterConfig) -> int:
    """Tell the study what has ended on a cluster, and submit as many trials as may run at a time."""
    from launchers import slurm

    points = []
    for trial in study.trials():
        if trial.state != "open" or (steps := _valid(order, study, trial)) is None:
            continue
        queued = any(slurm.active_job(step, cluster) for step in steps)
        failed = [read_status(step.folder) for step in steps if read_status(step.folder).get("state") == "failed"]
        if not queued and all(is_complete(step.config) for step in steps):
            study.tell(trial.number, score_of(steps).value)
        elif not queued and failed:
            study.tell(trial.number, None)
            _say(trial, f"failed: {failed[0].get('reason') or 'see its log'}")
        else:
            points.append(steps)
    while len(points) < cluster.array_parallel and len(study.trials()) < order.trials and (new := study.ask()):
        if steps := _valid(order, study, new):
            points.append(steps)
    for job in slurm.run(points, cluster, order.folder) if points else ():
        print(f"{job.experiment} {job.stage}: job {job.job_id} {job.state}")
    if points:
        print(f"trials on the cluster: {len(points)}; type the same command again when they have ended")
    return ExitCode.COMPLETE


def _log(order: Order, trial: Trial) -> Path:
    folder = order.folder / "logs"
    folder.mkdir(exist_ok=True)
    return folder / f"trial-{trial.number:03d}.log"


def _say(trial: Trial, what: str) -> None:
    print(f"trial {trial.number:03d}: {what}", flush=True)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let the stages save, and end what has not ended after the grace."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()


def _refuse_other(order: Order) -> None:
    """Keep what is searched, and refuse a folder in which another search has begun."""
    here: dict[str, Any] = {
        "stage": order.stage,
        "config": order.config,
        "overrides": list(order.overrides),
        "axes": [axis._asdict() for axis in order.axes],
        "sampler": order.sampler,
        "seed": order.seed,
    }
    here = json.loads(json.dumps(here))
    path = order.folder / "sweep.json"
    there = read_object(path)
    if there and (apart := [key for key in here if there.get(key) != here[key]]):
        raise ConfigError(
            f"{order.folder} holds a sweep with other {', '.join(apart)}; type it as it was, or give run.experiment=NAME"
        )
    replace_text(path, json.dumps(here, indent=1) + "\n")
