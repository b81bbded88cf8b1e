"""How the nodes of a Vision Mamba mixer, and RMSNorm, are written in ONNX.

A recurrence is a Scan over the steps of one image, inside a Scan over the images.

Why this form: a Scan over the steps of all images at once was slower for each image, because the states leave the cache. Closed
forms over chunks of steps, with exponents that are differences within a chunk, were slower too: every channel and state has its
own rate, so a chunk has no matrix product. Both were tried in ONNX Runtime 1.31 beside other work, in a loop that is not part of
the project, so no ratio is given.

Shapes: Bt batch, E channels, L steps, N states.
"""

from typing import Any

RECURRENCE_DOMAIN = "pipeline"  # such nodes stand for a recurrence until `insert_scans` replaces them
LEAST_OPSET = 17


def register_symbolics() -> None:
    """Tell torch's tracing exporter how to write the two nodes of a mixer, and RMSNorm, which it does not know."""
    import torch

    torch.onnx.register_custom_op_symbolic("pipeline::causal_conv1d_silu", _conv, LEAST_OPSET)
    torch.onnx.register_custom_op_symbolic("pipeline::recurrence", _recurrence, LEAST_OPSET)
    torch.onnx.register_custom_op_symbolic("aten::rms_norm", _rms_norm, LEAST_OPSET)


def _recurrence(g: Any, x: Any, dt: Any, A: Any, B: Any, C: Any, reverse: Any) -> Any:
    backwards = int(reverse.node().t("value"))
    return g.op(f"{RECURRENCE_DOMAIN}::Recurrence", g.op("Mul", dt, x), dt, A, B, C, reverse_i=backwards).setType(
        x.type()
    )


def _conv(g: Any, x: Any, weight: Any, bias: Any, reverse: Any) -> Any:
    import torch

    # A causal convolution pads the side that it reads from. In reverse the filter is turned round.
    channels, _, taps = weight.type().sizes()
    pads = [taps - 1, 0]
    if int(reverse.node().t("value")):
        pads.reverse()
        start, end, axis, step = (g.op("Constant", value_t=torch.tensor([n])) for n in (-1, -taps - 1, 2, -1))
        weight = g.op("Slice", weight, start, end, axis, step)
    given = [x, weight] if bias.node().mustBeNone() else [x, weight, bias]
    y = g.op("Conv", *given, group_i=channels, kernel_shape_i=[taps], pads_i=pads)
    return g.op("Mul", y, g.op("Sigmoid", y)).setType(x.type())


def _rms_norm(g: Any, x: Any, shape: Any, weight: Any, eps: Any) -> Any:
    import torch

    small = g.op("Constant", value_t=torch.tensor(float(eps.node().t("value"))))
    mean = g.op("ReduceMean", g.op("Mul", x, x), axes_i=[-1], keepdims_i=1)
    normalised = g.op("Div", x, g.op("Sqrt", g.op("Add", mean, small)))
    return g.op("Mul", normalised, weight).setType(x.type())


def insert_scans(model: Any) -> None:
    """Replace every `Recurrence` node of an ONNX model, in place, by operators of ONNX itself.

    Its inputs are dt x and dt (Bt, L, E), A (N, E), B and C (Bt, L, N); its output is C·h (Bt, L, E).
    """
    kept: list[Any] = []
    found = False
    for node in model.graph.node:
        if node.domain == RECURRENCE_DOMAIN:
            found = True
            kept += _scan_of(node, f"recurrence_{len(kept)}")
        else:
            kept.append(node)
    if found:
        del model.graph.node[:]
        model.graph.node.extend(kept)
        others = [entry for entry in model.opset_import if entry.domain != RECURRENCE_DOMAIN]
        del model.opset_import[:]
        model.opset_import.extend(others)


def _scan_of(node: Any, name: str) -> list[Any]:
    """Return the nodes of one recurrence, named uniquely with the prefix `name`."""
    from onnx import TensorProto, helper

    driven, dt, A, B, C = node.input
    backwards = [helper.get_attribute_value(node.attribute[0])]

    def own(*names: str) -> list[str]:
        return [f"{name}/{one}" for one in names]

    def typed(names: list[str], *dims: str) -> list[Any]:
        sizes = [1 if d == "1" else f"{name}/{d}" for d in dims] or None
        return [helper.make_tensor_value_info(one, TensorProto.FLOAT, sizes) for one in names]

    # One step: h = exp(dt A) h + B dtx, and y = C h. h is (N, E); dtx, dt and y are (1, E), B is (N, 1) and C (1, N).
    h, dtx_t, dt_t, B_t, C_t = own("h", "dtx_t", "dt_t", "B_t", "C_t")
    exponent, decay, decayed, after, y_t = own("exponent", "decay", "decayed", "after", "y_t")
    step = helper.make_graph(
        [
            helper.make_node("Mul", [dt_t, A], [exponent]),
            helper.make_node("Exp", [exponent], [decay]),
            helper.make_node("Mul", [decay, h], [decayed]),
            helper.make_node("Gemm", [B_t, dtx_t, decayed], [after]),
            helper.make_node("MatMul", [C_t, after], [y_t]),
        ],
        f"{name}/step",
        typed([h, dtx_t, dt_t, B_t, C_t]),
        typed([after], "states", "channels") + typed([y_t], "1", "channels"),
    )
    # One image. The axes of length 1 make each step a matrix.
    zero, last, y_i, *of_image = own("zero", "last", "y_i", "dtx_i", "dt_i", "B_i", "C_i")
    scan = helper.make_node(
        "Scan",
        [zero, *of_image],
        [last, y_i],
        body=step,
        num_scan_inputs=4,
        scan_input_directions=backwards * 4,
        scan_output_directions=backwards,
    )
    image = helper.make_graph([scan], f"{name}/image", typed(of_image), typed([y_i], "steps", "1", "channels"))
    shape, second, third, *unsqueezed = own("shape", "second", "third", "dtx", "dt", "B", "C")
    y = f"{name}/y"
    return [
        helper.make_node("Shape", [A], [shape]),
        helper.make_node("ConstantOfShape", [shape], [zero]),
        helper.make_node("Constant", [], [second], value_ints=[2]),
        helper.make_node("Constant", [], [third], value_ints=[3]),
        *(
            helper.make_node("Unsqueeze", [given, axis], [out])
            for given, axis, out in zip((driven, dt, B, C), (second, second, third, second), unsqueezed, strict=True)
        ),
        helper.make_node("Scan", unsqueezed, [y], body=image, num_scan_inputs=4),
        helper.make_node("Squeeze", [y, second], list(node.output)),
    ]
