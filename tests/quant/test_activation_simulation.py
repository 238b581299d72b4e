"""Activation ranges, and the simulated quantizer against ONNX Runtime bit for bit."""

from __future__ import annotations

import copy
import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from qopt.errors import DataError, UsageError
from qopt.quant import ActivationQuantizer, AffineRange, Gradient

finite = st.floats(-(2.0**100), 2.0**100, width=32)


def session(affine: AffineRange, code: int) -> onnxruntime.InferenceSession:
    """x -> QuantizeLinear -> DequantizeLinear with the scale and zero point of ``affine``."""
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [affine.scale])
    zero = helper.make_tensor("zero", code, [], [affine.zero_point])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [scale, zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def probes(affine: AffineRange, seed: int) -> NDArray[np.float32]:
    """Random values, every tie between two codes and its neighbours, both ends, zeros and far outliers."""
    generator = np.random.default_rng(seed)
    scale = np.float32(affine.scale)
    ties = (np.arange(-3, 2 * affine.largest_code + 6, dtype=np.float32) / 2 - affine.zero_point) * scale
    around = np.concatenate([ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, np.float32(-9e9))])
    spread = (affine.high - affine.low) or 1.0
    random = generator.uniform(affine.low - spread / 4, affine.high + spread / 4, 4000).astype(np.float32)
    outliers = np.array([0.0, -0.0, 1e30, -1e30, 1e-40, -1e-40, np.inf, -np.inf], dtype=np.float32)
    return np.concatenate([around, random, outliers])


RANGES = [
    AffineRange.from_bounds(0.0, 6.0, 8),
    AffineRange.from_bounds(-1.7, 2.3, 8),
    AffineRange.from_bounds(-3.0, -1.0, 8),
    AffineRange.from_bounds(0.0, 1.0, 8),
    AffineRange(0.25, 128, 8),
    AffineRange(1 / 1024, 7, 8),
    AffineRange.from_bounds(-1e-6, 3e-6, 8),
    AffineRange.from_bounds(-1e20, 3e19, 8),
]


@pytest.mark.parametrize("affine", RANGES, ids=str)
def test_equals_onnx_runtime_bit_for_bit(affine: AffineRange) -> None:
    values = probes(affine, 0)
    expected = session(affine, TensorProto.UINT8).run(None, {"x": values})[0]
    simulated = ActivationQuantizer(affine)(torch.from_numpy(values)).numpy()
    by_codes = affine.dequantize(affine.quantize(torch.from_numpy(values))).numpy()
    assert np.array_equal(simulated, expected)
    assert np.array_equal(by_codes, expected)


@given(finite, finite, st.integers(0, 1000))
@settings(max_examples=30)
def test_equals_onnx_runtime_on_any_range(a: float, b: float, seed: int) -> None:
    affine = AffineRange.from_bounds(min(a, b), max(a, b), 8)
    values = probes(affine, seed)
    expected = session(affine, TensorProto.UINT8).run(None, {"x": values})[0]
    assert np.array_equal(ActivationQuantizer(affine)(torch.from_numpy(values)).numpy(), expected)


def test_four_bits_equal_the_uint4_operators() -> None:
    affine = AffineRange.from_bounds(-0.5, 1.5, 4)
    values = probes(affine, 4)
    values = values[np.isfinite(values) & (np.abs(values) < 1e6)]
    expected = session(affine, TensorProto.UINT4).run(None, {"x": values})[0]
    assert np.array_equal(ActivationQuantizer(affine)(torch.from_numpy(values)).numpy(), expected)


def test_multiplying_by_the_inverse_scale_would_be_caught() -> None:
    """A planted mistake, and what torch's own fake quantizer does."""
    affine = AffineRange.from_bounds(0.0, 6.0, 8)
    values = probes(affine, 0)[:-2]
    expected = session(affine, TensorProto.UINT8).run(None, {"x": values})[0]
    wrong = torch.fake_quantize_per_tensor_affine(torch.from_numpy(values), affine.scale, affine.zero_point, 0, 255)
    assert not np.array_equal(wrong.numpy(), expected)


@pytest.mark.parametrize(
    ("low", "high", "bits", "scale", "zero_point"),
    [
        (0.0, 255.0, 8, 1.0, 0),
        (1.0, 255.0, 8, 1.0, 0),  # widened to 0, and the zero point stays 0
        (-128.0, 127.0, 8, 1.0, 128),
        (-3.0, 0.0, 2, 1.0, 3),
        (-3.0, -2.0, 2, 1.0, 3),
        (0.0, 0.0, 8, 1.0, 0),  # all zeros
        (5.0, 5.0, 4, 1 / 3, 0),  # constant
        (-5.0, -5.0, 4, 1 / 3, 15),
        (-1.0, 2.0, 2, 1.0, 1),
        (0.0, 1e-45, 8, 1.1754943508222875e-38, 0),
        (0.0, 2.0, 1, 2.0, 0),
        (-2.0, 0.0, 1, 2.0, 1),
        (-1.0, 2.0, 1, 3.0, 0),
    ],
)
def test_from_bounds(low: float, high: float, bits: int, scale: float, zero_point: int) -> None:
    affine = AffineRange.from_bounds(low, high, bits)
    assert affine.scale == pytest.approx(scale, rel=1e-7)
    assert affine.zero_point == zero_point
    assert float(np.float32(affine.scale)) == affine.scale


