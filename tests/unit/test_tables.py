"""Every row of the paper's tables gives configs that the strict schemas accept, on ImageNet and on a bundled dataset."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import studies.tables as tables
from pipeline.config import load_config
from pipeline.datasets.config import SplitConfig
from pipeline.datasets.manifest import SAMPLE, Manifest
from pipeline.datasets.splits import make_split
from stages import SPECS
from stages.configs.distill import DistillConfig
from stages.configs.semi import SemiConfig
from studies.paper import FOOTNOTES, TRAIN_IMAGES, Row, long_tail, rows
from studies.semi import METRICS, gains, means
from studies.semi import ROWS as STUDY

ROOT = Path(__file__).resolve().parents[2]
ROWS = {row.name: row for row in rows()}


def configs(row: Row, dataset: str) -> dict[str, Any]:
    """Return stage -> config, as the row's commands start it."""
    found = {}
    for command in (c for c in tables.commands(row, dataset, 1) if "stages" in c):
        path = next(i for i, c in enumerate(command) if c.endswith(".yaml"))
        found[command[path - 1]] = load_config(
            SPECS[command[path - 1]].config, ROOT / command[path], command[path + 1 :]
        )
    return found


def test_the_names_differ_and_all_rows_are_there() -> None:
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names) == 6 + 12 + 27 + 32 + 6
    assert {note for row in rows() for note in row.notes} == set(FOOTNOTES)


@pytest.mark.parametrize("dataset", ["imagenet", "letters"])
def test_every_row_is_a_valid_config_and_starts_from_its_parents_export(dataset: str) -> None:
    shared: dict[str, DistillConfig] = {}
    for row in rows():
        found = configs(row, dataset)
        stage_2, stage_3 = found["distill"], found["semi"]
        assert isinstance(stage_2, DistillConfig)
        assert isinstance(stage_3, SemiConfig)
        # With an average in stage 2 the teacher starts from that, and the student from the model.
        starts = SPECS["semi"].parents(stage_3)
        assert starts.popitem()[1] == stage_2.run.folder("distill") / "export"
        assert [path.name for path in starts.values()] == (["export-student"] if stage_2.average else [])
        assert stage_2.data.split == stage_3.data.split
        assert shared.setdefault(stage_2.run.experiment, stage_2) == stage_2  # or it would be refused
        if "arm" in found:
            assert SPECS["distill"].parents(stage_2)["init_from"] == found["arm"].run.folder("arm") / "export"
        assert ("arm" in found) == (dataset == "imagenet" and row.model.startswith("semivim"))
        SplitConfig.model_validate(
            {k.strip("-").replace("-", "_"): v for k, v in zip(row.split[::2], row.split[1::2], strict=True)}
        )


def test_the_configs_have_semi_vits_published_settings() -> None:
    """Its tables: stage 2 (batch, rate, layer decay, drop path), stage 3 (batch, rate, tau, drop path, epochs)."""
    published = {
        ("T4-semivit-base-IF10-1pct-ema"): (512, 1e-4, 0.65, 0.0, 128, 5e-4, 0.6, 0.0),
        ("T4-semivit-base-IF10-10pct-ema"): (512, 5e-4, 0.65, 0.1, 128, 5e-4, 0.5, 0.1),
        ("R-semivit_huge-1pct"): (128, 5e-3, 0.75, 0.0, 64, 1.25e-3, 0.7, 0.05),
        ("R-semivit_huge-10pct"): (128, 5e-4, 0.75, 0.2, 128, 1.25e-3, 0.6, 0.1),
    }
    for name, want in published.items():
        found = configs(ROWS[name], "imagenet")
        first, second = found["distill"], found["semi"]
        assert first.weights is not None
        assert not first.weights.saw_labels
        labelled = (first.loop.global_batch, first.optim.lr, first.optim.layer_decay, first.model.drop_path)
        loop, optim = second.loop, second.optim
        assert (*labelled, loop.global_batch, optim.lr, second.pseudo.threshold, second.drop_path) == want, name
        assert second.mixup.pseudo
        assert (second.pseudo.weight, second.unlabelled_ratio, second.ema.base_decay) == (5.0, 5, 0.9999)
        epochs = 50 if "huge" in name else 100
        assert loop.steps == pytest.approx(epochs * ROWS[name].images()[1] / (5 * loop.global_batch), abs=1)
        assert optim.warmup_steps == pytest.approx(loop.steps * 5 / epochs, abs=1)
        assert (first.average is not None) == (name == "R-semivit_huge-10pct")
        starts = second.init_from.rpartition("/")[2], second.teacher_from and second.teacher_from.rpartition("/")[2]
        assert starts == (("export-student", "export") if first.average else ("export", None))
        assert bool(first.mix.mixup) == bool(first.augment.erase) == ("10pct" in name)


