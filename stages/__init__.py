"""The stages by name, in the order in which they feed one another. Light to import."""

from typing import NamedTuple

from stages.configs import ArmConfig, DistillConfig, SemiConfig, StageConfig


class Stage(NamedTuple):
    config: type[StageConfig]
    module: str  # holds `run(config, replay=None)`; imported only to run, since it loads torch


STAGES = {
    "arm": Stage(ArmConfig, "stages.arm"),
    "distill": Stage(DistillConfig, "stages.distill"),
    "semi": Stage(SemiConfig, "stages.semi"),
}
