"""python -m tests.integration.planted POSITION RANK CONFIG [key=value ...]: stage 1 with an infinite loss planted once.

A rank of a real run; only the loss of one position of the data, on one rank, is not what the stage computed.
POSITION -1 plants nothing.
"""

import os
import sys
from pathlib import Path

import stages.__main__ as entry
from stages.arm import ArmTask

position, rank = int(sys.argv[1]), sys.argv[2]
real_loss, seen = ArmTask.loss, 0


def loss(self, model, batch):  # type: ignore[no-untyped-def]
    global seen
    output = real_loss(self, model, batch)
    seen += 1
    if seen == position + 1 and os.environ["RANK"] == rank:
        output.loss.data.fill_(float("inf"))
    return output


ArmTask.loss = loss  # type: ignore[method-assign]
code = entry.main(["arm", str(Path(sys.argv[3])), *sys.argv[4:]])
sys.stderr.flush()
os._exit(code)
