"""The Core ML program of a fused EfficientViM. It is interpreted here, since only Apple's machines run it."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models import build_model
from pipeline.models.__main__ import main
from pipeline.models.efficientvim.fused import fuse
from tests.unit.exports.test_export import NARROW, exported_family
from tests.unit.models.test_efficientvim import randomised

# Core ML's operations as torch's, as far as EfficientViM's program goes.
MIL = {
    "conv": lambda x, weight, bias=None, *, strides, pad, groups, **_: F.conv2d(
        x, weight, bias, strides.tolist(), pad[::2].tolist(), 1, int(groups)
    ),
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x, transpose_y: (x.mT if transpose_x else x) @ (y.mT if transpose_y else y),
    "layer_norm": lambda x, axes, epsilon, gamma=None, beta=None: F.layer_norm(
        x, x.shape[int(axes[0]) :], gamma, beta, float(epsilon)
    ),
    "reduce_mean": lambda x, axes, keep_dims: x.mean(axes.tolist(), keepdim=bool(keep_dims)),
    "split": lambda x, axis, split_sizes=None, num_splits=None: x.split(
        split_sizes.tolist() if split_sizes is not None else x.shape[int(axis)] // int(num_splits), int(axis)
    ),
    "concat": lambda values, axis, interleave: torch.cat(values, int(axis)),
    "reshape": lambda x, shape: x.reshape(shape.tolist()),
    "transpose": lambda x, perm: x.permute(perm.tolist()),
    "expand_dims": lambda x, axes: functools.reduce(torch.unsqueeze, sorted(axes.tolist()), x),
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "mul": lambda x, y: x * y,
    "add": lambda x, y: x + y,
    "relu": lambda x: F.relu(x),
    "silu": lambda x: F.silu(x),
    "sigmoid": lambda x: x.sigmoid(),
    "cast": lambda x, dtype: x,
}


def interpret(function: Any, images: Tensor) -> Tensor:
    """Run a function of Core ML's intermediate language on `images`, in fp32."""
    values: dict[str, Any] = {"images": images}

    def read(variable: Any) -> Any:
        if isinstance(variable, (list, tuple)):
            return [read(v) for v in variable]
        if variable.name not in values and not isinstance(variable.val, str | None):
            value = torch.as_tensor(variable.val)
            values[variable.name] = value.float() if value.is_floating_point() else value
        return values.get(variable.name)

    for operation in function.operations:
        if operation.op_type != "const":
            inputs = {name: read(v) for name, v in operation.inputs.items() if v is not None}
            result = MIL[operation.op_type](**inputs)
            outputs = [result] if isinstance(result, Tensor) else result
            values.update(zip((output.name for output in operation.outputs), outputs, strict=True))
    return values["logits"]


@pytest.mark.parametrize("half", [False, True])
def test_the_program_computes_what_the_fused_model_computes(half: bool) -> None:
    pytest.importorskip("coremltools", reason="pip install 'visionmamba-pipeline[coreml]'")
    from pipeline.exports.coreml import convert_to_coreml

    torch.manual_seed(0)
    fused, images = fuse(randomised(build_model("efficientvim_nano_dist", num_classes=5))), torch.randn(2, 3, 32, 48)
    program = convert_to_coreml(fused, (32, 48), batch=2, half=half)
    function = program._mil_program.functions["main"]
    assert list(function.inputs) == ["images"]
    assert [output.name for output in function.outputs] == ["logits"]
    want = fused(images)
    torch.testing.assert_close(
        interpret(function, images), want, rtol=0, atol=(1e-2 if half else 1e-5) * want.abs().max().item()
    )


def test_an_export_becomes_a_program_that_is_whole_or_absent(tmp_path: Path) -> None:
    pytest.importorskip("coremltools", reason="pip install 'visionmamba-pipeline[coreml]'")
    exported_family(tmp_path / "export", "efficientvim_nano", image_size=64, **NARROW)
    out = tmp_path / "out" / "model.mlpackage"
    command = ["coreml", str(tmp_path / "export"), "--out", str(out)]
    assert main(command) == 0
    assert (out / "Manifest.json").is_file()
    assert list(out.parent.iterdir()) == [out]
    assert main(command) == 2
