"""A run's folder: its identity, its provenance and its numbers.

runs/EXPERIMENT/STAGE/
  config.yaml  environment.json  status.json  heartbeat  metrics.jsonl  evaluation.json  log.txt
  tb/  checkpoints/  export/  report/
"""

import fcntl
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil
from pydantic import BaseModel, ValidationError

from pipeline.books import read_values
from pipeline.errors import ConfigError, DataError, EnvironmentProblem, HandoverError
from pipeline.files import replace_text
from pipeline.identity import dump_yaml, flatten, identity
from pipeline.jsonl import read_rows, sort_rows
from pipeline.report.tracker import RunEnd, Tracker, TrackerName
from pipeline.train.saved_state import complete, read_state

if TYPE_CHECKING:
    from pipeline.train.distributed import World

logger = logging.getLogger(__name__)

HEARTBEAT = "heartbeat"
LOCK_PATIENCE_SECONDS = 10.0  # a killed rank of a large model needs some seconds to give its memory back
_locks: "weakref.WeakSet[IO[str]]" = weakref.WeakSet()


def _leave_locks() -> None:
    """Close the locks in a forked process: a data worker that outlives a killed run would keep the run's lock."""
    for lock in list(_locks):
        lock.close()


os.register_at_fork(after_in_child=_leave_locks)

_FILES = (
    "config.yaml",
    "environment.json",
    "status.json",
    HEARTBEAT,
    "metrics.jsonl",
    "incidents.jsonl",
    "quarantine.jsonl",
    "log.txt",
    ".lock",
)
_FOLDERS = ("report", "checkpoints", "tb")
_PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "numpy", "safetensors")


