"""Every operator and every format, compiled and compared with the integers of the formula, code for code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qopt.emit import emit
from qopt.emit.c import emit_c
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange, quantize_weight
from qopt.runtime.session import Runner, to_bytes
from qopt.spec import WeightSpec


def residual(g: Any) -> Any:
    g.op("Relu", [g.conv("x", "a", 6, 4, 3, 3, pads=[1] * 4)], "ar")
    g.op("Add", [g.conv("ar", "b", 6, 6, 3, 3, pads=[1] * 4), "ar"], "sum")
    g.op("GlobalAveragePool", [g.op("Relu", ["sum"], "sumr")], "mean")
    return g.head("mean")


def convolution(**attributes: Any) -> Callable[[Any], Any]:
    weight = attributes.pop("weight", (6, 4, 3, 3))

    def build(g: Any) -> Any:
        g.op("Relu", [g.conv("x", "a", *weight, **attributes)], "ar")
        return g.head("ar")

    return build


def between(kind: str, **attributes: Any) -> Callable[[Any], Any]:
    """One operator between two layers."""

    def build(g: Any) -> Any:
        g.conv("x", "a", 6, 4, 3, 3, pads=[1] * 4)
        return g.head(g.op(kind, ["a"], "p", **attributes))

    return build


def sequence(g: Any) -> Any:
    g.op("Relu", [g.conv("x", "a", 6, 4, 3, pads=[2, 0], strides=[2])], "ar")
    return g.head(g.op("AveragePool", ["ar"], "p", kernel_shape=[3], pads=[1, 1]))


def products(g: Any) -> Any:
    """Tokens: a product of rank 3 with its bias, a Relu, one without a bias, and their mean as logits."""
    g.op("Add", [g.op("MatMul", ["x", g.random("a.weight", 7, 9)], "ap"), g.random("a.bias", 9)], "a")
    g.op("MatMul", [g.op("Relu", ["a"], "ar"), g.random("b.weight", 9, 3)], "b")
    g.op("Flatten", ["b"], "logits")
    return g


def joined(axis: int) -> Callable[[Any], Any]:
    def build(g: Any) -> Any:
        a = g.conv("x", "a", 4, 4, 3, 3, pads=[1] * 4)
        b = g.op("Relu", [g.conv("x", "b", 4, 4, 1, 1)], "br")
        g.op("Concat", [a, b, a], "c", axis=axis)
        g.op("Relu", [g.conv("c", "d", 2, 12 if axis == 1 else 4, 3, 3)], "dr")
        return g.head("dr")

    return build


def clipped(g: Any) -> Any:
    g.clip(g.conv("x", "a", 6, 4, 3, 3), "ac", -0.5, 0.8)
    g.conv("ac", "b", 3, 6, 3, 3)
    return g.head(g.clip("b", "bc", 0.0, 6.0))


def views(g: Any) -> Any:
    """Views that move nothing, one of the image itself, and a Transpose over an axis of length 1."""
    g.op("Reshape", ["x", g.constant("flat_shape", np.array([0, 4, 64, 1]))], "xr")
    g.op("Transpose", ["xr"], "xt", perm=[0, 3, 1, 2])
    g.op("Reshape", ["xt", g.constant("shape", np.array([0, 4, 8, 8]))], "xs")
    g.op("Relu", [g.conv("xs", "a", 6, 4, 8, 8)], "ar")
    g.op("Squeeze", ["ar", g.constant("axes", np.array([2, 3]))], "as")
    g.gemm(g.op("Identity", ["as"], "ai"), "logits", 6, 5)
    return g


def activated_logits(g: Any) -> Any:
    g.op("Flatten", ["x"], "flat")
    g.clip(g.gemm("flat", "a", 256, 9), "logits", -0.2, 0.9)
    return g


def mean_of_axes(g: Any) -> Any:
    g.op("ReduceMean", [g.conv("x", "a", 6, 4, 3, 3), g.constant("axes", np.array([-1, -2]))], "m", keepdims=0)
    g.gemm("m", "logits", 6, 5)
    return g


def shortcut(g: Any) -> Any:
    """A shortcut of every second pixel with zeros for new channels, as residual networks for CIFAR-10 have."""
    g.op("Relu", [g.conv("x", "a", 4, 4, 3, 3, pads=[1] * 4)], "ar")
    parts = zip(("starts", "ends", "axes", "steps"), ([0, -7], [2**31, 99], [2, -1], [2, 2]), strict=True)
    g.op("Slice", ["ar", *[g.constant(name, np.array(numbers)) for name, numbers in parts]], "cut")
    pads = g.constant("pads", np.array([0, 2, 0, 0, 0, 2, 0, 0]))
    g.op("Pad", ["cut", pads, g.constant("zero", np.float32(0))], "more")
    g.op("Add", [g.conv("ar", "b", 8, 4, 3, 3, pads=[1] * 4, strides=[2, 2]), "more"], "sum")
    return g.head("sum")


def padded_tokens(g: Any) -> Any:
    """Two axes, of which the last is padded and cut."""
    a = g.op("Relu", [g.op("MatMul", ["x", g.random("a.weight", 7, 9)], "a")], "ar")
    g.op("Pad", [a, g.constant("pads", np.array([1, 2])), "", g.constant("pad_axes", np.array([2]))], "p")
    g.op(
        "Slice",
        ["p", g.constant("first", np.array([0, 0, 1])), g.constant("last", np.array([2**63 - 1, 3, 12]))],
        "cut",
    )
    return g.head("cut")


def coded_logits(g: Any) -> Any:
    """A convolution whose codes are the output."""
    g.op("Relu", [g.conv("x", "a", 6, 4, 3, 3, strides=[2, 2])], "ar")
    g.op("Flatten", [g.conv("ar", "b", 5, 6, 3, 3)], "logits")
    return g


def shared(g: Any) -> Any:
    """One weight applied twice, with two biases."""
    weight = g.random("s.weight", 4, 4, 3, 3)
    g.op("Relu", [g.op("Conv", ["x", weight, g.random("one", 4)], "a")], "ar")
    g.op("Relu", [g.op("Conv", ["ar", weight, g.random("two", 4)], "b")], "br")
    return g.head("br")


NETWORKS: dict[str, tuple[tuple[int, ...], Callable[[Any], Any]]] = {
    "residual": ((4, 8, 8), residual),
    "strides": ((4, 9, 8), convolution(strides=[2, 2], pads=[1, 2, 1, 0])),
    "dilations": ((4, 8, 8), convolution(dilations=[2, 1], strides=[1, 2])),
    "groups": ((4, 8, 8), convolution(weight=(6, 2, 3, 3), group=2, pads=[1] * 4)),
    "depthwise": ((4, 8, 8), convolution(weight=(8, 1, 3, 3), group=4, pads=[1] * 4, strides=[2, 2])),
    "same upper": ((4, 8, 7), convolution(auto_pad="SAME_UPPER", strides=[2, 2])),
    "same lower": ((4, 8, 7), convolution(auto_pad="SAME_LOWER", strides=[2, 2])),
    "one axis": ((4, 16), sequence),
    "max": ((4, 8, 8), between("MaxPool", kernel_shape=[2, 2], strides=[2, 2])),
    "max padded": ((4, 8, 8), between("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)),
    "max ceil": ((4, 8, 8), between("MaxPool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)),
    "max overlapping": ((4, 8, 8), between("MaxPool", kernel_shape=[3, 3])),
    "max dilated": ((4, 8, 8), between("MaxPool", kernel_shape=[3, 3], dilations=[2, 2])),
    "global max": ((4, 8, 8), between("GlobalMaxPool")),
    "average": ((4, 8, 8), between("AveragePool", kernel_shape=[2, 2], strides=[2, 2])),
    "average seen": ((4, 8, 8), between("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)),
    "average padded": (
        (4, 8, 8),
        between("AveragePool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, count_include_pad=1),
    ),
    "reduce": ((4, 8, 8), mean_of_axes),
    "products": ((5, 7), products),
    "channels": ((4, 8, 8), joined(1)),
    "widths": ((4, 8, 8), joined(-1)),
    "clip": ((4, 8, 8), clipped),
    "coded logits": ((4, 8, 8), coded_logits),
    "shortcut": ((4, 8, 8), shortcut),
    "padded tokens": ((5, 7), padded_tokens),
    "shared": ((4, 8, 8), shared),
    "views": ((4, 8, 8), views),
    "activated logits": ((4, 8, 8), activated_logits),
}
FORMATS = (
    "int8", "int6:tensor", "int4", "int4:mid", "int3", "int2", "int2:full", "ternary", "int1", "int1:tensor",
    "log1", "log2", "log3", "log4", "log5", "rows(int8,ternary*2,log3,int1,int3)",
)  # fmt: skip


def network(graph: Any, name: str) -> Any:
    shape, build = NETWORKS[name]
    return build(graph(*shape)).prepared()


@pytest.mark.parametrize("name", NETWORKS)
def test_operators(name: str, graph: Any, quantized: Any, check: Any) -> None:
    """Signed images, so that the input's zero point is not 0 and padding counts."""
    prepared = network(graph, name)
    codes = quantized(prepared, "int8")
    assert codes.activations["x"].zero_point > 100
    program = check(prepared, codes)
    assert program.macs == sum(layer.macs for layer in prepared.layers)


