"""Activations in the file: clipped and on the grid exactly as `AffineRange` says, for every reader and no one else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.emit import emit
from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.session import to_bytes

EDGES = np.array([-1e9, -3.0, -0.0, 0.0, 1e-30, 0.49, 1.5, 2.5, 7.0, 1e9], np.float32)


@pytest.fixture(scope="session")
def wire(graph: Any) -> Prepared:
    """Logits that are what is quantized, unchanged but for a doubling."""
    g = graph((len(EDGES) + 90,))
    g.head(g.op("Identity", ["x"], "copy"))
    prepared: Prepared = g.prepared()
    return prepared


def quantized_by_hand(pixels: Any, code: AffineRange) -> Any:
    return code.dequantize(code.quantize(torch.from_numpy(pixels))).numpy()


def pixels_of(prepared: Prepared, seed: int, spread: float = 4.0) -> Any:
    generator = np.random.default_rng(seed)
    rows = generator.normal(0, spread, (2, *prepared.input_shape)).astype(np.float32)
    rows[:, : len(EDGES)] = EDGES
    return rows


@pytest.mark.parametrize("how", ["plain", "optimised", "reference"])
@pytest.mark.parametrize("bounds", [(0, 3), (-1, 1), (-2, 0), (-5, 0.3), (0, 0), (0, 1e-6)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_and_range(bits: int, bounds: tuple[float, float], how: str, wire: Prepared, evaluate: Any) -> None:
    code = AffineRange.from_bounds(*bounds, bits)
    model = emit(wire, Quantized({}, {}, {"x": code}))
    onnx.checker.check_model(to_bytes(model), full_check=True)
    pixels = pixels_of(wire, bits)
    if how == "reference":  # it computes codes in int32 before it clips them
        pixels = pixels.clip(-(2.0**30) * code.scale, 2.0**30 * code.scale)
    found = evaluate(model, {"x": pixels}, "logits", how) / 2
    assert np.array_equal(found, quantized_by_hand(pixels, code))
    levels = np.unique(np.rint(found / code.scale))
    assert levels.min() >= -code.zero_point
    assert levels.max() <= code.largest_code - code.zero_point
    assert found.min() >= np.float32(code.low)
    assert found.max() <= np.float32(code.high)


@given(
    low=st.floats(-50, 0, width=32), high=st.floats(0, 50, width=32), bits=st.integers(1, 8), seed=st.integers(0, 2**31)
)
@settings(max_examples=40)
def test_any_range(low: float, high: float, bits: int, seed: int, wire: Prepared, evaluate: Any) -> None:
    code = AffineRange.from_bounds(low, high, bits)
    pixels = pixels_of(wire, seed, 1 + high - low)
    found = evaluate(emit(wire, Quantized({}, {}, {"x": code})), {"x": pixels}, "logits") / 2
    assert np.array_equal(found, quantized_by_hand(pixels, code))


def test_a_forgotten_clip_would_be_seen(wire: Prepared, evaluate: Any) -> None:
    """4-bit codes that lose their Clip reach up to 255: the oracle above tells the two files apart."""
    code = AffineRange.from_bounds(0, 3, 4)
    model = emit(wire, Quantized({}, {}, {"x": code}))
    clip = next(node for node in model.graph if node.op_type == "Clip")
    source = clip.inputs[0]
    assert source is not None
    clip.outputs[0].replace_all_uses_with(source)
    pixels = pixels_of(wire, 0)
    assert evaluate(model, {"x": pixels}, "logits").max() / 2 == pytest.approx(255 * code.scale)


def test_every_reader_reads_the_codes(graph: Any, codes_of: Any, evaluate: Any) -> None:
    """A value that a layer and two float nodes read: all see the quantized one."""
    g = graph((16,))
    g.op("Relu", ["x"], "r")
    g.op("Gemm", ["r", g.random("l.weight", 16, 16)], "y")
    g.op("Sigmoid", ["r"], "s")
    g.op("Mul", ["y", "s"], "ys")
    g.head(g.op("Add", ["ys", "r"], "sum"))
    prepared = g.prepared()
    code = AffineRange.from_bounds(0, 1, 3)
    weights = codes_of(prepared, "int4")
    model = emit(prepared, Quantized(weights, {}, {"r": code}))
    pixels = np.random.default_rng(0).normal(0, 1, (4, 16)).astype(np.float32)
    r = quantized_by_hand(np.maximum(pixels, 0), code)
    y = r @ weights["l.weight"].dequantize().numpy()
    expected = 2 * (y / (1 + np.exp(-r)) + r)
    for how in ("plain", "optimised", "reference"):
        assert np.allclose(evaluate(model, {"x": pixels}, "logits", how), expected, atol=1e-5)


def test_the_graph_input_is_quantized_behind_the_user(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Conv")
    model = emit(prepared, Quantized(codes_of(prepared, "int4"), {}, {"x": AffineRange.from_bounds(-1, 1, 8)}))
    image = model.graph.inputs[0]
    assert image.name == "x"
    assert image.shape == prepared.model.graph.inputs[0].shape
    assert [use.node.op_type for use in image.uses()] == ["QuantizeLinear"]


def test_a_value_that_is_also_an_output_stays_float_there(graph: Any, evaluate: Any) -> None:
    g = graph((16,))
    g.op("Relu", ["x"], "r")
    g.head("r")
    prepared = g.prepared()
    prepared.model.graph.outputs.append(next(n for n in prepared.model.graph if n.op_type == "Relu").outputs[0])
    model = emit(prepared, Quantized({}, {}, {"r": AffineRange.from_bounds(0, 1, 2)}))
    pixels = pixels_of(prepared, 0)[:, :16]
    assert np.array_equal(evaluate(model, {"x": pixels}, "r"), np.maximum(pixels, 0))
    coded = quantized_by_hand(np.maximum(pixels, 0), AffineRange.from_bounds(0, 1, 2))
    assert np.array_equal(evaluate(model, {"x": pixels}, "logits"), 2 * coded)


@pytest.mark.parametrize("bits", [2, 5, 7])
@pytest.mark.parametrize(("bounds", "dropped"), [((0, 3), True), ((0, 6), True), ((0, 9), False), ((-1, 3), False)])
def test_a_clip_that_the_codes_repeat_goes(
    bits: int, bounds: tuple[float, float], dropped: bool, graph: Any, evaluate: Any
) -> None:
    """ReLU6 is left out only where the codes clip at least as tightly, and the values are the same either way."""
    g = graph((100,))
    limits = [g.constant("zero", np.float32(0)), g.constant("six", np.float32(6))]
    g.head(g.op("Clip", ["x", *limits], "r"))
    prepared = g.prepared()
    code = AffineRange.from_bounds(*bounds, bits)
    model = emit(prepared, Quantized({}, {}, {"r": code}))
    assert ("node_r" not in [node.name for node in model.graph]) == dropped
    assert ("six" not in model.graph.initializers) == dropped
    pixels = pixels_of(prepared, 3).clip(-1e6, 1e6)
    expected = 2 * quantized_by_hand(pixels.clip(0, 6), code)
    for how in ("plain", "optimised", "reference"):
        assert np.array_equal(evaluate(model, {"x": pixels}, "logits", how), expected)


def test_a_clip_without_bounds_or_with_one(graph: Any, evaluate: Any) -> None:
    g = graph((100,))
    g.op("Clip", ["x", g.constant("zero", np.float32(0))], "half")
    g.head(g.op("Clip", ["half"], "r"))
    prepared = g.prepared()
    code = AffineRange.from_bounds(0, 2, 4)
    names = [n.name for n in prepared.model.graph]
    pixels = pixels_of(prepared, 4)
    for value in {"half", "r"} & {n.outputs[0].name for n in prepared.model.graph}:
        model = emit(prepared, Quantized({}, {}, {value: code}))
        assert len({n.name for n in model.graph} & set(names)) == len(names) - 1
        assert np.array_equal(
            evaluate(model, {"x": pixels}, "logits"), 2 * quantized_by_hand(pixels.clip(0, None), code)
        )


def test_names_that_are_no_activations(one_layer: Callable[..., Prepared]) -> None:
    code = AffineRange.from_bounds(-1, 1, 8)
    prepared = one_layer("Conv")
    for name in ("nowhere", "l.weight"):
        with pytest.raises(VerificationError, match=name):
            emit(prepared, Quantized({}, {}, {name: code}))
    with pytest.raises(VerificationError, match="an activation is to be quantized that no node reads"):
        emit(prepared, Quantized({}, {}, {"logits": code}))
