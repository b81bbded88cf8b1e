"""Commands that measure costs and receptive fields: numbers that do not depend on the machine, and sections for a report."""

import csv
from pathlib import Path

import pytest

from benchmarks import inference
from launchers.__main__ import main
from pipeline.models import build_model
from pipeline.models.flops import forward_flops
from pipeline.report import experiment as report
from pipeline.report.extras import read_section
from tests.conftest import Stages


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "tables" / f"{name}.csv").read_text().splitlines()))


def test_inference_reports_the_parameters_and_multiply_adds_of_the_models(tmp_path: Path) -> None:
    names = ["vim_nano", "timm/resnet18"]
    rows = table(inference.run(names, [64, 32], batch=2, rounds=1, out=tmp_path), "inference")
    assert [(r["model"], r["pixels"]) for r in rows] == [(n, s) for n in names for s in ("32", "64")]
    for row in rows:
        size = int(row["pixels"])
        model = build_model(row["model"], image_size=size)
        assert row["parameters, M"] == f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
        assert row["GMACs"] == f"{forward_flops(model, (size, size)) / 2e9:.3f}"
        assert float(row["images/s"]) > 0
    assert {f.name for f in read_section(tmp_path).figures} == {"throughput", "latency"}


def test_a_deployed_model_costs_no_more_and_tables_have_the_reported_accuracy(tmp_path: Path) -> None:
    """Folding removes operations; a model has an accuracy only if a paper reports it."""
    names = ["efficientvim_nano", "timm/mobileone_s0"]
    trained, deployed = (
        table(inference.run(names, [64], batch=1, rounds=1, out=tmp_path / str(d), deployed=d), "inference")
        for d in (False, True)
    )
    for before, after in zip(trained, deployed, strict=True):
        assert after["parameters, M"] == before["parameters, M"] != "0.00"
        assert float(after["GMACs"]) <= float(before["GMACs"])
    assert float(deployed[1]["GMACs"]) < 0.8 * float(trained[1]["GMACs"])  # MobileOne's branches become one
    assert [row["top-1, reported"] for row in trained] == ["–", "–"]
    arguments = ["--rows", "H: no fusion", "--batch", "1", "--rounds", "1", "--out", str(tmp_path / "pareto")]
    assert main(["pareto", *arguments]) == 0
    (row,) = table(tmp_path / "pareto", "pareto_front")
    assert (row["top-1, reported"], row["parameters, M"]) == ("75.1", "13.00")


def test_receptive_fields_of_names_and_of_an_export_go_into_a_report(chain: Stages, tmp_path: Path) -> None:
    export = chain.runs / "smoke" / "semi" / "export"
    where = tmp_path / "fields"
    arguments = ["vim_nano", f"ours={export}", "--data", chain.digits / "test", "--size", "32", "--images", "3"]
    assert main(["fields", *map(str, arguments), "--out", str(where)]) == 0
    rows = table(where, "fields")
    assert [(r["model"], r["weights"]) for r in rows] == [("vim_nano", "fresh"), ("ours", "export")]
    for row in rows:
        assert 1 <= int(row["20 % in"]) <= int(row["50 % in"]) <= int(row["95 % in"]) <= 32
    page = report.run([chain.runs / "smoke"], tmp_path / "report.html", [where]).read_text()
    assert "Receptive fields" in page
    assert 'id="fields"' in page


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["efficiency", "configs/semi/smoke.yaml"], 2, "two or more configs"),
        (["efficiency", "configs/semi/smoke.yaml", "configs/semi/demo.yaml", "--steps", "3"], 2, "give more"),
        (["inference", "vim_nanno"], 2, "vim_nano"),
        (["inference", "vim_nano", "--batch", "0"], 2, "at least one"),
        (["pareto", "--rows", "M5"], 2, "known are EfficientViM-M1"),
        (["fields", "vim_nano", "--data", "nowhere"], 3, "there are no shards"),
        (["report", "nowhere"], 3, "holds no stage"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, said: str
) -> None:
    assert main(arguments) == code
    assert said in capsys.readouterr().err


@pytest.mark.soak
def test_efficiency_counts_the_flops_of_real_steps(chain: Stages, tmp_path: Path) -> None:
    """With twice the unlabelled images per step, the FLOPs of a step follow from the two ratios."""
    text = Path("configs/semi/smoke.yaml").read_text()
    twice = tmp_path / "twice.yaml"
    twice.write_text(text.replace("unlabelled_ratio: 2", "unlabelled_ratio: 4"))
    assert twice.read_text() != text
    words = ["configs/semi/smoke.yaml", str(twice), *chain.overrides()]
    assert main(["efficiency", *words, "--steps", "7", "--out", str(tmp_path / "e")]) == 0
    first, second, ratio = table(tmp_path / "e", "efficiency")
    assert first["model"] == "vim_nano"
    # Student 3 (1 + r), teacher r.
    assert float(second["TFLOPs/step"]) / float(first["TFLOPs/step"]) == pytest.approx(
        (3 * 5 + 4) / (3 * 3 + 2), rel=1e-3
    )
    assert ratio["TFLOPs/step"] == "1.73 ×"
