"""The sound inputs that cases are made of, and the imports that their children share."""

import contextlib
import logging
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.fuzz.kinds.base import ROOT, Material
from tests.fuzz.kinds.runs import stage_command

_MODULES = (
    *("torch._dynamo", "deepspeed", "stages.__main__", "stages.drivers", "stages.arm", "stages.distill", "stages.semi"),
    *("pipeline.models.__main__", "pipeline.exports.convert", "pipeline.predict", "pipeline.evaluate.__main__"),
    *("pipeline.report.__main__", "pipeline.report.experiment", "pipeline.report.page", "pipeline.rebalance"),
    *("launchers.__main__", "torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg"),
    *("torchvision.transforms.v2.functional", "timm.data", "sklearn.linear_model", "scipy.io", "webdataset"),
)


@contextlib.contextmanager
def material(scratch: Path, *, trained: bool = True) -> Iterator[Material]:
    """Import what the commands import, so that children start at once, and make sound inputs.

    Args:
        scratch: The folder for them.
        trained: Whether a kind needs finished runs.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    from pipeline.ops.torchvision_cpu import allow_torchvision

    allow_torchvision()
    for module in _MODULES:
        __import__(module)
    logging.disable(logging.INFO)
    _datasets(scratch)
    _exports(scratch)
    command = [sys.executable, "-m", "tests.fuzz.server", str(scratch / "small")]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        names = (scratch / name for name in ("digits", "small", "runs", "export"))
        have = Material(*names, scratch / "weights" / "vim.pth", address)
        for stage in ("arm", "distill", "semi") if trained else ():
            _train(scratch, stage_command(stage, have))
        yield have
    finally:
        server.kill()
        server.wait()


def _datasets(scratch: Path) -> None:
    from PIL import Image

    digits, small, rng = scratch / "digits", scratch / "small", random.Random(0)
    for part, count in (("train", 24), ("test", 4)):
        for k in range(4 * count):
            path = scratch / "images" / part / f"c{k % 4}" / f"{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (9, 9), rng.randbytes(243)).save(path)
        folder = str(scratch / "images" / part)
        _data(
            "convert",
            "imagefolder",
            folder,
            "--out",
            f"{small}/{part}",
            "--samples-per-shard",
            "50",
            "--processes",
            "1",
        )
    _data("convert", "digits", "--out", str(digits))
    common = ["--seed", "0", "--validation-per-class"]
    _data("split", f"{small}/train", "--out", f"{small}/split.json", "--labelled", "0.3", *common, "4")
    long_tail = ["--imbalance", "10", "--labelled", "0.1", *common, "15"]
    _data("split", f"{digits}/train", "--out", f"{digits}/split.json", *long_tail)


def _data(*words: str) -> None:
    from pipeline.data import main

    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        assert main(words) == 0, words


def _exports(scratch: Path) -> None:
    import torch

    from pipeline.exports.export import load_export
    from tests.unit.exports.released import checkpoint, filled
    from tests.unit.exports.test_convert import SMALL
    from tests.unit.exports.test_export import exported

    exported(scratch / "export", classes=tuple("0123456789"))
    load_export(scratch / "export")  # builds and loads the kernels
    (scratch / "weights").mkdir()
    torch.save(checkpoint(filled(SMALL["vim"])), scratch / "weights" / "vim.pth")


def _train(scratch: Path, arguments: Sequence[str]) -> None:
    """Train a stage in a forked child, as the cases do."""
    pid = os.fork()
    if pid:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 0, (scratch / "trained").read_text()
        return
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(scratch / "trained", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(scratch)
        from stages.__main__ import main

        code = main(list(arguments))
    finally:
        os._exit(code)
