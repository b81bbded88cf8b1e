"""Every row of the paper's tables stands for configs that the strict schemas accept, on ImageNet and on a bundled dataset."""

from pathlib import Path

import pytest

from pipeline.config import load_config
from stages.configs import DistillConfig, SemiConfig
from tests.studies.tables import Row, commands, rows

ROOT = Path(__file__).resolve().parents[2]


def test_the_names_differ_and_all_rows_are_there() -> None:
    names = [row.name for row in rows()]
    assert len(set(names)) == len(names) == 6 + 12 + 27 + 32 + 6


@pytest.mark.parametrize("dataset", ["imagenet", "letters"])
def test_every_row_is_a_valid_config(dataset: str) -> None:
    for row in rows():
        assert isinstance(row, Row)
        _, second, third = commands(row, dataset, 1)
        for schema, command in ((DistillConfig, second), (SemiConfig, third)):
            path = next(i for i, c in enumerate(command) if c.endswith(".yaml"))
            load_config(schema, ROOT / command[path], command[path + 1 :])
