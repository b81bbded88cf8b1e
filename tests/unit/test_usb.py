"""The study of USB's benchmarks: every config fits the schema, the costs are counted, the table is filled in place."""

from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from studies.usb import BEGIN, ELSEWHERE, END, PAGE, ROWS, cell, cost, fill, main, table


def test_dry_checks_every_config_and_counts_steps_images_and_flops(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry"]) == 0
    out = capsys.readouterr().out
    assert all(row.label in out for row in ROWS)
    config_files = {path.stem for path in Path("configs/semi").glob("usb_*.yaml")}
    assert {row.config for row in ROWS} == config_files


def test_a_fixmatch_run_costs_three_passes_of_each_trained_image_and_one_of_each_weak_view() -> None:
    """2^18 steps of 64 labelled and 128 unlabelled images through WRN-28-2, counted from its convolutions by hand."""
    macs = 32 * 32 * 3 * 16 * 9 + 128 * 10
    for stage, size in enumerate((32, 16, 8)):
        a, b = (16, 32, 64, 128)[stage : stage + 2]
        macs += size * size * (9 * a * b + a * b + 7 * 9 * b * b)
    found = cost(next(row for row in ROWS if row.label == "cifar10/fixmatch"))
    assert found.steps == 2**18
    assert found.images == 2**18 * 64 * 3
    assert found.flops == pytest.approx(2**18 * 64 * (3 * 3 + 2) * 2 * macs, rel=0.01)


def test_published_cells_are_those_of_the_page() -> None:
    text = PAGE.read_text()
    for row in ROWS:
        assert f"| {row.benchmark.title} | {row.name} | {row.published} |" in text
    assert all(published in text for _, _, published in ELSEWHERE)


def test_the_table_is_replaced_between_its_comments(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    fill(page, table(ROWS[:1], [0]))
    once = page.read_text()
    fill(page, table(ROWS[:1], [0]))
    assert page.read_text() == once
    assert once.startswith("before\n")
    assert once.endswith("\nafter\n")
    assert "old" not in once
    page.write_text("no comments")
    with pytest.raises(ConfigError, match="lacks the comments"):
        fill(page, [])
    assert (cell([]), cell([59.7]), cell([1.0, 3.0])) == ("-", "59.70 (one seed)", "2.00 ± 1.00")


def test_unknown_rows_and_missing_data_end_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--only", "svhn"]) == 2
    assert "no row begins so; rows: cifar10/fixmatch" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    with pytest.raises(SystemExit, match="3"):
        main(["--only", "stl10/fixmatch-abc-20", "--seeds", "0"])
    assert "pipeline.data convert stl10" in capsys.readouterr().err
