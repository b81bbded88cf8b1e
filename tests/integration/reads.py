"""python -m tests.integration.reads STAGE CONFIG [key=value ...]: a real stage; prints as its last line a JSON object
{who in `pipeline` or `stages`: how often it read a value from a tensor during the steps between two log lines}.

A read (`.item()`, `float(t)`, `if t:`) makes the host wait for a GPU; on a CPU it costs nothing but is made all the same.
"""

import itertools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import pipeline.train.loop as loop
import stages.__main__ as entry
from pipeline.train.training import StepResult

READS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
FOLDERS = ("/pipeline/", "/stages/")
FIRST, LAST = 2, 6  # steps that are neither the first, which sets things up, nor logged

counts: Counter[str] = Counter()


class Reads(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in READS:
            frame: FrameType | None = sys._getframe()
            while frame and not any(folder in frame.f_code.co_filename for folder in FOLDERS):
                frame = frame.f_back
            counts[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}" if frame else "elsewhere"] += 1
        return function(*args, **(kwargs or {}))


mode, real, taken = Reads(), loop.train_step, itertools.count()


def step_and_watch(*args: Any, **kwargs: Any) -> StepResult:
    step = next(taken)
    if step == FIRST:
        mode.__enter__()
    if step == LAST:
        mode.__exit__(None, None, None)
    return real(*args, **kwargs)


loop.train_step = step_and_watch  # type: ignore[assignment]
code = entry.main([sys.argv[1], *sys.argv[2:], "loop.log_every=100", "loop.vote_every=100", "loop.save_every=100"])
print(json.dumps({"steps": LAST - FIRST, **counts}))
sys.stdout.flush()
os._exit(code)