@pytest.mark.parametrize(
    ("spec", "bits"),
    [(spec, 8) for spec in FORMATS]
    + [(spec, 1) for spec in ("int3", "ternary", "int1:tensor", "log1", FORMATS[-1])]
    + [(spec, 4) for spec in ("int4:mid", "int1", FORMATS[-1])],
)
def test_formats(spec: str, bits: int, graph: Any, quantized: Any, check: Any) -> None:
    """Odd numbers of taps fill no last byte; 1-bit codes meet signs in counted bits."""
    g = graph(3, 7, 7, seed=bits)
    g.op("Relu", [g.conv("x", "a", 6, 3, 3, 3, pads=[1] * 4)], "ar")
    g.op("Relu", [g.conv("ar", "b", 6, 6, 3, 3)], "br")
    g.op("Flatten", ["br"], "flat")
    g.gemm("flat", "logits", 150, 6)
    program = check(g.prepared(), quantized(g.prepared(), spec, f"int{bits}", low=0.0 if bits == 4 else -0.7), count=4)
    rows = {part.rows for step in program.network.steps for part in step.parts}
    assert ("xnor" in rows) == (bits == 1 and any(word in spec for word in ("int1", "log1")))
    assert ("dot_shifts" in program.source) == (spec.startswith(("log2", "log3", "log4", "log5")) or "log3" in spec)
    if spec.startswith("log") and spec != "log1":
        assert "weights[i] * column[i]" not in program.source  # shifts, no multiplier


