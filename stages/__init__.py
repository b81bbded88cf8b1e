"""The stages: what each of them is (`SPECS`), and how it runs. Importing this package does not load torch."""

from typing import Any

from stages.configs.arm import ArmSpec
from stages.configs.base import StageConfig
from stages.configs.distill import DistillSpec
from stages.configs.semi import SemiSpec
from stages.spec import StageSpec, table

# The only table of the stages: name -> spec, in the order in which they feed one another.
SPECS = table(ArmSpec, DistillSpec, SemiSpec)


def spec_of(config: StageConfig) -> StageSpec[Any]:
    """Return the spec of the stage that a config belongs to."""
    return SPECS[config.stage]
