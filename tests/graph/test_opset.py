"""Graphs of every opset from 7 to 25: what an operator meant in its day, by ONNX Runtime on the file as it was written,
is what the prepared graph and the twin compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qopt.errors import UnsupportedModelError
from qopt.graph.compare import TOLERANCE, difference, random_images
from qopt.graph.fold_constants import lift_constants
from qopt.graph.names import name_everything
from qopt.graph.opset import OPSET, convert_opset
from qopt.graph.prepare import prepare
from qopt.graph.shapes import infer_shapes
from qopt.graph.twin import build_twin, import_graph

Builder = Callable[[Any], str]


def _same(op: str, *inputs: Callable[[Any], str], **attributes: Any) -> Builder:
    return lambda g: g.op(op, "x", *(build(g) for build in inputs), **attributes)


def _ints(*numbers: int) -> Callable[[Any], str]:
    return lambda g: str(g.ints(*numbers))


def _number(value: float) -> Callable[[Any], str]:
    return lambda g: str(g.constant(value))


def _floats(*numbers: float) -> Callable[[Any], str]:
    return lambda g: str(g.constant(list(numbers)))


def _softmax(name: str, axis: int | None) -> Builder:
    """Before opset 13 all axes from ``axis``, by default 1, were one."""
    attributes = {} if axis is None else {"axis": axis}
    return lambda g: g.op(name, g.op("Mul", "x", g.constant(5.0)), **attributes)


def _split(g: Any) -> str:
    low, high = g.ops("Split", "x", outputs=2, axis=1, split=[1, 2])
    return str(g.op("Concat", high, low, axis=1))


def _split_evenly(g: Any) -> str:
    low, high = g.ops("Split", "x", outputs=2, axis=2)
    return str(g.op("Sub", low, high))


def _top_k(g: Any) -> str:
    return str(g.ops("TopK", "x", outputs=2, axis=3, k=3)[0])


def _top_k_input(g: Any) -> str:
    return str(g.ops("TopK", "x", g.ints(3), outputs=2, axis=3)[0])


def _dropout(g: Any) -> str:
    return str(g.op("Dropout", "x", ratio=0.4))


def _norm(g: Any) -> str:
    return str(g.norm("x", 3))


def _old_norm(g: Any) -> str:
    return str(g.norm("x", 3, spatial=1))


def _group_norm(g: Any) -> str:
    """Scale and shift per group until opset 20, per channel from 21 on."""
    doubled = g.op("Concat", "x", g.op("Neg", "x"), axis=1)
    return str(g.op("GroupNormalization", doubled, g.positive(2), g.random(2), num_groups=2))


def _cast_to_int(g: Any) -> str:
    return str(
        g.op("Cast", g.op("Cast", g.op("Mul", "x", g.constant(9.0)), to=TensorProto.INT32), to=TensorProto.FLOAT)
    )


def _quantized(g: Any) -> str:
    """Codes and back, as opset 10 has them."""
    scale, zero = g.constant(0.01), g.constant(12, dtype=np.uint8)
    return str(g.op("DequantizeLinear", g.op("QuantizeLinear", "x", scale, zero), scale, zero))


def _quantized_rows(g: Any) -> str:
    scale, zero = g.constant([0.01, 0.02, 0.03]), g.constant([0, 1, 2], dtype=np.uint8)
    codes = g.op("QuantizeLinear", "x", scale, zero, axis=1)
    return str(g.op("DequantizeLinear", codes, scale, zero, axis=1))


def _scatter(g: Any) -> str:
    """Deprecated in opset 11, under another name since."""
    index = g.constant(np.zeros((1, 1, 1, 2)), dtype=np.int64)
    rows = g.op("Expand", "x", g.ints(1, 1, 1, 1)) if g.opset > 7 else "x"
    return str(g.op("Scatter", rows, index, g.constant(np.ones((1, 1, 1, 2))), axis=3))


CASES: dict[str, tuple[tuple[int, ...], Builder]] = {
    "Upsample attribute": ((7, 8), _same("Upsample", scales=[1.0, 1.0, 2.0, 3.0], mode="nearest")),
    "Upsample input": ((9,), _same("Upsample", _floats(1, 1, 2, 3), mode="nearest")),
    "Upsample linear": ((9,), _same("Upsample", _floats(1, 1, 2, 2), mode="linear")),
    "Resize nearest": ((10,), _same("Resize", _floats(1, 1, 2, 2), mode="nearest")),
    "Resize linear": ((10,), _same("Resize", _floats(1, 1, 2, 2), mode="linear")),
    "Resize smaller": ((10,), _same("Resize", _floats(1, 1, 0.5, 0.5), mode="nearest")),
    "Resize by parts": ((10,), _same("Resize", _floats(1, 1, 1.75, 2.5), mode="nearest")),
    "Resize smaller by parts": ((10,), _same("Resize", _floats(1, 1, 0.6, 0.4), mode="nearest")),
    "Resize smaller linear": ((10,), _same("Resize", _floats(1, 1, 0.6, 0.4), mode="linear")),
    "Upsample by parts": ((7, 8), _same("Upsample", scales=[1.0, 1.0, 1.75, 2.5])),
    "Softmax": ((7, 11, 12, 13, 20), _softmax("Softmax", None)),
    "Softmax axis": ((7, 12, 13), _softmax("Softmax", 2)),
    "LogSoftmax": ((7, 12, 13), _softmax("LogSoftmax", 1)),
    "Hardmax": ((7, 12, 13), _softmax("Hardmax", 3)),
    "Split": ((7, 11, 12), _split),
    "Split evenly": ((7, 12, 13, 17), _split_evenly),
    "TopK attribute": ((7, 9), _top_k),
    "TopK input": ((10, 11, 24), _top_k_input),
    "Dropout": ((7, 10, 11), _dropout),
    "BatchNormalization": ((7, 9, 13, 14, 15), _norm),
    "BatchNormalization spatial": ((7, 8), _old_norm),
    "Clip attributes": ((7, 10), _same("Clip", min=0.2, max=0.6)),
    "Clip inputs": ((11, 12, 13), _same("Clip", _number(0.2), _number(0.6))),
    "Pad attribute": ((7, 10), _same("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 1], value=0.5)),
    "Pad reflect": ((7, 10), _same("Pad", pads=[0, 0, 1, 2, 0, 0, 0, 1], mode="reflect")),
    "Pad input": ((11, 13, 18, 24), _same("Pad", _ints(0, 0, 1, 2, 0, 0, 0, 1), _number(0.5))),
    "Slice attributes": ((7, 9), _same("Slice", starts=[1, 0], ends=[9, -1], axes=[2, 3])),
    "Slice inputs": ((10, 11, 13), _same("Slice", _ints(1, 0), _ints(9, -1), _ints(2, 3))),
    "Squeeze attribute": ((7, 11, 12), lambda g: g.op("Squeeze", g.op("Unsqueeze", "x", axes=[1, 3]), axes=[1])),
    "ReduceMean attribute": ((7, 11, 13, 17), _same("ReduceMean", axes=[2, 3], keepdims=1)),
    "ReduceMean input": ((18, 22), _same("ReduceMean", _ints(2, 3), keepdims=1)),
    "ReduceSum attribute": ((7, 11, 12), _same("ReduceSum", axes=[1], keepdims=0)),
    "ReduceSum input": ((13, 17), _same("ReduceSum", _ints(1), keepdims=0)),
    "ReduceL2 attribute": ((7, 17), _same("ReduceL2", axes=[1])),
    "ReduceMax attribute": ((7, 12, 17), _same("ReduceMax", axes=[1], keepdims=0)),
    "Gemm": ((7, 9, 11, 13), lambda g: g.op("Gemm", g.op("Flatten", "x"), g.random(192, 5), g.random(5))),
    "Cast": ((7, 9, 13, 19, 21, 25), _cast_to_int),
    "LRN": ((7, 13), _same("LRN", size=3, alpha=0.1)),
    "PRelu": ((7, 9, 16), lambda g: g.op("PRelu", g.op("Sub", "x", g.constant(0.5)), g.random(3, 1, 1))),
    "MaxPool": ((7, 8, 10, 12, 22), _same("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)),
    "MaxPool ceil": ((10, 11, 12), _same("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    "AveragePool": ((7, 10, 11, 19, 22), _same("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, strides=[2, 2])),
    "Elu": ((7, 22), _same("Elu", alpha=0.5)),
    "HardSwish": ((14, 22), _same("HardSwish")),
    "Gelu": ((20, 22), _same("Gelu", approximate="tanh")),
    "LayerNormalization": ((17, 22), lambda g: g.op("LayerNormalization", "x", g.positive(8), g.random(8))),
    "InstanceNormalization": ((7, 22), lambda g: g.op("InstanceNormalization", "x", g.positive(3), g.random(3))),
    "Identity": ((7, 13, 16, 25), lambda g: g.op("Identity", g.op("Neg", "x"))),
    "Scatter": ((9, 10), _scatter),
    "Quantize": ((10, 13, 19, 21, 23, 25), _quantized),
    "Quantize rows": ((13, 19, 21, 25), _quantized_rows),
    "Resize half pixel": (
        (11, 13, 18, 19),
        lambda g: g.op("Resize", "x", g.constant([]), g.constant([1, 1, 2.0, 2.0])),
    ),
    "DepthToSpace": ((7, 11, 13), lambda g: g.op("DepthToSpace", g.op("Concat", *["x"] * 4, axis=1), blocksize=2)),
    "CumSum": ((11, 14), lambda g: g.op("CumSum", "x", g.constant(3, dtype=np.int64))),
    "Equal": ((7, 11, 13, 19), lambda g: g.op("Cast", g.op("Equal", *[g.op("Cast", "x", to=7)] * 2), to=1)),
    "ThresholdedRelu": ((10, 22), _same("ThresholdedRelu", alpha=0.4)),
    "RMSNormalization": ((23, 24), lambda g: g.op("RMSNormalization", "x", g.positive(8))),
}


@pytest.mark.parametrize(("name", "opset"), [(name, opset) for name, case in CASES.items() for opset in case[0]])
def test_an_operator_means_what_it_meant_in_its_opset(name: str, opset: int, graph: Any, run: Any) -> None:
    g = graph(opset=opset)
    model = g.model(g.op("Flatten", CASES[name][1](g)))
    images = random_images((3, 8, 8), 2, seed=3)
    expected = run(model, images)
    prepared = prepare(model)
    got = build_twin(prepared)(torch.from_numpy(images)).numpy()
    assert difference(got, expected) <= TOLERANCE
    assert prepared.model.opset_imports[""] == max(opset, OPSET)
    assert any(f"opset {opset} converted to {OPSET}" in note for note in prepared.notes) == (opset < OPSET)


@pytest.mark.parametrize("opset", [18, 19, 20])
def test_group_normalization_goes_from_groups_to_channels(opset: int, graph: Any) -> None:
    """ONNX withdrew these versions, so ONNX Runtime is no oracle; the definition is."""
    g = graph(opset=opset)
    model = g.model(_group_norm(g))
    infer_shapes(model)
    scale, shift = (numpy_helper.to_array(tensor) for tensor in g.constants[-2:])
    converted, _ = convert_opset(model)
    lift_constants(converted)
    name_everything(converted)
    infer_shapes(converted)
    images = random_images((3, 8, 8), 2, seed=3)
    groups = np.stack([images, -images], 1)  # (batch, group, channel, height, width)
    mean, deviation = (f(groups, axis=(2, 3, 4), keepdims=True) for f in (np.mean, np.std))
    normal = (groups - mean) / np.sqrt(deviation**2 + 1e-5)
    expected = normal * scale[:, None, None, None] + shift[:, None, None, None]
    got = import_graph(converted)(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, expected.reshape(got.shape), atol=1e-5)


def test_constants_may_be_nodes(graph: Any, run: Any) -> None:
    """As the older exporters write weights."""
    g = graph(opset=9)
    weight = numpy_helper.from_array(g.generator.standard_normal((4, 3, 3, 3)).astype(np.float32), "w")
    g.nodes.append(helper.make_node("Constant", [], ["w"], name="holder", value=weight))
    model = g.model(g.op("Flatten", g.op("Conv", "x", "w")))
    images = random_images((3, 8, 8), 2, seed=3)
    prepared = prepare(model)
    assert [layer.initializer for layer in prepared.layers] == ["w"]
    assert difference(build_twin(prepared)(torch.from_numpy(images)).numpy(), run(model, images)) <= TOLERANCE


def test_an_opset_that_is_too_old_is_refused(graph: Any) -> None:
    """Opset 6 broadcast by attributes; ONNX Runtime begins at 7 and is asked first."""
    g = graph(opset=6)
    model = g.model(g.op("Flatten", g.op("Upsample", "x", height_scale=2.0, width_scale=2.0)))
    with pytest.raises(UnsupportedModelError, match="ONNX Runtime refuses the graph"):
        prepare(model)


def test_what_the_converter_lacks_is_refused_by_opset(graph: Any) -> None:
    g = graph(opset=9)
    model = g.model(g.op("Flatten", "x"))
    model.graph.node(0).op_type = "Flatter"
    with pytest.raises(UnsupportedModelError, match=f"opset 9 cannot be converted to {OPSET}.*export it with opset"):
        convert_opset(model)


def test_a_newer_opset_stays(graph: Any) -> None:
    model = graph(opset=25)
    built = model.model(model.op("Flatten", "x"))
    converted, notes = convert_opset(built)
    assert converted is built
    assert notes == ()