def test_rows_of_a_sweep_share_a_stage_2_and_differ_in_one_value() -> None:
    sweep = [configs(row, "imagenet") for row in rows() if row.name.startswith("T3-10pct")]
    assert len({found["distill"].run.experiment for found in sweep}) == 1
    assert len({found["arm"].run.experiment for found in sweep}) == 1
    assert [found["semi"].pseudo.threshold for found in sweep] == pytest.approx([0.5 + 0.05 * k for k in range(9)])
    others = [found["semi"].model_dump(exclude={"run": True, "pseudo": {"threshold"}}) for found in sweep]
    assert all(other == others[0] for other in others)


def test_a_pair_of_table_4_differs_in_its_backbone_and_a_column_in_its_average() -> None:
    """Semi-ViT and Semi-ViM share all but names, parents, model and SSMixup. Rows with and without LyapEMA share all but what
    LyapEMA adds to the decay. The config files of the repository have the values of the rows."""
    found = {name: configs(row, "imagenet") for name, row in ROWS.items() if name.startswith("T4-")}
    apart = {"run": True, "init_from": True, "weights": True, "model": True, "ssmixup": True}
    for name, mine in ((name, stages) for name, stages in found.items() if "semivim" in name):
        other = found[name.replace("semivim", "semivit")]
        for stage in ("distill", "semi"):
            assert mine[stage].model_dump(exclude=apart) == other[stage].model_dump(exclude=apart), (name, stage)
        assert mine["distill"].model.drop_path == other["distill"].model.drop_path
    added = {"mode", "gamma", "max_decay", "radius_steps"}
    for name in (name for name in found if name.endswith("-ema")):
        without, with_it = found[name]["semi"], found[name.replace("-ema", "-lyapema")]["semi"]
        changed = {"run": True, "ema": added}
        assert without.model_dump(exclude=changed) == with_it.model_dump(exclude=changed), name
        assert (without.ema.mode, with_it.ema.mode) == ("ema", "guarded")
    shipped = load_config(SemiConfig, ROOT / "configs/semi/imagenet_semivim_base_10pct.yaml")
    row = found["T4-semivim-base-IF10-10pct-lyapema"]["semi"]
    assert shipped.ema == row.ema
    assert (shipped.mixup, shipped.pseudo, shipped.optim.lr) == (row.mixup, row.pseudo, row.optim.lr)


