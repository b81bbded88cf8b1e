"""python -m tests.golden.write: run the smoke stages and keep their losses. Say in the commit why they changed."""

import json
import tempfile
from pathlib import Path

from pipeline.data import main as data
from tests.conftest import Stages

FOLDER = Path(__file__).parent
# What is compared: a number a step for every stage, all of which every operator of the stage has passed through.
KEPT = {
    "arm": ("train/loss", "train/grad_norm"),
    "distill": ("train/loss", "train/grad_norm"),
    "semi": ("train/loss", "train/grad_norm", "ema/V", "ema/alpha"),
}


def losses(run: Path, stage: str) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in KEPT[stage]} for row in rows if "train/loss" in row]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits"
        data(["convert", "digits", "--out", str(digits)])
        split = ["split", str(digits / "train"), "--out", str(digits / "split.json")]
        data([*split, *"--imbalance 10 --labelled 0.1 --validation-per-class 15 --seed 0".split()])
        stages = Stages(Path(folder) / "runs", digits)
        for stage in KEPT:
            rows = losses(stages.complete(stage), stage)
            lines = ",\n".join(json.dumps({k: float(f"{v:.7g}") for k, v in row.items()}) for row in rows)
            (FOLDER / f"{stage}.json").write_text(f"[\n{lines}\n]\n")
            print(f"{stage}: {len(rows)} steps, last loss {rows[-1]['train/loss']:.5f}")


if __name__ == "__main__":
    main()