@given(finite, finite, st.integers(1, 8))
@settings(max_examples=200)
def test_range_properties(a: float, b: float, bits: int) -> None:
    low, high = min(a, b), max(a, b)
    affine = AffineRange.from_bounds(low, high, bits)
    assert affine.scale > 0
    assert affine.low <= 0 <= affine.high
    assert low < 0 or affine.zero_point == 0
    ends = torch.tensor([low, high, 0.0])
    codes = affine.quantize(ends)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) <= affine.largest_code
    back = affine.dequantize(codes)
    assert float(back[2]) == 0.0
    assert bool(((back - ends).abs() <= affine.scale * 1.001).all())
    assert torch.equal(affine.quantize(back), codes)
    inside = torch.linspace(affine.low, affine.high, 50)
    assert bool(((affine.dequantize(affine.quantize(inside)) - inside).abs() <= affine.scale * 0.501).all())


@pytest.mark.parametrize(
    ("low", "high"), [(math.nan, 1.0), (0.0, math.nan), (0.0, math.inf), (-math.inf, 0.0), (2.0, 1.0), (0.0, 1e39)]
)
def test_bad_bounds(low: float, high: float) -> None:
    with pytest.raises(DataError, match="bounds"):
        AffineRange.from_bounds(low, high, 8)


@pytest.mark.parametrize(
    ("scale", "zero_point", "bits"),
    [(0.0, 0, 8), (-1.0, 0, 8), (math.nan, 0, 8), (math.inf, 0, 8), (0.1, 0, 8), (1.0, 256, 8), (1.0, -1, 8),
     (1.0, 16, 4), (1.0, 0, 0), (1.0, 0, 9)],
)  # fmt: skip
def test_bad_ranges(scale: float, zero_point: int, bits: int) -> None:
    with pytest.raises(UsageError):
        AffineRange(scale, zero_point, bits)
    if bits in (0, 9):
        with pytest.raises(UsageError, match="bits"):
            AffineRange.from_bounds(0.0, 1.0, bits)


def gradient_of(quantizer: ActivationQuantizer, values: Tensor) -> Tensor:
    leaf = values.clone().requires_grad_()
    (quantizer(leaf) * torch.arange(1.0, len(values) + 1)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [("ste", [0, 2, 3, 4, 5, 0]), ("bpda", [1, 2, 3, 4, 5, 6]), ("plain", [0, 0, 0, 0, 0, 0])],
)
def test_gradients(gradient: Gradient, expected: list[float]) -> None:
    """Outside below, both ends, two inside, outside above; the weights 1..6 tell the positions apart."""
    quantizer = ActivationQuantizer(AffineRange.from_bounds(-1.0, 2.0, 2), gradient)
    values = torch.tensor([-1.6, -1.0, 0.2, 1.4, 2.0, 2.6])
    assert gradient_of(quantizer, values).tolist() == expected
    quantizer.gradient = "bpda"
    assert gradient_of(quantizer, values).tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("gradient", ["ste", "bpda", "plain"])
def test_the_forward_does_not_depend_on_the_gradient(gradient: Gradient) -> None:
    affine = AffineRange.from_bounds(-0.7, 1.9, 3)
    values = torch.from_numpy(probes(affine, 1)).requires_grad_()
    assert torch.equal(ActivationQuantizer(affine, gradient)(values), affine.dequantize(affine.quantize(values)))


def test_clamp_and_add_back_would_be_caught() -> None:
    """A planted mistake: the usual detach trick ``x + (q - x).detach()`` is not the file's arithmetic."""
    affine = AffineRange.from_bounds(-0.7, 1.9, 2)
    values = torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3
    exact = ActivationQuantizer(affine)(values)
    assert not torch.equal(values + (exact - values), exact)


def test_one_pixel_ends_keep_their_gradient() -> None:
    """Both ends of [0, 1] are inside, whatever the rounding of the scale."""
    quantizer = ActivationQuantizer(AffineRange.from_bounds(0.0, 1.0, 8))
    assert gradient_of(quantizer, torch.tensor([0.0, 1.0])).tolist() == [1, 2]


def test_works_under_function_transforms_and_copies() -> None:
    quantizer = ActivationQuantizer(AffineRange.from_bounds(-1.0, 2.0, 8))
    values = torch.tensor([[-3.0, 0.5], [1.0, 5.0]])
    gradients = torch.func.vmap(torch.func.grad(lambda row: quantizer(row).sum()))(values)
    assert gradients.tolist() == [[0.0, 1.0], [1.0, 0.0]]
    twin = copy.deepcopy(quantizer)
    assert twin.affine == quantizer.affine == AffineRange.from_bounds(-1.0, 2.0, 8)
    assert torch.equal(twin(values), quantizer(values))
    assert list(quantizer.parameters()) == []
    assert set(quantizer.state_dict()) == {"scale", "zero_point"}


def test_a_staircase_is_idempotent_and_monotone() -> None:
    quantizer = ActivationQuantizer(AffineRange.from_bounds(-0.3, 1.1, 4))
    values = torch.linspace(-1, 2, 5001)
    once = quantizer(values)
    assert torch.equal(quantizer(once), once)
    assert bool((once.diff() >= 0).all())
    assert len(once.unique()) == 16


def test_an_unknown_gradient_is_an_error() -> None:
    quantizer = ActivationQuantizer(AffineRange.from_bounds(0.0, 1.0, 8))
    quantizer.gradient = "straight"  # type: ignore[assignment]
    with pytest.raises(UsageError, match="ste, bpda, plain"):
        quantizer(torch.zeros(1))


def test_repr_shows_what_it_does() -> None:
    text = repr(ActivationQuantizer(AffineRange(0.5, 3, 4), "bpda"))
    assert "bits=4" in text
    assert "zero_point=3" in text
    assert "bpda" in text
