"""A profile on demand: after `touch RUN/profile` rank 0 traces its next steps into RUN/report/trace_step_N.json.

The trace opens in https://ui.perfetto.dev or chrome://tracing. It needs no restart and no option.
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.train.distributed import World

logger = logging.getLogger(__name__)

STEPS_TRACED = 5


class Tracer:
    """On-demand profiler, active on rank 0 only.

    Args:
        folder: The folder of the run.
        world: The processes.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.shown = folder, world.is_main
        self._profile: profile | None = None
        self._until = 0

    def advance(self, step: int, *, look: bool) -> None:
        """Call this after every step.

        Args:
            step: Optimizer steps done.
            look: Whether to look for the file `profile`, which asks for a trace.
        """
        if self._profile is not None and step >= self._until:
            self.close()
        if look and self.shown and self._profile is None and (asked := self.folder / "profile").exists():
            asked.unlink()
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile, self._until = profile(activities=activities, record_shapes=True), step + STEPS_TRACED
            self._profile.start()

    def close(self) -> None:
        """End a trace, if one is being made, and write it."""
        if self._profile is None:
            return
        self._profile.stop()
        path = self.folder / "report" / f"trace_step_{self._until:08d}.json"
        self._profile.export_chrome_trace(str(path))
        logger.info("traced %d steps: %s", STEPS_TRACED, path)
        self._profile = None