def test_the_images_of_a_row_are_those_of_its_split() -> None:
    """The counts equal those of a real split (IF 1000 at 1 %, where one label per class matters), and ImageNet-LT's counts."""
    row = ROWS["T4-semivim-base-IF1000-1pct-ema"]
    samples = np.zeros(1000 * 1300, SAMPLE)
    samples["label"] = np.repeat(np.arange(1000), 1300)
    header = {"location": "", "classes": [str(c) for c in range(1000)], "shards": []}
    manifest = Manifest(Path("nowhere"), header, "hash", samples, np.zeros(0, np.uint8))
    config = SplitConfig(imbalance=row.imbalance, labelled=0.01, ood_classes=row.outside, validation_per_class=10)
    split = make_split(manifest, config, seed=0)
    labelled, unlabelled = row.images()
    assert split.counts("labelled").sum() == pytest.approx(labelled, rel=0.01)
    assert split.counts("unlabelled").sum() == pytest.approx(unlabelled, rel=0.01)
    assert sum(ROWS["T1-none-10pct"].images()) == TRAIN_IMAGES - 10_000
    sizes = long_tail()
    assert (sizes.sum(), sizes.min(), sizes.max()) == pytest.approx((115_846, 5, 1280), rel=0.06)
    assert ((sizes > 100).sum(), (sizes < 20).sum()) == pytest.approx((385, 136), rel=0.09)  # many-, few-shot classes


def test_tau_is_chosen_on_the_validation_subset_and_ours_is_shown_with_the_reported_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RUNS", tmp_path)
    measured = {"0.70": (61.0, 80.0), "0.75": (63.0, 70.0), "0.80": (62.0, 90.0)}  # validation, test
    for tau, (validation, test) in measured.items():
        folder = tmp_path / tables.experiment(ROWS[f"T3-1pct-{tau}"], "letters") / "semi"
        folder.mkdir(parents=True)
        earlier, last = {"val/teacher_top1": 99.0}, {"val/teacher_top1": validation}
        (folder / "metrics.jsonl").write_text(f"{json.dumps(earlier)}\n{json.dumps(last)}\n{{}}\n")
        (folder / "evaluation.json").write_text(json.dumps({"models": {"teacher": {"top1": test}}}))
    made = tables.results([row for row in ROWS.values() if row.name.startswith("T3-1pct")], "letters")
    cells = {row[0]: row[2:5] for row in made.rows}
    assert cells["T3-1pct-0.75"] == ["66.30", "70.00", "63.00 (chosen)"]
    assert cells["T3-1pct-0.80"] == ["66.15", "90.00", "62.00"]
    assert cells["T3-1pct-0.50"] == ["62.45", "", ""]
    assert "tau was tuned on it" in made.note


def test_classes_that_were_never_trained_on_are_evaluated_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "RUNS", tmp_path)
    measured = {"top1": 59.4, "head": 80.0, "tail": 20.0}
    for imbalance, seen in ((10, {}), (1000, {"top1_seen": 60.0})):
        row = ROWS[f"T4-semivim-base-IF{imbalance}-1pct-lyapema"]
        folder = tmp_path / tables.experiment(row, "imagenet") / "semi"
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("{}\n")
        (folder / "evaluation.json").write_text(json.dumps({"models": {"teacher": measured | seen}}))
        top1 = "60.00" if seen else "59.40"
        assert tables.results([row], "imagenet").rows[0][3] == f"{top1}/80.00/20.00"


def test_the_studys_tables_show_what_the_paper_reports_for_the_same_comparison() -> None:
    found = {row.name: [dict.fromkeys(METRICS, 50.0 + seed + len(row.name)) for seed in range(3)] for row in STUDY}
    whole = {row[0]: row[-1] for row in means("letters", STUDY, found).rows}
    assert whole["plain EMA teacher"] == "71.88/82.73/45.94 [f]"
    assert whole["FixMatch"] == ""
    made = gains("letters", STUDY, found)
    gained = {row[0]: row[-1] for row in made.rows}
    assert gained["guarded LyapEMA"] == "+3.32/+2.12/+5.42 [f]"
    assert gained["guarded LyapEMA, SSMixup (nu learned)"] == "+5.50 [a]"
    assert FOOTNOTES["f"] in made.note
    assert FOOTNOTES["a"] in made.note
    alone = [row for row in STUDY if row.name == "guarded"]
    assert means("letters", alone, {"guarded": found["guarded"]}).rows[0][-1].startswith("75.20")
    assert not gains("letters", alone, {"guarded": found["guarded"]}).rows
