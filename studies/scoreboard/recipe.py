"""The configs that `make chain` would use for a case: what `python -m launchers recipe` writes after it has seen the images."""

import sys
from pathlib import Path
from typing import NamedTuple

from studies.scoreboard.pictures import Case
from tests import warm

STAGES = ("arm", "distill", "semi")


class Chain(NamedTuple):
    """Which chain the board runs.

    Attributes:
        runs: Folder of the runs.
        configs: NAME of configs/STAGE/NAME.yaml; `recipe` = what `python -m launchers recipe` writes for each case.
        budget: Time for a chain that the recipe may plan with, such as 4T.
    """

    runs: Path
    configs: str
    budget: str

    def of(self, case: Case, name: str) -> dict[str, Path]:
        """Return stage -> config of the chain of a case; a chain without pretraining has no `arm`.

        Raises:
            SystemExit: No recipe could be made; with the command's exit code.
        """
        folder = self.runs / "recipes" if self.configs == "recipe" else Path()
        known = name if self.configs == "recipe" else self.configs
        found = {stage: folder / "configs" / stage / f"{known}.yaml" for stage in STAGES}
        if self.configs == "recipe" and not found["semi"].is_file():
            _write(case, name, folder, self.budget)
        return {stage: path for stage, path in found.items() if path.is_file()}


def _write(case: Case, name: str, folder: Path, budget: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    data = ["--train", str(case.train.resolve()), "--split", str(case.split_file.resolve())]
    data += ["--test", str(case.test.resolve()), "--budget", budget]
    # The server that starts it runs in the project's folder, which a relative path would begin at.
    done = warm.run([sys.executable, "-m", "launchers", "recipe", name, *data], cwd=folder.resolve())
    if done.returncode:
        print(f"{name}, recipe: {done.stderr}", file=sys.stderr, flush=True)
        raise SystemExit(done.returncode)
