"""The operators of image classifiers against ONNX Runtime, in every form that they take.

`test_operator_cases.py` has the others, `test_conformance.py` holds all of them to ONNX's own cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto

from qopt.errors import UnsupportedModelError
from qopt.graph.compare import TOLERANCE, matches_onnxruntime
from qopt.graph.operators import TABLE
from qopt.graph.operators.registry import operator
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin

Builder = Callable[[Any], str]


def _unary(name: str, **attributes: Any) -> Builder:
    return lambda g: g.op(name, g.op("Sub", "x", g.constant(0.4)), **attributes)


def _positive(name: str) -> Builder:
    return lambda g: g.op(name, g.op("Add", "x", g.constant(0.1)))


def _binary(name: str) -> Builder:
    return lambda g: g.op(name, "x", g.positive(3, 1, 1))


def _compare(name: str) -> Builder:
    return lambda g: _cast(g, g.op(name, "x", g.constant(0.5)))


def _cast(g: Any, value: str, to: int = TensorProto.FLOAT) -> str:
    return str(g.op("Cast", value, to=to))


def _logic(name: str) -> Builder:
    def build(g: Any) -> str:
        low, high = g.op("Greater", "x", g.constant(0.3)), g.op("Less", "x", g.constant(0.7))
        return _cast(g, g.op(name, low, high))

    return build


def _conv(*weight: int, **attributes: Any) -> Builder:
    return lambda g: g.op("Conv", "x", g.random(*weight), g.random(weight[0]), **attributes)


def _conv1d(g: Any) -> str:
    rows = g.op("Reshape", "x", g.ints(0, 3, 64))
    return str(g.op("Conv", rows, g.random(5, 3, 3), strides=[2], pads=[1, 0], dilations=[2]))


def _up(*weight: int, **attributes: Any) -> Builder:
    return lambda g: g.op("ConvTranspose", "x", g.random(*weight), **attributes)


def _gemm(weight: tuple[int, ...], bias: tuple[int, ...] | None, **attributes: Any) -> Builder:
    def build(g: Any) -> str:
        inputs = [g.op("Flatten", "x"), g.random(*weight)]
        return str(g.op("Gemm", *inputs, *([g.random(*bias)] if bias is not None else []), **attributes))

    return build


def _pool(name: str, **attributes: Any) -> Builder:
    return lambda g: g.op(name, g.op("Sub", "x", g.constant(2.0)), **attributes)


def _reduce(name: str, *axes: int, **attributes: Any) -> Builder:
    return lambda g: g.op(name, "x", g.ints(*axes), **attributes)


def _pad(mode: str, pads: list[int], *more: Any) -> Builder:
    def build(g: Any) -> str:
        inputs = [g.constant(more[0]) if more else "", g.ints(*more[1]) if len(more) > 1 else ""]
        return str(g.op("Pad", "x", g.ints(*pads), *inputs, mode=mode))

    return build


def _slice(starts: list[int], ends: list[int], *more: list[int]) -> Builder:
    return lambda g: g.op("Slice", "x", g.ints(*starts), g.ints(*ends), *(g.ints(*m) for m in more))


def _gather(index: Any, axis: int) -> Builder:
    return lambda g: g.op("Gather", "x", g.constant(index, dtype=np.int64), axis=axis)


def _split(sizes: list[int] | None, outputs: int, axis: int, **attributes: Any) -> Builder:
    def build(g: Any) -> str:
        parts = g.ops("Split", "x", *([g.ints(*sizes)] if sizes else []), outputs=outputs, axis=axis, **attributes)
        return str(g.op("Concat", *reversed(parts), axis=axis))

    return build


def _shape_arithmetic(g: Any) -> str:
    """What exporters write for ``x.view(x.size(0), -1)`` and a class token."""
    batch = g.op("Gather", g.op("Shape", "x"), g.constant(0, dtype=np.int64), axis=0)
    rows = g.op("Unsqueeze", batch, g.ints(0))
    tokens = g.op("Reshape", "x", g.op("Concat", rows, g.ints(3), g.ints(-1), axis=0))
    zeros = g.op("ConstantOfShape", g.op("Concat", rows, g.ints(1), g.ints(64), axis=0))
    return str(g.op("Concat", g.op("Add", zeros, g.random(64)), tokens, axis=1))


def _expand_by_batch(g: Any) -> str:
    wanted = g.op("Concat", g.op("Shape", "x", start=0, end=1), g.ints(4, 1, 64), axis=0)
    token = g.op("Expand", g.random(1, 1, 1, 64), wanted)
    return str(g.op("Mul", token, g.op("ReduceMean", "x", g.ints(1, 2, 3), keepdims=1)))


def _range_by_size(g: Any) -> str:
    """Indices that come from the batch size, so that nothing of it can be folded."""
    size = g.op("Gather", g.op("Shape", "x"), g.constant(0, dtype=np.int64))
    zero, one = g.constant(0, dtype=np.int64), g.constant(1, dtype=np.int64)
    rows = g.op("Range", zero, size, one)
    picked = g.op("Gather", "x", rows, axis=0)
    cells = g.op("Div", g.op("Size", "x"), g.op("Mul", size, g.constant(2, dtype=np.int64)))
    return str(g.op("Add", picked, _cast(g, g.op("Neg", cells))))


def _prelu(g: Any) -> str:
    return str(g.op("PRelu", g.op("Sub", "x", g.constant(0.5)), g.random(3, 1, 1)))


def _computed_clip(g: Any) -> str:
    low = g.op("Mul", g.op("ReduceMin", "x", keepdims=0), g.constant(0.0))
    return str(g.op("Clip", g.op("Sub", "x", g.constant(0.5)), low, g.constant(0.25)))


def _where(g: Any) -> str:
    return str(g.op("Where", g.op("Greater", "x", g.constant(0.5)), "x", g.constant(-np.inf)))


def _finite_where(g: Any) -> str:
    return str(g.op("Where", g.op("Not", g.op("IsNaN", _where(g))), g.op("Max", "x", g.constant(0.2)), "x"))


def _power_tensor(g: Any) -> str:
    return str(g.op("Pow", "x", g.positive(3, 1, 1)))


def _integer_division(g: Any) -> str:
    whole = _cast(g, g.op("Mul", g.op("Sub", "x", g.constant(0.5)), g.constant(100.0)), TensorProto.INT64)
    return _cast(g, g.op("Div", whole, g.constant(7, dtype=np.int64)))


def _attention(g: Any) -> str:
    tokens = g.op("Reshape", "x", g.ints(0, 3, 64))
    keys = g.op("Transpose", tokens, perm=[0, 2, 1])
    weights = g.op("Softmax", g.op("MatMul", tokens, keys), axis=-1)
    return str(g.op("MatMul", weights, tokens))


def _cast_to_float8(g: Any) -> str:
    return _cast(g, _cast(g, "x", TensorProto.FLOAT8E4M3FN))


CASES: dict[str, Builder] = {
    **{n: _unary(n) for n in ("Relu", "Sigmoid", "Tanh", "HardSwish", "Erf", "Softplus", "Softsign", "Mish", "Elu")},
    **{n: _unary(n) for n in ("Abs", "Neg", "Exp", "Floor", "Ceil", "Round", "Sign", "Sin", "Cos", "Selu", "Softmax")},
    **{n: _positive(n) for n in ("Sqrt", "Log", "Reciprocal")},
    **{n: _binary(n) for n in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum")},
    **{n: _compare(n) for n in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")},
    **{n: _logic(n) for n in ("And", "Or")},
    "LeakyRelu": _unary("LeakyRelu", alpha=0.2),
    "Elu alpha": _unary("Elu", alpha=0.5),
    "Selu constants": _unary("Selu", alpha=1.5, gamma=1.2),
    "HardSigmoid": _unary("HardSigmoid"),
    "HardSigmoid slope": _unary("HardSigmoid", alpha=0.3, beta=0.4),
    "Gelu": _unary("Gelu"),
    "Gelu tanh": _unary("Gelu", approximate="tanh"),
    "Softmax axis": _unary("Softmax", axis=1),
    "LogSoftmax": _unary("LogSoftmax", axis=1),
    "PRelu": _prelu,
    "Clip": lambda g: g.op("Clip", "x", g.constant(0.2), g.constant(0.6)),
    "Clip low": lambda g: g.op("Clip", "x", g.constant(0.2)),
    "Clip high": lambda g: g.op("Clip", "x", "", g.constant(0.2)),
    "Clip upside down": lambda g: g.op("Clip", "x", g.constant(0.7), g.constant(0.2)),
    "Clip without bounds": lambda g: g.op("Clip", "x"),
    "Clip computed": _computed_clip,
    "Where, IsNaN, Not": _finite_where,
    "Pow scalar": lambda g: g.op("Pow", "x", g.constant(3.0)),
    "Pow integer": lambda g: g.op("Pow", "x", g.constant(2, dtype=np.int64)),
    "Pow tensor": _power_tensor,
    "Div integers": _integer_division,
    "Sum three": lambda g: g.op("Sum", "x", g.constant(1.0), g.random(8)),
    "Min three": lambda g: g.op("Min", "x", g.constant(0.8), g.positive(8)),
    "Max three": lambda g: g.op("Max", "x", g.constant(0.1), g.random(8)),
    "Cast": lambda g: _cast(g, _cast(g, g.op("Mul", "x", g.constant(9.0)), TensorProto.INT32)),
    "Conv": _conv(4, 3, 3, 3),
    "Conv full": _conv(4, 3, 3, 3, strides=[2, 1], pads=[1, 2, 1, 2], dilations=[1, 2]),
    "Conv uneven": _conv(4, 3, 3, 3, strides=[2, 2], pads=[0, 1, 1, 2]),
    "Conv groups": _conv(6, 1, 3, 3, group=3),
    "Conv upper": _conv(4, 3, 3, 2, strides=[2, 3], auto_pad="SAME_UPPER"),
    "Conv lower": _conv(4, 3, 2, 3, strides=[2, 1], auto_pad="SAME_LOWER"),
    "Conv valid": _conv(4, 3, 3, 3, auto_pad="VALID"),
    "Conv 1d": _conv1d,
    "ConvTranspose": _up(3, 4, 3, 3),
    "ConvTranspose full": _up(3, 4, 3, 3, strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1], dilations=[2, 1]),
    "ConvTranspose uneven": _up(3, 4, 3, 3, strides=[2, 2], pads=[0, 1, 1, 0]),
    "ConvTranspose groups": _up(3, 2, 2, 2, group=3, strides=[2, 2]),
    "Gemm": _gemm((10, 192), (10,), transB=1),
    "Gemm bare": _gemm((10, 192), None, transB=1),
    "Gemm stored": _gemm((192, 10), (10,)),
    "Gemm stored bare": _gemm((192, 10), None),
    "Gemm row bias": _gemm((10, 192), (1, 10), transB=1),
    "Gemm scalar bias": _gemm((192, 10), ()),
    "Gemm scaled": _gemm((10, 192), (10,), transB=1, alpha=0.5, beta=2.0),
    "MatMul attention": _attention,
    "BatchNormalization": lambda g: g.norm("x", 3, epsilon=1e-3),
    "LayerNormalization": lambda g: g.op("LayerNormalization", "x", g.positive(8), g.random(8)),
    "LayerNormalization axis": lambda g: g.op("LayerNormalization", "x", g.positive(3, 8, 8), axis=1, epsilon=1e-2),
    "InstanceNormalization": lambda g: g.op("InstanceNormalization", "x", g.positive(3), g.random(3)),
    "GroupNormalization": lambda g: g.op("GroupNormalization", "x", g.positive(3), g.random(3), num_groups=3),
    "MaxPool": _pool("MaxPool", kernel_shape=[2, 2], strides=[2, 2]),
    "MaxPool padded": _pool("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
    "MaxPool uneven": _pool("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 0]),
    "MaxPool dilated": _pool("MaxPool", kernel_shape=[2, 2], dilations=[2, 3]),
    "MaxPool ceil": _pool("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "MaxPool ceil padded": _pool("MaxPool", kernel_shape=[3, 3], strides=[3, 3], pads=[1] * 4, ceil_mode=1),
    "MaxPool wide pads": _pool("MaxPool", kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
    "MaxPool upper": _pool("MaxPool", kernel_shape=[3, 3], strides=[2, 2], auto_pad="SAME_UPPER"),
    "AveragePool": _pool("AveragePool", kernel_shape=[2, 2], strides=[2, 2]),
    "AveragePool padded": _pool("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
    "AveragePool counted": _pool("AveragePool", kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=1),
    "AveragePool uneven": _pool("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[0, 1, 1, 2]),
    "AveragePool uneven counted": _pool("AveragePool", kernel_shape=[3, 3], pads=[0, 1, 1, 2], count_include_pad=1),
    "AveragePool ceil": _pool("AveragePool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "AveragePool ceil counted": _pool(
        "AveragePool", kernel_shape=[3, 3], strides=[3, 3], pads=[1] * 4, ceil_mode=1, count_include_pad=1
    ),
    "GlobalAveragePool": _pool("GlobalAveragePool"),
    "GlobalMaxPool": _pool("GlobalMaxPool"),
    "ReduceMean": _reduce("ReduceMean", 2, 3, keepdims=0),
    "ReduceSum": _reduce("ReduceSum", -1),
    "ReduceMax": _reduce("ReduceMax", 1),
    "ReduceMin": _reduce("ReduceMin", 1, 2),
    "ReduceSum noop": lambda g: g.op("ReduceSum", "x", noop_with_empty_axes=1),
    "Flatten": lambda g: g.op("Flatten", "x"),
    "Flatten axis": lambda g: g.op("Flatten", "x", axis=-3),
    "Reshape": lambda g: g.op("Reshape", "x", g.ints(-1, 16, 12)),
    "Reshape zeros": lambda g: g.op("Reshape", "x", g.ints(0, 0, -1)),
    "Shape arithmetic": _shape_arithmetic,
    "Expand": lambda g: g.op("Expand", g.op("ReduceMean", "x", g.ints(1)), g.ints(5, 1, 8)),
    "Expand by batch": _expand_by_batch,
    "Range": _range_by_size,
    "Transpose": lambda g: g.op("Transpose", "x", perm=[0, 2, 3, 1]),
    "Transpose all": lambda g: g.op("Transpose", g.op("Transpose", "x")),
    "Squeeze": lambda g: g.op("Squeeze", g.op("ReduceMean", "x", g.ints(2, 3)), g.ints(2, 3)),
    "Unsqueeze": lambda g: g.op("Unsqueeze", "x", g.ints(1)),
    "Unsqueeze two": lambda g: g.op("Unsqueeze", "x", g.ints(-1, 1)),
    "Tile": lambda g: g.op("Tile", "x", g.ints(1, 2, 1, 3)),
    "Concat": lambda g: g.op("Concat", "x", g.op("Neg", "x"), "x", axis=1),
    "Split": _split([1, 2], 2, 1),
    "Split evenly": _split(None, 3, 2, num_outputs=3),
    "Split, one part used": lambda g: g.ops("Split", "x", g.ints(1, 2), outputs=2, axis=1)[1],
    "Slice": _slice([1, 0], [8, -2], [2, 3], [2, 3]),
    "Slice all axes": _slice([0, 1, 2, 3], [9999, 3, 8, 7]),
    "Slice backwards": _slice([-1, 6], [-9999, 1], [2, 3], [-1, -2]),
    "Gather": _gather([2, 0, -1], 1),
    "Gather scalar": _gather(-1, 2),
    "Gather matrix": _gather([[0, 1], [2, 2]], 1),
    "Pad": _pad("constant", [0, 0, 1, 2, 0, 1, 0, 3], 0.5),
    "Pad axes": _pad("constant", [1, 2, 0, 1], 0.0, [-1, 2]),
    "Pad cut": _pad("constant", [0, 0, -1, 0, 0, 0, 0, -2]),
    "Pad edge": _pad("edge", [0, 0, 1, 2, 0, 0, 3, 0]),
    "Pad reflect": _pad("reflect", [0, 0, 2, 1, 0, 0, 0, 3]),
    "Identity": lambda g: g.op("Identity", "x"),
    "Dropout": lambda g: g.op("Dropout", "x", g.constant(0.5)),
    "Hidden token": lambda g: g.op("Add", g.op("Mul", "x", g.random(3, 8, 8)), g.op("Sqrt", "x")),
}


@pytest.mark.parametrize("name", CASES)
def test_operator_equals_onnxruntime(name: str, graph: Any) -> None:
    g = graph()
    result = CASES[name](g)
    prepared = prepare(g.model(g.op("Flatten", result)))
    twin = build_twin(prepared)
    assert prepared.batch is None
    assert matches_onnxruntime(prepared, twin) <= TOLERANCE


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda g: _cast(g, g.ops("MaxPool", "x", outputs=2, kernel_shape=[2, 2])[1]), "indices output"),
        (
            lambda g: g.op("Mul", "x", _cast(g, g.ops("Unique", g.op("ReduceMax", "x"), outputs=1)[0])),
            "operator Unique",
        ),
        (_cast_to_float8, "operator Cast (opset 21) to FLOAT8E4M3FN"),
    ],
)
def test_what_the_twin_lacks_is_refused_by_name(build: Builder, message: str, graph: Any) -> None:
    g = graph()
    prepared = prepare(g.model(g.op("Flatten", build(g))))
    with pytest.raises(UnsupportedModelError) as caught:
        build_twin(prepared)
    text = str(caught.value)
    assert message in text
    assert "can still be emitted weight-only, not attacked" in text
    assert "node 'n" in text


def test_an_operator_has_one_handler() -> None:
    with pytest.raises(ValueError, match="two handlers"):
        operator("Conv")(TABLE["Conv"])


@pytest.mark.parametrize("name", ["MaxPool padded", "ReduceMax", "Clip", "Gelu", "LayerNormalization", "Slice", "Pad"])
def test_gradients_reach_the_image(name: str, graph: Any) -> None:
    g = graph()
    twin = build_twin(prepare(g.model(g.op("Flatten", CASES[name](g)))))
    image = torch.full((2, 3, 8, 8), 0.4) + torch.arange(384).reshape(2, 3, 8, 8) / 4000
    image.requires_grad_()
    (twin(image) ** 2).sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert (image.grad != 0).any()
