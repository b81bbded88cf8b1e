"""Which state of its run an export holds, as its card says it (torch-free)."""

from typing import Literal

from pydantic import Field

from pipeline.config import Strict


class Selected(Strict):
    """Which state of its run the weights are."""

    select: Literal["last", "best"]
    step: int = Field(ge=0, description="optimizer steps that the weights have seen")
    trained: int = Field(ge=0, description="optimizer steps of the run")
    steps: int = Field(ge=0, description="optimizer steps that the config asked for; more if the run ended early")
    validations: int = Field(0, ge=0, description="validations that were compared")
    best: dict[str, float] = Field(default_factory=dict, description="criteria of the best validation")
    last: dict[str, float] = Field(default_factory=dict, description="criteria of the last validation")

    def __str__(self) -> str:
        """Say it in one line."""
        early = f", ended early: {self.steps} were planned" if self.trained < self.steps else ""
        if self.select == "last" or not self.best:
            return f"the last step, {self.trained}{early}"
        name, value = next(iter(self.best.items()))
        return (
            f"step {self.step} of {self.trained}{early}; best of {self.validations} validations by {name}: {value:.4g}, at the"
            f" last {self.last[name]:.4g}"
        )
