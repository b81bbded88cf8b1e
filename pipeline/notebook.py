"""Run a stage from a notebook or a script: in a process of its own, with its errors as exceptions."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import stages
from pipeline.config import choose, load_config
from pipeline.errors import (
    ConfigError,
    DataError,
    DistributedFailure,
    Diverged,
    EnvironmentProblem,
    HandoverError,
    Interrupted,
    PipelineError,
    first_line,
)
from pipeline.exports.card import Card

_ERRORS = (ConfigError, DataError, HandoverError, EnvironmentProblem, Diverged, DistributedFailure, Interrupted)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A completed stage.

    Attributes:
        folder: The run's folder, with log, metrics and checkpoints.
        metrics: The last validation and test results, by name. Accuracies are in percent.
        export: The hand-over: a folder for `pipeline.load` or for `init_from` of a later stage.
    """

    folder: Path
    metrics: dict[str, float]
    export: Path


def run_stage(
    stage: str,
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] | Mapping[str, Any] = (),
) -> Result:
    """Run one stage to its end, and print what it logs.

    The stage runs on one GPU, or on the CPU. It runs in a process of its own, so a crash leaves the caller alive.
    A finished run is not repeated, and an interrupted one continues. An interruption of the caller (Ctrl-C, or the
    notebook's stop button) lets the stage save a checkpoint first; a second one ends it at once.

    Args:
        stage: arm, distill or semi.
        config: Path of a YAML file, or its content as nested mappings. Relative paths in it start at the current folder.
        overrides: Values that replace those of the config: ["loop.steps=100"] or {"loop.steps": 100}.

    Raises:
        PipelineError: The subclass that belongs to the stage's exit code, with the stage's sentence: for example
            ConfigError for an unknown key, Interrupted if the stage was stopped.
    """
    schema = choose("stage", str(stage), stages.SPECS).config
    words = _words(overrides)
    try:
        scratch = tempfile.TemporaryDirectory()
    except OSError as error:
        raise _no_start(stage, error) from None
    with scratch:
        match config:
            case str() | Path():
                path = Path(config)
            case _:
                path = Path(scratch.name) / f"{stage}.yaml"
                path.write_text(yaml.safe_dump(json.loads(_json("config", config)), sort_keys=False))
        folder = load_config(schema, path, words).run.folder(stage)
        name = f"./{path}" if str(path).startswith("-") else str(path)  # or the stage would take it for an option
        _run([sys.executable, "-m", "stages", stage, name, *words], stage)
    export = folder / "export"
    return Result(folder=folder, metrics=dict(Card.read(export).metrics), export=export)


def _words(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Return overrides as the command line takes them."""
    match overrides:
        case Mapping():
            return [f"{key}={_json(f'override {key}', value)}" for key, value in overrides.items()]
        case str():
            return [overrides]
        case Sequence() if all(isinstance(word, str) for word in overrides):
            return list(overrides)
    raise ConfigError('overrides must be texts such as ["loop.steps=100"], or a mapping such as {"loop.steps": 100}')


def _json(what: str, value: Any) -> str:
    try:
        return json.dumps(value, default=str)
    except (TypeError, ValueError, RecursionError) as error:  # keys that are no texts, or a mapping that holds itself
        raise ConfigError(
            f"{what} cannot be written as YAML ({first_line(error)}); give plain nested mappings"
        ) from None


def _run(command: list[str], stage: str) -> None:
    """Run a command, print its output line by line, and raise the error of its exit code."""
    home = str(Path(stages.__file__).parents[1])  # the kernel's current folder need not be the checkout
    search = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH", ""))))
    try:
        process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": search, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # an interruption reaches the caller alone, which passes it on once
        )
    except OSError as error:
        raise _no_start(stage, error) from None
    lines: list[str] = []
    try:
        while process.returncode is None:
            try:
                _relay(process, lines)
                process.wait()
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
    finally:
        process.kill()  # does nothing to a process that has ended
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
    code = process.returncode
    if code == 0:
        return
    sentence = _sentence(lines) or f"stage {stage} ended with exit code {code}"
    for kind in _ERRORS:
        if code == kind.exit_code:
            raise kind(sentence)
    raise PipelineError(f"stage {stage} ended with exit code {code}; its last line: {sentence}")


def _no_start(stage: str, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"stage {stage} cannot be started from here ({first_line(error)}); change to a folder that exists, and set TMPDIR to one"
        " that can be written"
    )


def _relay(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        print(line, end="", flush=True)


def _sentence(lines: list[str]) -> str:
    """Return the error that the command printed last, or its last line."""
    for start in range(len(lines) - 1, -1, -1):
        if lines[start].startswith("error: "):
            more = [line for line in lines[start + 1 :] if line.startswith("  ")]  # a config error lists its problems
            return "\n".join([lines[start].removeprefix("error: "), *more])
    return next((line for line in reversed(lines) if line.strip()), "")
