"""python -m tests.integration.planted infinity DATA_STEP RANK CONFIG [key=value ...]: an infinite loss, once
python -m tests.integration.planted gradient DATA_STEP RANK CONFIG [key=value ...]: a finite loss whose gradients are not, once
python -m tests.integration.planted spike DATA_STEP RANK CONFIG [key=value ...]: a loss that is 100 higher, once
python -m tests.integration.planted clock CONFIG [key=value ...]: the clock of the machine jumps two years back

A rank of a real run of stage 1. Only what is named differs: the loss of one data_step of the data on one rank (-1 plants
nothing), or what the wall clock says from the third step on.
"""

import os
import sys
import time

import stages.__main__ as entry
from pipeline.train.task import StepOutput
from stages.arm import ArmTask

real_loss, real_time, seen = ArmTask.loss, time.time, 0
fault, *rest = sys.argv[1:]
data_step, rank = (int(rest.pop(0)), rest.pop(0)) if fault != "clock" else (-1, "")


def loss(self, model, batch):  # type: ignore[no-untyped-def]
    global seen
    output = real_loss(self, model, batch)
    seen += 1
    if seen == data_step + 1 and os.environ["RANK"] == rank:
        if fault == "gradient":  # the root's slope at 0 is infinite
            return StepOutput(loss=output.loss + (output.loss - output.loss.detach()).sqrt(), metrics=output.metrics)
        output.loss.data += float("inf") if fault == "infinity" else 100.0
    return output


def jumped() -> float:
    return real_time() - (2 * 365 * 86_400 if seen > 3 else 0)


ArmTask.loss = loss  # type: ignore[method-assign]
if fault == "clock":
    time.time = jumped
code = entry.main(["arm", *rest])
sys.stderr.flush()
os._exit(code)
