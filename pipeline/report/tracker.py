"""Weights & Biases, MLflow or trackio: what is in metrics.jsonl, for people who compare runs there.

A tracker follows `metrics.jsonl`. Training needs neither the library's server nor a network: W&B is offline unless
WANDB_MODE says otherwise, MLflow writes files below `run.root` unless MLFLOW_TRACKING_URI names a server, and trackio keeps a
database there.

`tracker.json` in the run's folder names the run of the tracker, and for each number the last step that was sent. A resumed run
takes steps again and reaches the same numbers, so what was sent once is not sent again: every point is there once. Rows that were
written without a tracker are sent when one is chosen.
"""

import importlib.util
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from pipeline.books import TrackerNote, read_book
from pipeline.errors import EnvironmentProblem, first_line
from pipeline.files import replacing
from pipeline.jsonl import read_rows

logger = logging.getLogger(__name__)

TrackerName = Literal["none", "wandb", "mlflow", "trackio"]
RunEnd = Literal["complete", "interrupted", "failed"]
Row = Mapping[str, float]

_MLFLOW_VALUE = 6000  # characters of a value that MLflow keeps


class Client(Protocol):
    """One run in a tracker's own store."""

    id: str

    def log(self, row: Row, step: int) -> None:
        """Store the numbers of a step."""

    def close(self, end: RunEnd) -> None:
        """Write what is left, and note how the run ended."""


class _Library(NamedTuple):
    package: str  # its extra has the name of the tracker
    open: Callable[[Path, str | None, Mapping[str, Any]], Client]


def check_installed(name: TrackerName) -> None:
    """Raise EnvironmentProblem if the library of a tracker is missing. Nothing is imported."""
    if name != "none" and importlib.util.find_spec(_LIBRARIES[name].package) is None:
        raise EnvironmentProblem(
            f"run.tracker={name} needs the package {_LIBRARIES[name].package}, which is not installed: pip install"
            f" 'visionmamba-pipeline[{name}]' (in a checkout: pip install -e '.[{name}]'), or set run.tracker=none"
        )


class Tracker:
    """Sends the rows of one run. A tracker that fails later is given up with a warning, and training continues.

    Args:
        name: The library.
        folder: The run's folder, ROOT/EXPERIMENT/STAGE.
        config: The config, flat.

    Raises:
        EnvironmentProblem: If the library is missing or refuses to start.
    """

    def __init__(self, name: TrackerName, folder: Path, config: Mapping[str, Any]) -> None:
        check_installed(name)
        self._name, self._path = name, folder / "tracker.json"
        known = read_book(self._path, TrackerNote)
        known = known if known.get("tracker") == name else {}
        before: str | None = known.get("id")
        self._sent: dict[str, int] = known.get("sent", {})
        try:
            self._client: Client | None = _LIBRARIES[name].open(folder, before, config)
        except Exception as error:  # each library has errors of its own, of the network and the disk among them
            again = f"remove {self._path} to begin another run there, " if before else ""
            raise EnvironmentProblem(
                f"run.tracker={name} does not start ({first_line(error)}); mend it, {again}or set run.tracker=none"
            ) from error
        if self._client.id != before:
            self._sent = {}
        for row in read_rows(folder / "metrics.jsonl", "step"):
            self.send(row)

    def send(self, row: Row) -> None:
        """Send the numbers of a row of metrics.jsonl that were not sent before.

        Args:
            row: Numbers by name, with the optimizer step as `step`.
        """
        step = int(row["step"])
        new = {key: value for key, value in row.items() if key != "step" and step > self._sent.get(key, -1)}
        if self._client is None or not new:
            return
        self._sent |= dict.fromkeys(new, step)

        def log(client: Client) -> None:
            # First the note: a kill in between loses this row, but no point is ever there twice.
            with replacing(self._path, sync=False) as temporary:
                temporary.write_text(json.dumps({"tracker": self._name, "id": client.id, "sent": self._sent}))
            client.log(new, step)

        self._attempt(log)

    def close(self, end: RunEnd) -> None:
        """Write what is left, and note how the run ended. It may be continued later."""
        self._attempt(lambda client: client.close(end))
        self._client = None

    def _attempt(self, act: Callable[[Client], None]) -> None:
        if self._client is None:
            return
        try:
            act(self._client)
        except Exception as error:  # a report is not worth a training
            logger.warning(
                "run.tracker=%s is given up (%s); metrics.jsonl has everything", self._name, first_line(error)
            )
            self._client = None


class _Wandb:
    """A run of Weights & Biases; offline runs lie in ROOT/EXPERIMENT/STAGE/wandb."""

    def __init__(self, folder: Path, before: str | None, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B would send stack traces to its makers
        import wandb

        self.id = before or uuid.uuid4().hex[:8]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", folder.parent.name),
            group=folder.parent.name,
            name=folder.name,
            id=self.id,
            resume="allow",
            dir=folder,
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )

    def log(self, row: Row, step: int) -> None:
        self._run.log(dict(row), step=step)

    def close(self, end: RunEnd) -> None:
        self._run.finish(exit_code=0 if end == "complete" else 1)


class _Mlflow:
    """A run of MLflow: the experiment is ours, the run is the stage."""

    def __init__(self, folder: Path, before: str | None, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # MLflow would tell its makers how it is used
        # MLflow would ask a server that is away for many minutes, and the training would wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow asks for this word since version 3
            uri = (folder.parent.parent / "mlruns").resolve().as_uri()
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        experiment = self._client.get_experiment_by_name(folder.parent.name)
        inside = experiment.experiment_id if experiment else self._client.create_experiment(folder.parent.name)
        if before:
            self.id = before
            self._client.update_run(before, status="RUNNING")
            return
        self.id = self._client.create_run(inside, run_name=folder.name).info.run_id
        values = [Param(key, str(value)[:_MLFLOW_VALUE]) for key, value in config.items()]
        for start in range(0, len(values), 100):  # MLflow's limit for one call
            self._client.log_batch(self.id, params=values[start : start + 100])

    def log(self, row: Row, step: int) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self.id, metrics=[self._metric(key, value, now, step) for key, value in row.items()])

    def close(self, end: RunEnd) -> None:
        ends = {"complete": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self.id, status=ends[end])


class _Trackio:
    """A run of trackio, in the database ROOT/trackio or where TRACKIO_DIR says."""

    def __init__(self, folder: Path, before: str | None, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("TRACKIO_DIR", str((folder.parent.parent / "trackio").resolve()))
        Path(os.environ["TRACKIO_DIR"]).mkdir(
            parents=True, exist_ok=True
        )  # trackio drops the rows where it cannot write
        import trackio

        # trackio finds a run by its name, so a folder that was deleted and begun again needs another one.
        self.id = before or f"{folder.name}-{uuid.uuid4().hex[:8]}"
        self._run = trackio.init(
            project=folder.parent.name,
            name=self.id,
            resume="allow",
            config=dict(config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, row: Row, step: int) -> None:
        self._run.log(dict(row), step=step)

    def close(self, end: RunEnd) -> None:
        self._run.finish()


_LIBRARIES: Mapping[str, _Library] = {
    "wandb": _Library("wandb", _Wandb),
    "mlflow": _Library("mlflow", _Mlflow),
    "trackio": _Library("trackio", _Trackio),
}