@pytest.mark.parametrize(("name", "spec", "bits"), [
    ("residual", "int4", 8), ("depthwise", "int8", 5), ("groups", "rows(int1*3,int4,log2*2)", 1), ("widths", "int3", 3),
    ("one axis", "ternary", 8), ("products", "log4", 8), ("average seen", "int1", 1), ("max padded", "int8", 2),
])  # fmt: skip
def test_nothing_undefined(name: str, spec: str, bits: int, graph: Any, quantized: Any, check: Any) -> None:
    if spec.startswith("rows"):
        prepared = network(graph, name)
        codes = quantized(prepared, "int4", f"int{bits}")
        mixed = quantized_rows(prepared, spec, codes)
    else:
        prepared = network(graph, name)
        mixed = quantized(prepared, spec, f"int{bits}")
    check(prepared, mixed, "-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")


def quantized_rows(prepared: Any, spec: str, codes: Any) -> Any:
    """The same with the first layer in rows."""
    layer = prepared.layers[0]
    weight = quantize_weight(torch.from_numpy(prepared.initializer(layer.initializer).copy()), WeightSpec.parse(spec))
    return replace(codes, weights={**codes.weights, layer.name: weight})


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_convolution(data: st.DataObject, graph: Any, quantized: Any, check: Any) -> None:
    draw = data.draw
    groups = draw(st.sampled_from([1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    pads = draw(st.tuples(*[st.integers(0, 2)] * 4))
    strides, dilations = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(1, 2)] * 2))
    g = graph(6, 9, 8, seed=draw(st.integers(0, 99)))
    weight = (6, 6 // groups, *kernel)
    g.conv("x", "a", *weight, group=groups, pads=pads, strides=strides, dilations=dilations)
    g.op("GlobalAveragePool", ["a"], "m")
    prepared = g.head("m").prepared()
    spec = draw(st.sampled_from(["int8", "int3", "int1", "log4", "ternary"]))
    bits = draw(st.sampled_from([1, 3, 8]))
    check(prepared, quantized(prepared, spec, f"int{bits}"), "-O0", count=3, varied=bits == 8)


@pytest.mark.parametrize("name", ["residual", "depthwise", "products", "average seen", "widths"])
def test_logits_are_those_of_onnx_runtime(name: str, graph: Any, quantized: Any, compiled: Any) -> None:
    """Up to a code here and there, which one rounding of a half decides."""

    prepared = network(graph, name)
    codes = quantized(prepared, "int8")
    pixels = torch.rand(40, *prepared.input_shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    program = emit_c(prepared, codes, name="net")
    found = compiled(program)(codes.activations["x"].quantize(pixels).numpy())
    logits = (found - program.network.output.code.zero_point) * program.network.output.code.scale
    expected = Runner(to_bytes(emit(prepared, codes)))(pixels.numpy()).reshape(40, -1)
    assert np.abs(logits - expected).max() < 0.02 * np.ptp(expected)
    assert np.median(np.abs(logits - expected)) < 1e-3 * np.ptp(expected)


def test_changed_biases_and_dead_channels(graph: Any, quantized: Any, check: Any) -> None:
    """A channel of next to no weights, whose bias would not fit in 32 bits, and one of zeros."""
    prepared = network(graph, "residual")
    weight = torch.from_numpy(prepared.initializer("a.weight").copy())
    weight[1], weight[2] = weight[1] * 1e-14, 0
    codes = quantized(prepared, "int8")
    for spec in ("int8", "int4:mid", "log4", "int1", "ternary"):
        dead = quantize_weight(weight, WeightSpec.parse(spec))
        biases = {("a.weight", 0): torch.tensor([0.1, 7.0, -3.0, 0.5, 1e-3, 0.0]), ("b.weight", 0): torch.ones(6)}
        check(prepared, replace(codes, weights={**codes.weights, "a.weight": dead}, biases=biases), "-O0", count=3)


def test_the_image_itself(graph: Any, quantized: Any, compiled: Any) -> None:
    """Without a step the codes are copied; a batch of one is as good as any."""

    g = graph(2, 3)
    g.op("Flatten", ["x"], "logits")
    codes = np.random.default_rng(0).integers(0, 8, (4, 6))
    program = emit_c(g.prepared(1), Quantized(activations={"x": AffineRange(0.5, 3, 3)}), name="net")
    assert np.array_equal(compiled(program)(codes), codes)


def test_pools_and_views_with_ranges_of_their_own(graph: Any, quantized: Any, check: Any) -> None:
    """What a hand-edited plan may say: other codes behind a max pool, a view and a quantized Relu's source."""
    g = graph(4, 8, 8)
    g.op("MaxPool", [g.op("Relu", [g.conv("x", "a", 6, 4, 3, 3, pads=[1] * 4)], "ar")], "p", kernel_shape=[2, 2])
    prepared = g.head("p").prepared()
    codes = quantized(prepared, "int8")
    other = {"a": AffineRange(0.03125, 120, 8), "flat": AffineRange(0.125, 3, 5)}
    program = check(prepared, replace(codes, activations={**codes.activations, **other}))
    assert [type(step).__name__ for step in program.network.steps] == [
        "LayerStep", "RescaleStep", "MaxStep", "RescaleStep", "LayerStep"
    ]  # fmt: skip
