"""Biases: replaced and added in every operator, and kept in channels whose weights are nothing beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.emit import emit, integer_layers, integer_parts
from qopt.emit.accumulator import LARGEST_BIAS, SMALLEST_SCALE, fit_scales, round_bias, smallest_scales
from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange, quantize_whole
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import to_bytes
from qopt.spec import WeightSpec

OPS = [
    "Conv", "grouped", "depthwise", "Conv1d", "ConvTranspose", "Gemm", "Gemm_t", "Gemm_row", "MatMul", "MatMul_left",
    "MatMul_3d",
]  # fmt: skip
CODES = {"x": AffineRange.from_bounds(-1, 1, 8), "y": AffineRange.from_bounds(-8, 8, 8)}


def shape_of(prepared: Prepared) -> tuple[int, ...]:
    """How a bias lies against the layer's output."""
    layer = prepared.layers[0]
    rank = len(layer.shape) - 2 if layer.op in ("Conv", "ConvTranspose") else 0
    return (-1, *[1] * rank)


@pytest.mark.parametrize("form", ["float", "weight-only", "integer"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_replacement(
    op: str, has_bias: bool, form: str, one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    """The new bias shifts the output by exactly its difference to the old one."""
    prepared = one_layer(op, bias=has_bias)
    layer = prepared.layers[0]
    weights = {} if form == "float" else codes_of(prepared, "int4")
    activations = CODES if form == "integer" else {}
    old = prepared.initializer("l.bias").reshape(-1) if has_bias else np.zeros(layer.channels, np.float32)
    shift = np.linspace(-2, 2, layer.channels).astype(np.float32)
    feed = {"x": images(prepared)}
    plain = evaluate(emit(prepared, Quantized(weights)), feed, layer.uses[0].output)
    if form == "integer":
        quantized = Quantized(weights, {("l.weight", 0): torch.from_numpy(old + shift)}, activations)
        plain = evaluate(emit(prepared, Quantized(weights, {}, {"x": CODES["x"]})), feed, "y")
    else:
        quantized = Quantized(weights, {("l.weight", 0): torch.from_numpy(old + shift)})
    model = emit(prepared, quantized)
    onnx.checker.check_model(to_bytes(model), full_check=True)
    assert [v.name for v in model.graph.outputs] == ["logits"]
    found = evaluate(model, feed, "y")
    assert np.allclose(found, plain + shift.reshape(shape_of(prepared)), atol=5e-3 if form == "integer" else 1e-5)
    assert "l.bias" not in model.graph.initializers
    kernels = count_kernels(to_bytes(model))
    assert kernels.integer == len(integer_layers(prepared, quantized))


def test_the_original_bias_stays_where_another_node_reads_it(graph: Any, codes_of: Any, evaluate: Any) -> None:
    g = graph((16,))
    bias = g.random("shared", 16)
    g.op("Gemm", ["x", g.random("a.weight", 16, 16), bias], "a")
    g.op("Gemm", ["a", g.random("b.weight", 16, 16), bias], "b")
    g.head(g.op("Add", ["b", bias], "c"))
    prepared = g.prepared()
    model = emit(prepared, Quantized({}, {("b.weight", 0): torch.zeros(16)}))
    pixels = np.zeros((1, 16), np.float32)
    vector, second = prepared.initializer("shared"), prepared.initializer("b.weight")
    assert np.allclose(evaluate(model, {"x": pixels}, "logits"), 2 * (vector @ second + vector), atol=1e-5)


def test_two_uses_of_one_matmul_weight_get_two_biases(graph: Any, codes_of: Any, evaluate: Any, images: Any) -> None:
    """Neither has a bias of its own: two Adds, whose outputs take over the names of the products."""
    g = graph((16,))
    g.random("l.weight", 16, 16)
    g.op("MatMul", ["x", "l.weight"], "a", name="first")
    g.op("Tanh", ["a"], "t")
    g.op("MatMul", ["t", "l.weight"], "b", name="second")
    g.head("b")
    prepared = g.prepared()
    one, two = torch.full((16,), 0.5), torch.full((16,), -0.25)
    for activations in ({}, {"x": CODES["x"], "t": CODES["x"]}):
        quantized = Quantized(codes_of(prepared, "int8"), {("l.weight", 0): one, ("l.weight", 1): two}, activations)
        model = emit(prepared, quantized)
        onnx.checker.check_model(to_bytes(model), full_check=True)
        w = quantized.weights["l.weight"].dequantize().numpy()
        pixels = images(prepared)
        expected = 2 * (np.tanh(pixels @ w + 0.5) @ w - 0.25)
        assert np.allclose(evaluate(model, {"x": pixels}, "logits", "optimised"), expected, atol=0.06)
        assert count_kernels(to_bytes(model)).integer == (2 if activations else 0)


@pytest.mark.parametrize("op", ["Conv", "depthwise", "Gemm", "Gemm_t", "MatMul"])
@pytest.mark.parametrize("spec", ["int1", "ternary", "int2", "int4", "int8:tensor", "log2", "log4", "log1:tensor"])
@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-20, 1e-12, 1e-9, 1e-7])
def test_dead_channels_keep_their_bias(
    size: float, spec: str, op: str, one_layer: Callable[..., Prepared], evaluate: Any, images: Any
) -> None:
    """Weights of ``size`` beside biases of about 0.3: the channel's output is its bias, in the integer kernel too."""
    prepared = one_layer(op)
    layer = prepared.layers[0]
    weight = torch.from_numpy(prepared.initializer("l.weight").copy())
    dead = [0, 2] if not spec.endswith("tensor") else list(range(layer.channels))
    weight.movedim(layer.channel_axis, 0)[dead] *= size
    weights = {"l.weight": quantize_whole(weight, WeightSpec.parse(spec), layer.channel_axis)}
    quantized = Quantized(weights, {}, CODES)
    integer = bool(integer_layers(prepared, quantized))
    # signs have no zero, so that no scale suits weights and bias where they are far apart
    assert integer == (not spec.startswith(("int1", "log1"))) or size == 1e-7
    model = emit(prepared, quantized)
    assert count_kernels(to_bytes(model)).integer == integer
    found = evaluate(model, {"x": images(prepared)}, "logits", "optimised") / 2
    found = found.reshape(len(found), layer.channels, -1)[:, dead]
    bias = prepared.initializer("l.bias")[dead]
    expected = CODES["y"].dequantize(CODES["y"].quantize(torch.from_numpy(bias))).numpy()
    assert np.allclose(found, expected[:, None], atol=1e-6)


def test_an_arbitrary_scale_would_lose_the_bias(one_layer: Callable[..., Prepared], evaluate: Any, images: Any) -> None:
    """The planted mistake: a channel of zeros with the scale 1 that the quantizer gives it rounds its bias away."""
    prepared = one_layer("Conv")
    bias = prepared.initializer("l.bias")
    dead = int(np.abs(bias).argmax())
    weight = torch.from_numpy(prepared.initializer("l.weight").copy())
    weight[dead] = 0
    weights = {"l.weight": quantize_whole(weight, WeightSpec.parse("int4"), 0)}
    assert weights["l.weight"].scale[dead] == 1
    model = emit(prepared, Quantized(weights, {}, CODES | {"x": AffineRange.from_bounds(-100, 100, 8)}))
    right = evaluate(model, {"x": images(prepared)}, "logits", "optimised").reshape(3, 6, -1)[:, dead]
    scale = model.graph.initializers["l.weight/scale"].const_value
    assert scale is not None
    planted = scale.numpy().copy()
    planted[dead] = 1
    model.graph.initializers["l.weight/scale"].const_value = ir.tensor(planted, name="l.weight/scale")
    wrong = evaluate(model, {"x": images(prepared)}, "logits", "optimised").reshape(3, 6, -1)[:, dead]
    assert np.allclose(right, 2 * bias[dead], atol=CODES["y"].scale)
    assert not np.allclose(wrong, 2 * bias[dead], atol=CODES["y"].scale)


weights_of = st.sampled_from(["ternary", "int2:full", "int3:full", "int4:max", "int8", "log2", "log3", "log4"])


@given(spec=weights_of, seed=st.integers(0, 2**31), per_tensor=st.booleans(), exponent=st.integers(-40, 3))
@settings(max_examples=80)
def test_fitted_scales(spec: str, seed: int, per_tensor: bool, exponent: int) -> None:
    """Every bias fits; a weight changes by at most half the new scale's step, and not at all where the scale stays."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((5, 7), generator=generator) * 10.0**exponent
    weight[1] = 0
    coded = quantize_whole(weight, WeightSpec.parse(spec + (":tensor" if per_tensor else "")), 0)
    bias = torch.randn(5, generator=generator).numpy()
    code = AffineRange.from_bounds(0, 1, 8)
    smallest = smallest_scales([(bias, code)], 5)
    fitted = fit_scales(coded, smallest)
    assert fitted.spec == coded.spec
    assert fitted.scale.shape == coded.scale.shape
    rounded = round_bias(bias, fitted, code)
    assert np.abs(rounded.codes.astype(np.int64)).max() <= LARGEST_BIAS * 1.001
    assert np.allclose(rounded.values, bias, atol=float((fitted.scale * code.scale).abs().max()) / 2, rtol=1e-6)
    before, after = coded.dequantize().double(), fitted.dequantize().double()
    scale = fitted.scale.double().abs().reshape(-1, 1)
    grown = (fitted.scale != coded.scale).reshape(-1, 1)
    top = 64 if coded.table is not None else 1  # neighbouring powers of two lie up to half the top level apart
    assert ((before - after).abs() <= torch.where(grown, 0.5 * top * scale, 0.0) * 1.0001).all()
    if not per_tensor:
        assert (fitted.dequantize()[1] == 0).all()


def test_smallest_scales_over_several_uses() -> None:
    wide, narrow = AffineRange.from_bounds(0, 2.55, 8), AffineRange.from_bounds(0, 0.255, 8)
    first, second = np.array([1.0, 0.0], np.float32), np.array([0.1, 0.0], np.float32)
    found = smallest_scales([(first, wide), (second, narrow)], 2)
    assert found[0] == pytest.approx(max(1.0 / wide.scale, 0.1 / narrow.scale) / LARGEST_BIAS)
    assert found[1] == pytest.approx(SMALLEST_SCALE)
    assert smallest_scales([], 3).tolist() == pytest.approx([SMALLEST_SCALE] * 3)


def test_parts_name_the_biases_that_kernels_add(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    """A MatMul of rank 3 adds its bias in float; the others in the accumulator, rounded to its unit."""
    for op, added in (("Conv", True), ("Gemm_row", True), ("MatMul", True), ("MatMul_3d", False)):
        prepared = one_layer(op)
        quantized = Quantized(codes_of(prepared, "int4"), {}, CODES)
        part = integer_parts(prepared, quantized)["l.weight"]
        assert part.gemm == (op in ("Gemm_row", "MatMul"))
        assert list(part.biases) == ([0] if added else [])
        if added:
            bias = prepared.initializer("l.bias").reshape(-1)
            unit = part.weight.scale.numpy() * np.float32(CODES["x"].scale)
            assert np.abs(part.biases[0].values - bias).max() <= unit.max() / 2
            assert np.array_equal(part.biases[0].codes, np.rint(bias.astype(np.float64) / unit))
    assert integer_parts(one_layer("Conv"), Quantized()) == {}


def test_names_that_the_model_does_not_have(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Conv")
    weights = codes_of(prepared, "int4")
    with pytest.raises(VerificationError, match=r"l\.wait: .* did you mean 'l\.weight'"):
        emit(prepared, Quantized({"l.wait": weights["l.weight"]}))
    for key in (("nobody", 0), ("l.weight", 1), ("l.weight", -1)):
        with pytest.raises(VerificationError, match="no such layer or use"):
            emit(prepared, Quantized(weights, {key: torch.zeros(6)}))
