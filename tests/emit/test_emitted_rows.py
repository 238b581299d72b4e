"""Layers whose output channels differ in format: the emitted file computes them exactly, small, on integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.emit import emit, integer_layers, integer_parts
from qopt.emit.accumulator import LARGEST_BIAS, fit_scales, round_bias, scales_fit, smallest_scales
from qopt.graph.model import Layer, Prepared
from qopt.graph.quantized import Quantized
from qopt.hardware.bits import BitsModel
from qopt.hardware.cost_model import LayerDescription
from qopt.quant import AffineRange, QuantizedRows, quantize_weight
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import to_bytes
from qopt.size import code_bits, stored_bytes
from qopt.spec import WeightSpec

OPS = [
    "Conv", "grouped", "depthwise", "Conv1d", "ConvTranspose", "Gemm", "Gemm_t", "Gemm_row", "MatMul", "MatMul_left",
    "MatMul_3d",
]  # fmt: skip
MIXTURES = {
    "widths": ["int8", "int4", "int2", "int4", "int1", "int3"],
    "ternary": ["ternary", "int4", "ternary", "int8"],
    "log": ["log4", "log2", "int4:mid", "log4"],
    "grids": ["int4:narrow", "int4:full", "int2:mid", "int4:narrow"],
    "one": ["int3"],
}
IN_ORDER = ["int8", "int4"]
CODES = {"x": AffineRange.from_bounds(-1, 1, 8), "y": AffineRange.from_bounds(-4, 4, 8)}


def rows_for(layer: Layer, formats: list[str]) -> WeightSpec:
    """``formats`` over and over; of those that shall lie in order, the first for half of the channels."""
    channels = layer.channels
    if formats is IN_ORDER:
        texts = [formats[0]] * (channels // 2) + [formats[1]] * (channels - channels // 2)
    else:
        texts = list(islice(cycle(formats), channels))
    spec = f"rows({','.join(texts)})"
    return WeightSpec.parse(spec)


def coded(prepared: Prepared, formats: list[str]) -> dict[str, QuantizedRows]:
    found = {}
    for layer in prepared.layers:
        weight = torch.from_numpy(prepared.initializer(layer.initializer).copy())
        found[layer.name] = quantize_weight(weight, rows_for(layer, formats), layer.channel_axis)
    assert all(isinstance(weight, QuantizedRows) for weight in found.values())
    return found  # type: ignore[return-value]


def emitted_weight(model: ir.Model) -> ir.Value:
    value = next(n.inputs[1] for n in model.graph if n.metadata_props.get("qopt.layer") == "l.weight")
    assert value is not None
    return value


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("formats", [*MIXTURES.values(), IN_ORDER], ids=[*MIXTURES, "in order"])
def test_the_file_computes_the_weight(
    formats: list[str], op: str, one_layer: Callable[..., Prepared], evaluate: Any, images: Any
) -> None:
    prepared = one_layer(op)
    weights = coded(prepared, formats)
    feed = {"x": images(prepared)}
    expected = weights["l.weight"].dequantize().numpy()
    for activations in ({}, CODES):
        model = emit(prepared, Quantized(weights, {}, activations))
        onnx.checker.check_model(to_bytes(model), full_check=True)
        for how in ("plain", "optimised") if not activations else ("plain",):
            assert np.array_equal(evaluate(model, feed, emitted_weight(model).name, how), expected)
    oracle = prepared.model.clone()
    oracle.graph.initializers["l.weight"].const_value = ir.tensor(expected, name="l.weight")
    found = evaluate(emit(prepared, Quantized(weights)), feed, "logits", "optimised")
    assert np.array_equal(found, evaluate(oracle, feed, "logits", "optimised"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("op", "kernel"),
    [("Conv", "QLinearConv"), ("grouped", "QLinearConv"), ("depthwise", "QLinearConv"), ("Conv1d", "QLinearConv"),
     ("Gemm", "QGemm"), ("Gemm_t", "QGemm"), ("MatMul", None), ("MatMul_3d", None), ("ConvTranspose", "ConvTranspose")],
)  # fmt: skip
@pytest.mark.parametrize("formats", [*MIXTURES.values(), IN_ORDER], ids=[*MIXTURES, "in order"])
def test_the_optimised_graph_is_that_of_int8(
    formats: list[str], op: str, kernel: str | None, bias: bool, one_layer: Callable[..., Prepared], codes_of: Any
) -> None:
    """The same kernels as with int8, and nothing of the packing is left: no Cast, Concat, Gather or Mul more."""
    prepared = one_layer(op, bias=bias, after="Relu")
    activations = {"x": CODES["x"], "r": AffineRange.from_bounds(0, 3, 8)}
    for codes in ({}, activations):
        found, int8 = (
            count_kernels(to_bytes(emit(prepared, Quantized(weights, {}, codes))))
            for weights in (coded(prepared, formats), codes_of(prepared, "int8"))
        )
        assert found == int8
        assert found.integer == (1 if codes and op != "ConvTranspose" else 0)
    if kernel is not None:
        assert found.counts[kernel] == 1


def held(prepared: Prepared, quantized: Quantized) -> int:
    """Bytes of all that the file holds for its weights but shapes."""
    proto = onnx.load_from_string(to_bytes(emit(prepared, quantized)))
    own = [t for t in proto.graph.initializer if t.name.rsplit("/")[0] not in quantized.activations]
    own = [t for t in own if not t.name.endswith(("/bias/codes", "/bias/scale"))]
    return sum(len(t.raw_data) for t in own if t.data_type != onnx.TensorProto.INT64)


POOL = [
    "int8",
    "int6",
    "int4",
    "int4:mid",
    "int4:narrow",
    "int3",
    "int2",
    "int2:mid",
    "int1",
    "ternary",
    "log4",
    "log2",
]


@given(
    texts=st.tuples(*[st.lists(st.sampled_from(POOL), min_size=n, max_size=n) for n in (5, 3, 7)]),
    plain=st.sampled_from([None, "int2", "int4", "ternary", "float"]), integer=st.booleans(),
)  # fmt: skip
@settings(max_examples=60)
def test_the_file_is_as_large_as_was_said(
    texts: tuple[list[str], ...], plain: str | None, integer: bool, three_layers: Prepared, codes_of: Any
) -> None:
    """Rows in every layer, or beside a layer of one format, whose tables they share; said of the spec alone, too."""
    weights: dict[str, Any] = {}
    for layer, rows in zip(three_layers.layers, texts, strict=True):
        weights |= codes_of(three_layers, f"rows({','.join(rows)})", layer.name)
    if plain is not None:
        del weights["a.weight"]
        weights |= {} if plain == "float" else codes_of(three_layers, plain, "a.weight")
    names = ("x", "ar", "b", "flat")
    codes = {name: AffineRange.from_bounds(-1, 1, 8) for name in names} if integer else {}
    quantized = Quantized(weights, {}, codes)
    stored = list(quantized.stored(three_layers))
    assert held(three_layers, quantized) == stored_bytes(stored)
    described = [
        LayerDescription(x.name, x.op, x.shape, x.channels, x.weights, x.macs) for x in three_layers.layers
    ]  # fmt: skip
    said = BitsModel().network_cost(described, {layer.name: quantized.spec(layer.name) for layer in described})
    assert said["bits"] == pytest.approx(code_bits(stored))
    every_grid = 2 * (16 + 8 + 4)  # tables of grids that ``auto`` may take: mid-rise and linear, of 4, 3 and 2 bits
    assert 0 <= said["size"] - stored_bytes(stored) <= every_grid
    layers = [BitsModel().layer_cost(layer, quantized.spec(layer.name)) for layer in described]
    assert sum(cost["code_bits"] for cost in layers) == pytest.approx(code_bits(stored) * (135 + 15 + 336))


def test_the_format_is_written_beside_the_layer(one_layer: Callable[..., Prepared]) -> None:
    prepared = one_layer("Conv")
    model = emit(prepared, Quantized(coded(prepared, MIXTURES["widths"])))
    (node,) = (n for n in model.graph if "qopt.layer" in n.metadata_props)
    assert node.metadata_props["qopt.format"] == "rows(int8,int4,int2,int4,int1,int3)"


def smallest_of(prepared: Prepared, scale: float) -> torch.Tensor:
    bias: NDArray[np.float32] = np.asarray(prepared.initializer("l.bias"), np.float32)
    return smallest_scales([(bias * np.float32(scale), CODES["x"])], len(bias))


def test_scales_grow_in_every_part(one_layer: Callable[..., Prepared]) -> None:
    """A bias far larger than the weights: every bias fits afterwards, and no weight moves by more than half a step."""
    prepared = one_layer("Conv")
    weight = coded(prepared, ["ternary", "int4:full", "ternary", "int8"])["l.weight"]
    bias = np.asarray(prepared.initializer("l.bias"), np.float32) * np.float32(1e7)
    smallest = smallest_of(prepared, 1e7)
    assert (smallest > weight.scale.abs()).any()
    fitted = fit_scales(weight, smallest)
    assert isinstance(fitted, QuantizedRows)
    assert fitted.spec == weight.spec
    assert bool((fitted.scale.abs() >= smallest).all())
    assert np.abs(round_bias(bias, fitted, CODES["x"]).codes.astype(np.int64)).max() <= LARGEST_BIAS * 1.001
    moved = (fitted.dequantize() - weight.dequantize()).abs().flatten(1).amax(1)
    assert bool((moved <= fitted.scale.abs() / 2 * 1.001).all())
    unmoved = smallest <= weight.scale.abs()
    assert torch.equal(fitted.dequantize()[unmoved], weight.dequantize()[unmoved])


def test_a_part_without_a_zero_level_decides_for_the_layer(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    """Its scales cannot grow; the channels of the other parts do not count against it, nor does it against them."""
    prepared = one_layer("Conv")
    for text, kept in (("rows(int4*5,int1)", False), ("rows(int4*6)", True), ("rows(int1*5,int4)", True)):
        weight = codes_of(prepared, text)["l.weight"]
        smallest = torch.zeros(6)
        smallest[5] = 1e6
        assert scales_fit(weight, smallest) == kept
        assert scales_fit(weight, smallest * 0)
        fitted = fit_scales(weight, smallest)
        assert torch.equal(fitted.dequantize()[:5], weight.dequantize()[:5])


def test_a_layer_that_cannot_hold_its_bias_stays_float(graph: Any, codes_of: Any) -> None:
    g = graph((4, 8, 8))
    weight = g.generator.standard_normal((6, 4, 3, 3)).astype(np.float32)
    weight[2] *= 1e-12
    bias = np.ones(6, np.float32)
    g.op("Conv", ["x", g.constant("l.weight", weight), g.constant("l.bias", bias)], "y", name="l")
    g.head("y")
    prepared = g.prepared()
    found = {
        text: integer_layers(prepared, Quantized(codes_of(prepared, text), {}, CODES))
        for text in ("rows(int4*2,int1,int4*3)", "rows(int4*2,int2,int4*3)", "rows(int1*2,int4,int1*3)")
    }
    assert [bool(layers) for layers in found.values()] == [False, True, True]


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_integer_kernels_compute_the_codes_by_hand(
    op: str, one_layer: Callable[..., Prepared], evaluate: Any, images: Any
) -> None:
    """``round((sum of products + bias code) * unit / scale) + zero point``: every channel under its own levels."""
    prepared = one_layer(op)
    quantized = Quantized(coded(prepared, MIXTURES["widths"]), {}, CODES)
    part = integer_parts(prepared, quantized)["l.weight"]
    assert isinstance(part.weight, QuantizedRows)
    levels = part.weight.joined([p.codes if p.table is None else p.table[p.codes.int()] for p in part.weight.parts])
    pixels = images(prepared)
    source, target = CODES["x"], CODES["y"]
    x = source.quantize(torch.from_numpy(pixels)).double() - source.zero_point
    b = torch.from_numpy(part.biases[0].codes).double()
    unit = torch.from_numpy(part.biases[0].unit).double()
    if op == "Conv":
        sums, unit = torch.conv2d(x, levels.double(), b, padding=1), unit.reshape(-1, 1, 1)
    else:
        sums = x @ levels.double() + b
    expected = torch.round(sums * unit / target.scale + 1e-9).add(target.zero_point).clamp(0, 255)
    found = evaluate(emit(prepared, quantized), {"x": pixels}, "logits", "optimised") / 2
    codes = np.rint(found / target.scale) + target.zero_point
    assert (codes != expected.flatten(1).numpy()).mean() < 0.002
    assert np.abs(codes - expected.flatten(1).numpy()).max() <= 1
