"""The file says what runs: ONNX Runtime's integer kernels, its unoptimised graph and a hand computation agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.emit import emit, integer_layers, integer_parts
from qopt.emit.activations import quantize_values
from qopt.emit.additions import Additions
from qopt.emit.float_weights import exact_codes, keep_float_weights
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange, QuantizedWeight
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import to_bytes

OPS = [
    "Conv", "grouped", "depthwise", "Conv1d", "ConvTranspose", "Gemm", "Gemm_t", "Gemm_row", "MatMul", "MatMul_left",
    "MatMul_3d",
]  # fmt: skip


def close(found: Any, expected: Any, step: float) -> None:
    """Equal but for the rounding of float sums, which may tip a value over the border of a code."""
    differs = np.abs(found - expected)
    assert differs.max() <= step * 1.001
    assert (differs > 1e-4 * step).mean() < 0.01


@pytest.mark.parametrize("after", ["none", "Relu", "clip6"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("spec", ["float", "log8", "int1", "int4", "int8:tensor", "log4"])
def test_optimised_and_plain_graph_agree(
    spec: str, op: str, after: str, one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    """Also where a float weight lies between codes, which ONNX Runtime would quantize on its own."""
    for bias in (True, False):
        prepared = one_layer(op, bias=bias, after=after)
        weights = {} if spec == "float" else codes_of(prepared, spec)
        feed = {"x": images(prepared)}
        for bits in (8, 3):
            last, low = ("y", -3.0) if after == "none" else ("r", 0.0)
            activations = {"x": AffineRange.from_bounds(-1, 1, 8), last: AffineRange.from_bounds(low, 3, bits)}
            model = emit(prepared, Quantized(weights, {}, activations))
            # the head doubles what it reads
            found, plain = (evaluate(model, feed, "logits", how) for how in ("optimised", "plain"))
            close(found, plain, 2 * activations[last].scale)
            if not integer_layers(prepared, Quantized(weights, {}, activations)):
                assert count_kernels(to_bytes(model)).integer == 0


def test_without_the_shield_a_float_weight_is_quantized(
    one_layer: Callable[..., Prepared], evaluate: Any, images: Any
) -> None:
    """The measurement behind `keep_float_weights`: should ONNX Runtime mend its ways, this test tells."""
    prepared = one_layer("Conv", after="Relu")
    activations = {"x": AffineRange.from_bounds(-1, 1, 8), "r": AffineRange.from_bounds(0, 3, 8)}
    assert count_kernels(to_bytes(emit(prepared, Quantized({}, {}, activations)))).integer == 0
    model = emit(prepared, Quantized())
    quantize_values(Additions(model.graph), activations)
    assert count_kernels(to_bytes(model)).integer == 1
    feed = {"x": images(prepared)}
    differs = np.abs(evaluate(model, feed, "logits", "optimised") - evaluate(model, feed, "logits"))
    assert (differs > 0.01).mean() > 0.05


def test_a_node_that_is_no_layer_is_kept_float_too(graph: Any, evaluate: Any, images: Any) -> None:
    """A transposed convolution with groups gets no format, but lies between codes all the same."""
    g = graph((4, 8, 8))
    g.op("ConvTranspose", ["x", g.random("up", 4, 3, 3, 3)], "y", group=2)
    g.op("Conv", ["y", g.random("l.weight", 2, 6, 3, 3)], "z")
    g.head("z")
    prepared = g.prepared()
    assert [layer.name for layer in prepared.layers] == ["l.weight"]
    activations = {name: AffineRange.from_bounds(-4, 4, 8) for name in ("x", "y", "z")}
    model = emit(prepared, Quantized({}, {}, activations))
    assert count_kernels(to_bytes(model)).integer == 0
    feed = {"x": images(prepared)}
    close(evaluate(model, feed, "logits", "optimised"), evaluate(model, feed, "logits"), 2 * activations["z"].scale)


def test_the_shield_leaves_alone_what_needs_none(one_layer: Callable[..., Prepared]) -> None:
    for activations in ({}, {"x": AffineRange.from_bounds(-1, 1, 8)}, {"y": AffineRange.from_bounds(-1, 1, 8)}):
        model = emit(one_layer("Conv"), Quantized({}, {}, activations))
        before = to_bytes(model)
        keep_float_weights(Additions(model.graph))
        assert to_bytes(model) == before
        assert "l.bias" in model.graph.initializers


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1))
@settings(max_examples=200)
def test_exact_codes_are_exact(numbers: list[float]) -> None:
    bias = np.array([x if abs(x) > 2.0**-100 else 0.0 for x in numbers], np.float32)
    coded = exact_codes(bias)
    assert coded.codes.dtype == np.int32
    assert coded.unit.dtype == np.float32
    assert np.array_equal(coded.values, bias)
    assert np.array_equal(coded.codes.astype(np.float32) * coded.unit, bias)  # as DequantizeLinear computes it
    assert np.abs(coded.codes).max() <= 2**24


@pytest.mark.parametrize("after", ["none", "Relu"])
@pytest.mark.parametrize("spec", ["int8", "int4", "int2:tensor", "log3", "int1"])
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_integer_kernels_compute_the_codes_by_hand(
    op: str, spec: str, after: str, one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    """``round((sum of products + bias code) * unit / scale) + zero point``, clipped: integers until the last step."""
    prepared = one_layer(op, after=after)
    weights = codes_of(prepared, spec)
    last = "y" if after == "none" else "r"
    source, target = AffineRange.from_bounds(-1, 0.8, 7), AffineRange.from_bounds(-3 if last == "y" else 0, 3, 6)
    quantized = Quantized(weights, {}, {"x": source, last: target})
    pixels = images(prepared)
    part = integer_parts(prepared, quantized)["l.weight"]
    coded = part.weight
    assert isinstance(coded, QuantizedWeight)
    levels = coded.codes if coded.table is None else coded.table[coded.codes.int()]
    x = source.quantize(torch.from_numpy(pixels)).double() - source.zero_point
    w, b = levels.double(), torch.from_numpy(part.biases[0].codes).double()
    unit = torch.from_numpy(part.biases[0].unit).double()
    if op == "Conv":
        sums = torch.conv2d(x, w, b, padding=1)
        unit = unit.reshape(-1, 1, 1) if unit.ndim else unit
    else:
        sums = x @ w + b
    expected = torch.round(sums * unit / target.scale + 1e-9).add(target.zero_point).clamp(0, target.largest_code)
    found = evaluate(emit(prepared, quantized), {"x": pixels}, "logits", "optimised") / 2
    codes = np.rint(found / target.scale) + target.zero_point
    exact = expected.flatten(1).numpy()
    assert (codes != exact).mean() < 0.002
    assert np.abs(codes - exact).max() <= 1


def test_the_weight_that_runs_is_the_weight_in_the_file(
    one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    """The float graph with dequantized weight and rounded bias, quantized by hand, is what the twin must compute."""
    prepared = one_layer("Conv", after="Relu")
    activations = {"x": AffineRange.from_bounds(-1, 1, 4), "r": AffineRange.from_bounds(0, 3, 4)}
    quantized = Quantized(codes_of(prepared, "int2"), {}, activations)
    part = integer_parts(prepared, quantized)["l.weight"]
    oracle = prepared.model.clone()
    for name, array in (("l.weight", part.weight.dequantize().numpy()), ("l.bias", part.biases[0].values)):
        oracle.graph.initializers[name].const_value = ir.tensor(array, name=name)
    pixels = torch.from_numpy(images(prepared))
    seen = activations["x"].dequantize(activations["x"].quantize(pixels)).numpy()
    inner = torch.from_numpy(evaluate(oracle, {"x": seen}, "r"))
    expected = 2 * activations["r"].dequantize(activations["r"].quantize(inner)).flatten(1).numpy()
    found = evaluate(emit(prepared, quantized), {"x": pixels.numpy()}, "logits", "optimised")
    assert np.allclose(found, expected, atol=1e-6)
