"""The operators beyond image classifiers against ONNX Runtime, as exporters write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper

from qopt.errors import UnsupportedModelError
from qopt.graph.compare import TOLERANCE, matches_onnxruntime
from qopt.graph.operators.normalisation import locally_normalized
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin, import_graph

Builder = Callable[[Any], str]


def _unary(name: str, **attributes: Any) -> Builder:
    return lambda g: g.op(name, g.op("Sub", "x", g.constant(0.4)), **attributes)


def _cast(g: Any, value: str, to: int = TensorProto.FLOAT) -> str:
    return str(g.op("Cast", value, to=to))


def _pool(name: str, **attributes: Any) -> Builder:
    return lambda g: g.op(name, g.op("Sub", "x", g.constant(2.0)), **attributes)


def _reduce(name: str, *axes: int, **attributes: Any) -> Builder:
    return lambda g: g.op(name, "x", g.ints(*axes), **attributes)


def _pad(mode: str, pads: list[int], *more: Any) -> Builder:
    def build(g: Any) -> str:
        inputs = [g.constant(more[0]) if more else "", g.ints(*more[1]) if len(more) > 1 else ""]
        return str(g.op("Pad", "x", g.ints(*pads), *inputs, mode=mode))

    return build


def _up(*weight: int, **attributes: Any) -> Builder:
    return lambda g: g.op("ConvTranspose", "x", g.random(*weight), **attributes)


def _whole(g: Any, scale: float = 9.0, to: int = TensorProto.INT64) -> str:
    return _cast(g, g.op("Mul", "x", g.constant(scale)), to)


def _xor(g: Any) -> str:
    return _cast(g, g.op("Xor", g.op("Greater", "x", g.constant(0.3)), g.op("Less", "x", g.constant(0.7))))


def _mod(**attributes: Any) -> Builder:
    return lambda g: _cast(g, g.op("Mod", g.op("Sub", _whole(g), g.ints(5)), g.ints(4), **attributes))


def _bits(name: str) -> Builder:
    return lambda g: _cast(g, g.op(name, _whole(g), g.ints(6)))


def _shift(direction: str) -> Builder:
    def build(g: Any) -> str:
        codes = _whole(g, 255.0, TensorProto.UINT8)
        return _cast(g, g.op("BitShift", codes, g.constant(3, dtype=np.uint8), direction=direction))

    return build


def _is_inf(**attributes: Any) -> Builder:
    def build(g: Any) -> str:
        ends = g.op("Div", g.op("Sub", "x", g.constant(0.5)), g.constant(0.0))
        return _cast(g, g.op("IsInf", ends, **attributes))

    return build


def _places(name: str, **attributes: Any) -> Builder:
    return lambda g: _cast(g, g.op(name, "x", **attributes))


def _top(output: int, count: int = 3, **attributes: Any) -> Builder:
    return lambda g: _cast(g, g.ops("TopK", "x", g.ints(count), outputs=2, **attributes)[output])


def _running(name: str, **attributes: Any) -> Builder:
    return lambda g: g.op(name, "x", g.constant(2, dtype=np.int64), **attributes)


def _per_image(name: str, index: Any, **attributes: Any) -> Builder:
    """By indices that are the same for every image."""

    def build(g: Any) -> str:
        single = g.constant(index, dtype=np.int64)
        sizes = g.op("Concat", g.op("Shape", "x", end=1), g.ints(*np.shape(index)[1:]), axis=0)
        return str(g.op(name, "x", g.op("Expand", single, sizes), **attributes))

    return build


def _scattered(name: str, index: Any, updates: Any, **attributes: Any) -> Builder:
    """Into constants, so that no batch size is written down."""

    def build(g: Any) -> str:
        table = g.op(name, g.random(3, 8, 8), g.constant(index, dtype=np.int64), g.constant(updates), **attributes)
        return str(g.op("Mul", "x", table))

    return build


def _one_hot(g: Any) -> str:
    levels = g.op("Mod", _whole(g, 50.0), g.ints(5))
    return str(g.op("OneHot", levels, g.constant(5, dtype=np.int64), g.constant([0.5, 2.0])))


def _non_zero(g: Any) -> str:
    """The places of what a constant has, times the image."""
    found = g.op("NonZero", g.op("Mul", g.op("Shape", "x", start=1), g.ints(1, 0, 1)))
    return str(g.op("Mul", "x", g.op("ReduceSum", _cast(g, found))))


def _compress(g: Any) -> str:
    return str(g.op("Compress", "x", g.constant([True, False, True], dtype=bool), axis=1))


def _eye(g: Any) -> str:
    return str(g.op("Add", "x", g.op("EyeLike", g.op("ReduceMax", "x", g.ints(0, 1), keepdims=0), k=1)))


def _einsum(equation: str) -> Builder:
    return lambda g: g.op("Einsum", "x", g.random(8, 5), equation=equation)


def _resize(*scales: float, **attributes: Any) -> Builder:
    return lambda g: g.op("Resize", "x", "", g.constant(list(scales)), **attributes)


def _resize_to(*sizes: int, **attributes: Any) -> Builder:
    return lambda g: g.op("Resize", "x", "", "", g.ints(*sizes), axes=[2, 3], **attributes)


def _resize_to_computed(g: Any) -> str:
    """As exporters write ``interpolate(x, size=y.shape[2:])``."""
    wanted = g.op("Shape", g.op("MaxPool", "x", kernel_shape=[2, 3], strides=[2, 3]), start=2)
    return str(g.op("Resize", "x", "", "", wanted, axes=[2, 3], mode="linear"))


def _grid_sample(**attributes: Any) -> Builder:
    def build(g: Any) -> str:
        grid = g.op(
            "Sub", g.op("Mul", g.op("Slice", "x", g.ints(0), g.ints(2), g.ints(1)), g.constant(2.2)), g.constant(1.1)
        )
        return str(g.op("GridSample", "x", g.op("Transpose", grid, perm=[0, 2, 3, 1]), **attributes))

    return build


def _volume(name: str, *weight: int, **attributes: Any) -> Builder:
    """Windows over three axes."""

    def build(g: Any) -> str:
        volume = g.op("Unsqueeze", "x", g.ints(1))
        return str(g.op(name, volume, *([g.random(*weight)] if weight else []), **attributes))

    return build


CASES: dict[str, Builder] = {
    **{n: _unary(n) for n in ("Tan", "Atan", "Sinh", "Cosh", "Asinh", "Asin", "Acos", "Atanh", "Celu", "Hardmax")},
    "Acosh": lambda g: g.op("Acosh", g.op("Add", "x", g.constant(1.0))),
    "Celu alpha": _unary("Celu", alpha=0.4),
    "ThresholdedRelu": _unary("ThresholdedRelu", alpha=0.2),
    "Shrink": _unary("Shrink", lambd=0.2, bias=0.1),
    "Mean": lambda g: g.op("Mean", "x", g.random(8), g.constant(1.0)),
    "Xor": _xor,
    "Mod": _mod(),
    "Mod of the dividend": _mod(fmod=1),
    **{n: _bits(n) for n in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")},
    "BitwiseNot": lambda g: _cast(g, g.op("BitwiseNot", _whole(g))),
    "BitShift left": _shift("LEFT"),
    "BitShift right": _shift("RIGHT"),
    "IsInf": _is_inf(),
    "IsInf negative": _is_inf(detect_positive=0),
    "CastLike": lambda g: _cast(g, g.op("CastLike", g.op("Mul", "x", g.constant(9.0)), g.ints(1))),
    "ArgMax": _places("ArgMax", axis=2),
    "ArgMin last": _places("ArgMin", axis=3, keepdims=0, select_last_index=1),
    "TopK": _top(0, axis=2),
    "TopK places": _top(1, axis=1, count=2, largest=0),
    "CumSum": _running("CumSum"),
    "CumSum exclusive backwards": _running("CumSum", exclusive=1, reverse=1),
    "ReduceL1": _reduce("ReduceL1", 2, 3),
    "ReduceL2": _reduce("ReduceL2", 1, keepdims=0),
    "ReduceLogSum": _reduce("ReduceLogSum", 2),
    "ReduceLogSumExp": _reduce("ReduceLogSumExp", 2, 3),
    "ReduceProd": _reduce("ReduceProd", 1, 2, keepdims=0),
    "ReduceSumSquare": _reduce("ReduceSumSquare", -1),
    "GatherND": _per_image("GatherND", [[[2, 1], [0, -1]]], batch_dims=1),
    "GatherElements": _per_image("GatherElements", [[[[2, 1, -1]]]], axis=3),
    "ScatterElements": _scattered("ScatterElements", [[[1, -2]]], [[[5.0, 6.0]]], axis=2),
    "ScatterElements add": _scattered("ScatterElements", [[[1, 1]]], [[[5.0, 6.0]]], axis=2, reduction="add"),
    "ScatterND": _scattered("ScatterND", [[2, 1], [0, -1]], np.ones((2, 8))),
    "ScatterND max": _scattered("ScatterND", [[2, 1, 0], [0, -1, 3]], [9.0, -9.0], reduction="max"),
    "OneHot": _one_hot,
    "NonZero": _non_zero,
    "Compress": _compress,
    "EyeLike": _eye,
    "Trilu": lambda g: g.op("Trilu", "x", g.constant(1, dtype=np.int64)),
    "Trilu lower": lambda g: g.op("Trilu", "x", upper=0),
    "Einsum": _einsum("n c h w, w k -> n c h k"),
    "Det": lambda g: g.op("Det", g.op("Unsqueeze", "x", g.ints(1))),
    "LRN": _unary("LRN", size=3, alpha=0.2, beta=0.6, bias=1.5),
    "LpNormalization": _unary("LpNormalization", axis=1, p=1),
    "MeanVarianceNormalization": _unary("MeanVarianceNormalization", axes=[1, 2, 3]),
    "LpPool": _pool("LpPool", kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 0, 1], p=3),
    "GlobalLpPool": _pool("GlobalLpPool", p=3),
    "AveragePool dilated": _pool("AveragePool", kernel_shape=[2, 2], dilations=[2, 3], pads=[1, 1, 0, 1]),
    "MaxPool uneven ceil": _pool("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 0, 1, 1], ceil_mode=1),
    "Conv over three axes": _volume("Conv", 4, 1, 2, 3, 3, pads=[1, 0, 1, 0, 1, 1]),
    "ConvTranspose over three axes": _volume("ConvTranspose", 1, 2, 2, 3, 3, strides=[2, 1, 2]),
    "MaxPool over three axes": _volume("MaxPool", kernel_shape=[2, 2, 3]),
    "AveragePool over three axes": _volume("AveragePool", kernel_shape=[2, 3, 2], strides=[1, 2, 2]),
    "ConvTranspose output": _up(3, 4, 3, 3, strides=[2, 2], output_shape=[16, 17], output_padding=[1, 1]),
    "ConvTranspose upper": _up(3, 4, 3, 3, strides=[2, 3], auto_pad="SAME_UPPER"),
    "ConvTranspose lower": _up(3, 4, 4, 3, strides=[2, 2], auto_pad="SAME_LOWER"),
    "Pad wrap": _pad("wrap", [0, 0, 2, 1, 0, 0, 0, 3]),
    "Resize": _resize(1, 1, 2, 2),
    "Resize linear": _resize(1, 1, 1.7, 0.6, mode="linear"),
    "Resize corners": _resize(1, 1, 2, 2, mode="linear", coordinate_transformation_mode="align_corners"),
    "Resize cubic": _resize(1, 1, 2, 1.5, mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1),
    "Resize smoothed": _resize(1, 1, 0.5, 0.7, mode="linear", antialias=1),
    "Resize to sizes": _resize_to(5, 11, mode="linear", coordinate_transformation_mode="pytorch_half_pixel"),
    "Resize floor": _resize_to(3, 13, nearest_mode="floor", coordinate_transformation_mode="asymmetric"),
    "Resize to computed sizes": _resize_to_computed,
    "GridSample": _grid_sample(),
    "GridSample reflection": _grid_sample(mode="nearest", padding_mode="border", align_corners=1),
    "DepthToSpace": lambda g: g.op("DepthToSpace", g.op("Concat", *["x"] * 4, axis=1), blocksize=2),
    "DepthToSpace CRD": lambda g: g.op("DepthToSpace", g.op("Concat", *["x"] * 4, axis=1), blocksize=2, mode="CRD"),
    "SpaceToDepth": lambda g: g.op("SpaceToDepth", "x", blocksize=4),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_onnxruntime(name: str, graph: Any) -> None:
    g = graph()
    result = CASES[name](g)
    prepared = prepare(g.model(g.op("Flatten", result)))
    twin = build_twin(prepared)
    assert prepared.batch is None
    assert matches_onnxruntime(prepared, twin) <= TOLERANCE


SMOOTH = [
    "Resize cubic", "Resize", "LRN", "TopK", "GatherND", "GatherElements", "ReduceL2", "ReduceProd", "CumSum", "Einsum",
    "LpPool", "AveragePool dilated", "DepthToSpace", "ScatterND", "MeanVarianceNormalization", "MaxPool uneven ceil",
]  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_reach_the_image(name: str, graph: Any) -> None:
    g = graph()
    twin = build_twin(prepare(g.model(g.op("Flatten", CASES[name](g)))))
    image = torch.full((2, 3, 8, 8), 0.4) + torch.arange(384).reshape(2, 3, 8, 8) / 4000
    image.requires_grad_()
    (twin(image) ** 2).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert (image.grad != 0).any()


@pytest.mark.parametrize("name", ["ReduceL2", "GlobalLpPool", "LpNormalization"])
def test_a_norm_of_zeros_has_a_gradient(name: str, graph: Any) -> None:
    g = graph()
    image = torch.zeros(1, 3, 8, 8, requires_grad=True)
    function: dict[str, Builder] = {
        "ReduceL2": _reduce("ReduceL2", 1),
        "GlobalLpPool": lambda g: g.op("GlobalLpPool", "x", p=2),
        "LpNormalization": lambda g: g.op("LpNormalization", "x", axis=1, p=2),
    }
    build_twin(prepare(g.model(g.op("Flatten", function[name](g)))))(image).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_neighbouring_channels(size: int) -> None:
    """ONNX Runtime takes odd sizes only; the definition is the oracle."""
    x = np.random.default_rng(0).standard_normal((2, 6, 3)).astype(np.float32)
    expected = np.empty_like(x)
    for channel in range(6):
        low, high = max(0, channel - (size - 1) // 2), min(5, channel + size // 2)
        sums = (x[:, low : high + 1] ** 2).sum(1)
        expected[:, channel] = x[:, channel] / (1.5 + 0.2 / size * sums) ** 0.6
    got = locally_normalized(torch.from_numpy(x), size, 0.2, 0.6, 1.5).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def _model(
    op_type: str, opset: int, inputs: int, dtype: int, domain: str = "", attributes: dict[str, Any] | None = None
) -> ir.Model:
    names = [f"i{place}" for place in range(inputs)]
    node = helper.make_node(op_type, names, ["y"], name="the_node", domain=domain, **(attributes or {}))
    values = [helper.make_tensor_value_info(name, dtype, [2, 3, 4]) for name in names]
    result = helper.make_tensor_value_info("y", dtype, None)
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return ir.serde.deserialize_model(
        helper.make_model(helper.make_graph([node], "g", values, [result]), opset_imports=imports, ir_version=10)
    )


_BODY = helper.make_graph([helper.make_node("Identity", ["a"], ["b"])], "body", [], [
    helper.make_tensor_value_info("b", TensorProto.FLOAT, None)])  # fmt: skip


@pytest.mark.parametrize(
    ("op_type", "inputs", "dtype", "attributes", "message"),
    [
        ("LSTM", 3, TensorProto.FLOAT, {"hidden_size": 4}, "a recurrent cell"),
        ("GRU", 3, TensorProto.FLOAT, {"hidden_size": 4}, "a recurrent cell"),
        ("RNN", 3, TensorProto.FLOAT, {"hidden_size": 4}, "a recurrent cell"),
        ("If", 1, TensorProto.BOOL, {"then_branch": _BODY, "else_branch": _BODY}, "control flow"),
        ("Loop", 2, TensorProto.INT64, {"body": _BODY}, "control flow"),
        ("Scan", 1, TensorProto.FLOAT, {"body": _BODY, "num_scan_inputs": 1}, "control flow"),
        ("SequenceConstruct", 1, TensorProto.FLOAT, {}, "a value that is no tensor"),
        ("RandomNormalLike", 1, TensorProto.FLOAT, {}, "random numbers"),
        ("Bernoulli", 1, TensorProto.FLOAT, {}, "random numbers"),
        ("NonMaxSuppression", 2, TensorProto.FLOAT, {}, "in the attackable twin"),
        ("BitShift", 2, TensorProto.UINT64, {"direction": "LEFT"}, "of UINT64"),
        ("QuantizeLinear", 2, TensorProto.FLOAT, {"output_dtype": TensorProto.FLOAT8E5M2}, "codes of type FLOAT8E5M2"),
        ("DequantizeLinear", 2, TensorProto.FLOAT, {"output_dtype": TensorProto.FLOAT8E5M2}, "to FLOAT8E5M2"),
        ("EyeLike", 1, TensorProto.FLOAT, {"dtype": TensorProto.STRING}, "of STRING"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("opset", [21, 23])
def test_what_is_refused_is_named_with_node_and_opset(
    op_type: str, inputs: int, dtype: int, attributes: dict[str, Any], message: str, opset: int
) -> None:
    model = _model(op_type, opset, inputs, dtype, attributes=attributes)
    with pytest.raises(UnsupportedModelError) as caught:
        import_graph(model)
    text = str(caught.value)
    assert f"operator {op_type} (opset {opset})" in text
    assert message in text
    assert "node 'the_node'" in text


def test_an_operator_of_another_domain_is_refused_with_it() -> None:
    with pytest.raises(UnsupportedModelError, match=r"operator Relu .*of the domain 'com.example'"):
        import_graph(_model("Relu", 21, 1, TensorProto.FLOAT, "com.example"))


def test_text_is_refused_as_an_input() -> None:
    with pytest.raises(UnsupportedModelError, match="'i0': an input of a type that torch does not have"):
        import_graph(_model("Identity", 21, 1, TensorProto.STRING))
