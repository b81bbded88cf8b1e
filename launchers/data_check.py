"""The cheap part of `pipeline.data check`, which a chain runs before its first stage.

It prints a few lines and never stops a run. EXPERIMENT/data-check.json keeps what was found, and the report shows it.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from launchers.chain import Step
from pipeline.datasets.check.quick import quick_check
from pipeline.datasets.opening import open_dataset
from pipeline.errors import PipelineError
from pipeline.files import replace_text
from pipeline.report.results import DATA_CHECK
from stages.check import open_data

_MAX_LINES = 5


def run(steps: Sequence[Step]) -> None:
    """Check the data of a chain, print what was found, and keep it beside the runs.

    Args:
        steps: The stages of one experiment. The data is that of the last stage, which has the labels and the test set.
    """
    config = steps[-1].config
    try:
        data = open_data(config)
        tests = [open_dataset(config.data.test, config.data.opening)] if config.data.test is not None else []
        found = quick_check(data.manifest, tests, data.split)
        kept = [{name: value for name, value in asdict(f).items() if name != "groups"} for f in found]
        replace_text(steps[-1].folder.parent / DATA_CHECK, json.dumps({"findings": kept}, indent=1) + "\n")
    except (PipelineError, OSError) as error:  # the checks of the stages decide whether it ends the run
        print(f"the data was not checked: {error}", file=sys.stderr, flush=True)
        return
    for finding in found[:_MAX_LINES]:
        loud = "WARNING: " if finding.level == "grave" else ""
        print(f"{loud}{finding.title}: {finding.text}", file=sys.stderr, flush=True)
