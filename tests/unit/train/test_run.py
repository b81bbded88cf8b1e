"""What makes two starts one run: the values that decide its numbers, and the hashes of its inputs."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import apply_overrides, validate
from pipeline.errors import DataError, HandoverError, PipelineError
from pipeline.identity import flatten, identity
from pipeline.train.run import refuse_other_inputs, saved_inputs
from pipeline.train.saved_state import LoopRecord, SavedState
from pipeline.yaml_text import parse_yaml
from stages import SPECS
from stages.configs.base import StageConfig
from tests.conftest import ROOT

# How a run is computed, watched and saved.
FREE = (
    "run.root",
    "run.tracker",
    "engine.zero_stage",
    "engine.micro_batch",
    "engine.bucket_bytes",
    "engine.timeout_seconds",
    "engine.keep_whole",
    "engine.activation_checkpointing",
    "engine.offload_optimizer",
    "engine.compile",
    "loop.log_every",
    "loop.eval_every",
    "loop.save_every",
    "loop.keep_checkpoints",
    "loop.keep_every",
    "loop.background_save",
    "loop.time_limit_minutes",
    "loop.vote_every",
    "loop.on_divergence",
    "loop.on_alarm",
    "loop.max_rewinds",
    "loop.spike_mads",
    "loop.max_skipped_steps",
    "engine.public_address",
    "engine.bind_cores",
    "data.eval_batch",
    "data.loader.workers",
    "data.loader.prefetch",
)
# Where bytes lie and how they are fetched.
PLACES = (
    "data.train",
    "data.split",
    "data.validation",
    "data.test",
    "data.classes",
    "data.loader.remote",
    "init_from",
    "teacher_from",
    "weights.path",
    "teacher.export",
    "teacher.weights",
    "teacher.cache",
    "teacher.cache_gb",
    "backbone.cache",
)


def config_of(stage: str, *overrides: str) -> StageConfig:
    path = ROOT / f"configs/{stage}/smoke.yaml"
    values: dict[str, Any] = parse_yaml(path.read_text(), str(path))
    if stage == "distill":
        values = {**values, "init_from": None, "weights": {"path": "a"}, "teacher": {"export": "b", "cache": "c"}}
    return validate(SPECS[stage].config, apply_overrides(values, overrides), stage)


@pytest.mark.parametrize("stage", SPECS)
def test_every_knob_is_identity_but_those_that_decide_no_number(stage: str) -> None:
    config = config_of(stage)
    knobs = flatten(config.model_dump(mode="json"))
    free = {key for key in knobs if key in FREE or any(f"{key}.".startswith(f"{place}.") for place in PLACES)}
    given = {"model.num_classes"} if stage == "distill" else set()  # the data give it; this config does not name it
    assert set(knobs) - set(identity(config)) == free | given
    assert {key: knobs[key] for key in identity(config)} == identity(config)
    assert len(free) >= len(FREE) + 3


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("arm", ["data.train=elsewhere", "data.test=elsewhere", "data.split=elsewhere"]),
        ("arm", ["data.loader.remote.cache=/tmp/x", "data.loader.remote.cache_gb=1", "data.loader.remote.timeout_seconds=9"]),
        ("distill", ["teacher.export=elsewhere", "weights.path=elsewhere"]),
        ("distill", ["teacher.cache=elsewhere", "teacher.cache_gb=1"]),
        ("semi", ["init_from=elsewhere", "teacher_from=elsewhere"]),
    ],
)  # fmt: skip
def test_a_place_may_change_between_two_starts(stage: str, overrides: list[str]) -> None:
    assert identity(config_of(stage, *overrides)) == identity(config_of(stage))


@pytest.mark.parametrize("override", ["optim.lr=1e-5", "run.seed=1", "loop.global_batch=32", "teacher.weight=0.1"])
def test_a_value_may_not_change_between_two_starts(override: str) -> None:
    assert identity(config_of("distill", override)) != identity(config_of("distill"))


@pytest.mark.parametrize(("key", "refusal"), [("data.split", DataError), ("init_from", HandoverError)])
@pytest.mark.parametrize(("was", "now"), [("a", "b"), ("a", ""), ("", "b")])
def test_another_input_is_refused_in_a_sentence(key: str, refusal: type[PipelineError], was: str, now: str) -> None:
    there, here = ({"data.train": "same"} | ({key: value} if value else {}) for value in (was, now))
    with pytest.raises(refusal, match=f"runs/a holds a run with another {key}"):
        refuse_other_inputs(Path("runs/a"), there, here)
    refuse_other_inputs(Path("runs/a"), there, there)


def test_an_input_that_cannot_be_read_is_not_refused_as_another_one() -> None:
    def is_refused(now: str | None) -> bool:
        try:
            refuse_other_inputs(Path("runs/a"), {"init_from": "a"}, {"init_from": now})
        except HandoverError:
            return True
        return False

    assert [is_refused(now) for now in ("b", "a", None)] == [True, False, False]


def test_the_inputs_are_those_of_the_newest_checkpoint_that_can_be_read(tmp_path: Path) -> None:
    assert saved_inputs(tmp_path) == {}
    loop = LoopRecord(left_out=[], rewinds=0, fingerprint=1.0)
    state = SavedState(step=1, optimizer_step=1.0, task={}, loop=loop, inputs={"data.train": "a"})
    for step, text in ((1, state.model_dump_json()), (2, "{")):
        folder = tmp_path / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "COMPLETE").write_text("{}")
        (folder / "state.json").write_text(text)
    assert saved_inputs(tmp_path) == {"data.train": "a"}
