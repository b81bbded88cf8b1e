"""The choice of an implementation: what it logs, what it rejects, what it refuses."""

import dataclasses
import logging
import re
from functools import partial

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.ops import choice, reference
from pipeline.ops.choice import choose_scan
from pipeline.ops.reference import causal_conv1d_silu
from pipeline.ops.self_test import step_seconds
from tests.unit.ops.implementations import NAMES, operators


@pytest.fixture(autouse=True)
def _choice_is_restored():
    before = dict(choice._chosen)
    yield
    choice._chosen.clear()
    choice._chosen.update(before)


def test_unknown_kind_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"unknown scan 'natve'; known: native, .*auto"):
        choose_scan("natve")


def test_the_choice_is_logged_with_its_error(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_scan("auto").name in choice.SCANS
    assert "relative error to the reference" in caplog.text


def test_a_missing_implementation_is_information_and_a_failing_one_is_an_error(caplog, monkeypatch):
    def missing(device):
        raise choice.Missing("no wheel")

    def failing(device):
        wrong = choice.Operators(name="wrong", scan=lambda *a, **k: (a[0] * 2, a[0]), conv=causal_conv1d_silu)
        return wrong

    monkeypatch.setattr(choice, "SCANS", {"absent": missing, "wrong": failing, "reference": choice.SCANS["reference"]})
    with caplog.at_level(logging.INFO):
        assert choose_scan("auto").name == "reference"
    levels = {record.levelname: record.message for record in caplog.records[:2]}
    assert "no wheel" in levels["INFO"]
    assert "FAILS" in levels["ERROR"]
    with pytest.raises(choice.Missing):
        choose_scan("absent")
    with pytest.raises(choice.Failing):
        choose_scan("wrong")


def test_a_nan_in_any_result_fails_the_self_test():
    def scan(*inputs, **options):
        out, ungated = reference.selective_scan(*inputs, **options)
        return out, ungated * float("nan")

    with pytest.raises(choice.Failing, match="relative error to the reference is inf"):
        choice.self_test(choice.Operators(name="wrong", scan=scan), torch.device("cpu"))


def test_report_names_every_implementation_with_its_error_or_reason():
    rows = {name: (error, reason) for name, error, reason in choice.report("cpu")}
    assert list(rows) == list(choice.SCANS)
    assert rows["reference"] == (0.0, "works")
    assert rows["torch"][0] < 1e-5
    assert rows["mamba_ssm"] == (None, "not available: mamba-ssm runs on CUDA, not on cpu")


def test_fp64_is_never_computed_in_fp32():
    choose_scan("auto")
    assert choice.operators_for(torch.ones(1, dtype=torch.float64)).name == "torch"


def test_our_cuda_kernels_are_missing_where_torch_has_no_cuda():
    if torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    with pytest.raises(choice.Missing, match="this torch is built without CUDA"):
        choice.SCANS["cuda"](torch.device("cuda"))
    with pytest.raises(choice.Missing, match="the CUDA kernels run on a GPU, not on cpu"):
        choice.SCANS["cuda"](torch.device("cpu"))


def test_a_wrong_mixer_fails_the_self_test_though_its_scan_is_right():
    ours = operators(NAMES[-1])

    def forgets_a_direction(xz, directions, **options):
        results = ours.mixer(xz, directions, **options)
        return results[1] * torch.nn.functional.silu(xz.chunk(2, dim=2)[1]), *results[1:]

    assert choice.self_test(ours, torch.device("cpu")) < 1e-5
    with pytest.raises(choice.Failing, match="relative error"):
        choice.self_test(dataclasses.replace(ours, mixer=forgets_a_direction), torch.device("cpu"))


def test_of_two_kernels_that_work_the_faster_is_chosen_and_both_times_are_logged(caplog, monkeypatch):
    """On the CPU with real implementations: the closed form is several times faster than the step-by-step reference."""
    slow, fast = (choice.SCANS[name] for name in ("reference", "torch"))
    monkeypatch.setattr(choice, "SCANS", {"slow": slow, "fast": fast, "never": None})
    monkeypatch.setattr(choice, "RIVALS", ("slow", "fast"))
    monkeypatch.setattr(choice, "step_seconds", partial(step_seconds, batch=2, channels=16, rank=2, states=4))
    with caplog.at_level(logging.INFO):
        assert choose_scan("auto").name == "torch"
    assert re.search(r"reference \d+\.\d\d ms, torch \d+\.\d\d ms a mixer's step, so torch is chosen", caplog.text)


def test_the_preferred_kernel_stays_if_the_other_is_hardly_faster(monkeypatch):
    first, second = (choice.SCANS[name](torch.device("cpu")) for name in ("torch", "reference"))
    seconds = {"torch": 1.0, "reference": 0.95}
    monkeypatch.setattr(choice, "step_seconds", lambda mixer, device: seconds.pop(next(iter(seconds))))
    assert choice.fastest([first, second], torch.device("cpu")) is first