class Run:
    """The folder of one stage of one experiment. Rank 0 writes; the other ranks only know the paths.

    Whether the folder belongs to the same run is checked before (`stages.identity.refuse_other_run`).

    Args:
        folder: ROOT/EXPERIMENT/STAGE.
        config: The config of the stage.
        world: The processes.

    Raises:
        EnvironmentProblem: If the folder cannot be written, or another process is working in it.
    """

    def __init__(self, folder: Path, config: BaseModel, world: "World") -> None:
        self.folder, self.world, self.config = folder, world, config
        self.checkpoints, self.export = folder / "checkpoints", folder / "export"
        self.config_sha256 = identity_sha256(config)
        self._tracker: Tracker | None = None
        self.commit = (_git("rev-parse", "HEAD") if world.is_main else "") or "unknown"
        if world.is_main:
            try:
                self._open()
            except OSError as error:
                raise EnvironmentProblem(
                    f"the run folder {folder} cannot be written ({error.strerror}); choose another run.root"
                ) from None

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        odd = self._make_room()
        (self.folder / "report").mkdir(exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")  # the system holds it while this process lives
        _locks.add(self._lock)
        self._take_lock()
        for name in odd:
            self._tell_damage(name)
        for name, read in (("config.yaml", read_values), ("environment.json", _read_object)):
            if (self.folder / name).is_file() and read(self.folder / name) is None:
                self._set_aside(name, (self.folder / name).read_bytes())
        replace_text(self.folder / "config.yaml", dump_yaml(self.config))
        replace_text(self.folder / "environment.json", json.dumps(self._environment(), indent=1))
        logging.getLogger().addHandler(_file_handler(self.folder / "log.txt"))

    def _make_room(self) -> list[str]:
        """Rename what is no file, or no folder, where a run writes one: a FIFO would be waited for. Returns the names."""
        odd = []
        for names, is_sound in ((_FILES, Path.is_file), (_FOLDERS, Path.is_dir)):
            for path in (self.folder / name for name in names):
                if os.path.lexists(path) and not is_sound(path):
                    os.replace(path, path.with_name(f"{path.name}.damaged-{time.time_ns()}"))
                    odd.append(path.name)
        return odd

    def _take_lock(self) -> None:
        """Take the lock; a run that was killed a moment ago may need some seconds until its last process is gone."""
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            try:
                return fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._lock.close()
                    raise EnvironmentProblem(
                        f"another process is working in {self.folder}; wait for it, or give run.experiment=NEW_NAME"
                    ) from None
            time.sleep(0.1)

    def status(self, state: str, **more: Any) -> None:
        """Write the state of the run (running, interrupted, failed, complete), for people and for `launchers status`."""
        if self.world.is_main:
            replace_text(self.folder / "status.json", json.dumps({"state": state, "time": time.time(), **more}))

    def _set_aside(self, name: str, content: bytes) -> None:
        """Keep what is damaged in a file of its own, and say so."""
        with (self.folder / f"{name}.damaged").open("ab") as file:
            file.write(content + b"\n")
        self._tell_damage(name)

    def _tell_damage(self, name: str) -> None:
        logger.warning("%s is damaged; what cannot be read is in %s.damaged", self.folder / name, name)
        self.incident({"reason": f"{name} was damaged; what could not be read is in {name}.damaged"})

    def truncate_metrics(self, step: int) -> None:
        """Remove the rows after `step`; a resumed run writes them again. Damaged lines are set aside."""
        path = self.folder / "metrics.jsonl"
        if self.world.is_main and path.exists():
            rows, damaged = sort_rows(path, "step")
            if damaged:
                self._set_aside(path.name, b"\n".join(damaged))
            kept = [row for row in rows if row["step"] <= step]
            replace_text(path, "".join(json.dumps(row) + "\n" for row in kept))

    def incident(self, what: dict[str, Any]) -> None:
        """Note something that was not as planned, for the report."""
        if self.world.is_main:
            with (self.folder / "incidents.jsonl").open("a") as file:
                file.write(json.dumps({"time": time.time(), **what}) + "\n")

    def beat(self) -> None:
        """Touch the heartbeat file. Rank 0 does it after a vote, in which all ranks took part: one that hangs stops them all."""
        if self.world.is_main:
            (self.folder / HEARTBEAT).touch()

    def append_metrics(self, row: dict[str, float]) -> None:
        """Append a row to metrics.jsonl."""
        if self.world.is_main:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.track(row)

    def follow(self, name: TrackerName) -> None:
        """Let a tracker follow metrics.jsonl, on rank 0.

        Raises:
            EnvironmentProblem: If its library is missing or does not start.
        """
        if self.world.is_main and name != "none":
            self._tracker = Tracker(name, self.folder, flatten(self.config.model_dump(mode="json")))

    def track(self, row: dict[str, float]) -> None:
        """Send the numbers of a row, which names its `step`, to the tracker if there is one."""
        if self._tracker:
            self._tracker.send(row)

    def close_tracker(self, end: RunEnd) -> None:
        """Let the tracker write what is left and note how the run ended."""
        if self._tracker:
            self._tracker.close(end)

    def last_row(self, prefix: str, until: int) -> dict[str, float]:
        """Return the newest values of steps up to `until` whose names start with `prefix`; nothing on ranks above 0."""
        path = self.folder / "metrics.jsonl"
        if not self.world.is_main or not path.exists():
            return {}
        rows = (row for row in reversed(read_rows(path)) if row.get("step", until) <= until)
        return next((found for row in rows if (found := {k: v for k, v in row.items() if k.startswith(prefix)})), {})

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run's folder."""
        if self.world.is_main:
            replace_text(self.folder / name, json.dumps(value, indent=1))

    def _environment(self) -> dict[str, Any]:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return {
            "command": " ".join(["python", *sys.orig_argv[1:]]),
            "commit": self.commit,
            "config_sha256": self.config_sha256,
            "uncommitted_changes": bool(_git("status", "--porcelain")),
            "python": platform.python_version(),
            "packages": {name: metadata.version(name) for name in _PACKAGES},
            "world_size": self.world.size,
            "threads": torch.get_num_threads(),
            "cpu": platform.processor() or platform.machine(),
            "cpu_count": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpus": gpus,
        }


def identity_sha256(config: BaseModel) -> str:
    """Return the SHA-256 of the identity fields: equal for two configs of one run."""
    return hashlib.sha256(json.dumps(identity(config)).encode()).hexdigest()


def _read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON file of one object; None if it is missing or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def has_begun(folder: Path) -> bool:
    """Return whether a run has taken the folder: a start without a checkpoint and an export has not."""
    return bool(complete(folder / "checkpoints")) or (folder / "export").is_dir()


def refuse_other_config(folder: Path, config: BaseModel) -> None:
    """Raise ConfigError if the run in `folder` has other values than `config` where they decide its numbers."""
    saved = folder / "config.yaml"
    if not saved.exists():
        return
    values = read_values(saved)
    if values is None:
        before = (_read_object(folder / "environment.json") or {}).get("config_sha256")
        if before in (None, identity_sha256(config)):
            return
        raise ConfigError(
            f"{saved} is damaged, and by its environment.json the run was begun with another config; give the values of"
            f" that run, or run.experiment=NEW_NAME, or remove {folder}"
        )
    try:  # so that fields that are newer than the run take their defaults
        there = identity(type(config).model_validate(values))
    except ValidationError:
        there = flatten(values)
    here = identity(config)
    different = [key for key in here if there.get(key) != here[key]]
    if different:
        key = different[0]
        raise ConfigError(
            f"{folder} holds a run with another config ({_counted(len(different))}; {key} was {there.get(key)!r}, is now"
            f" {here[key]!r}); give run.experiment=NEW_NAME, or remove that folder"
        )


def saved_inputs(folder: Path) -> dict[str, str | None]:
    """Return the hashes of the inputs that the newest readable checkpoint of a run names; nothing without one."""
    for checkpoint in complete(folder / "checkpoints"):
        with suppress(OSError, ValueError):
            return read_state(checkpoint).inputs
    return {}


def refuse_other_inputs(folder: Path, there: Mapping[str, str | None], here: Mapping[str, str | None]) -> None:
    """Compare the inputs that the run in `folder` has used (`there`) with the present ones (`here`), hash by hash.

    Raises:
        DataError: If a dataset or the split has changed.
        HandoverError: If a parent or a file of weights has changed.
    """
    for key in {**there, **here} if there else ():
        was, now = there.get(key, "none"), here.get(key, "none")
        if None in (was, now) or was == now:
            continue
        refusal = DataError if key.startswith("data.") else HandoverError
        trained = key == "data.test" and (folder / "export").is_dir()
        test = f", or measure its export with `make evaluate EXPORT={folder}/export DATA=...`" if trained else ""
        raise refusal(
            f"{folder} holds a run with another {key} (its hash was {str(was)[:12]}, is now {str(now)[:12]}); give the one it"
            f" was begun with, or run.experiment=NEW_NAME, or remove that folder{test}"
        )


def _counted(keys: int) -> str:
    return "one key differs" if keys == 1 else f"{keys} keys differ"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _file_handler(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    return handler
