"""Every format in every operator: what the file computes for the weight is what the codes say, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qopt.emit import emit, integer_layers
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import to_bytes

FORMATS = [f"{kind}{bits}{option}" for kind in ("int", "log") for bits in range(1, 9) for option in ("", ":tensor")]
FORMATS += ["ternary", "int2:full", "int3:mid", "int4:mid", "int4:narrow"]
INTEGER_FORMATS = [f for f in FORMATS if not f.startswith(("log5", "log6", "log7", "log8"))]
OPS = [
    "Conv", "grouped", "depthwise", "Conv1d", "ConvTranspose", "Gemm", "Gemm_t", "Gemm_row", "MatMul", "MatMul_left",
    "MatMul_3d",
]  # fmt: skip
CODES = {"x": AffineRange.from_bounds(-1, 1, 8), "y": AffineRange.from_bounds(-4, 4, 8)}


def emitted_weight(model: ir.Model) -> str:
    name = next(n.inputs[1].name for n in model.graph if n.metadata_props.get("qopt.layer") == "l.weight")  # type: ignore[union-attr]
    assert name is not None
    return name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("spec", FORMATS)
def test_float_form(
    spec: str, op: str, bias: bool, one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    prepared = one_layer(op, bias=bias)
    weights = codes_of(prepared, spec)
    model = emit(prepared, Quantized(weights))
    onnx.checker.check_model(to_bytes(model), full_check=True)
    feed = {"x": images(prepared)}
    expected = weights["l.weight"].dequantize().numpy()
    for how in ("plain", "optimised"):
        assert np.array_equal(evaluate(model, feed, emitted_weight(model), how), expected)
    oracle = prepared.model.clone()
    oracle.graph.initializers["l.weight"].const_value = ir.tensor(expected, name="l.weight")
    assert np.array_equal(evaluate(model, feed, "logits", "optimised"), evaluate(oracle, feed, "logits", "optimised"))


@pytest.mark.parametrize("op", [op for op in OPS if op != "ConvTranspose"])
@pytest.mark.parametrize("spec", INTEGER_FORMATS)
def test_integer_form(
    spec: str, op: str, one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    prepared = one_layer(op)
    weights = codes_of(prepared, spec)
    quantized = Quantized(weights, {}, CODES)
    assert integer_layers(prepared, quantized) == {"l.weight"}
    model = emit(prepared, quantized)
    onnx.checker.check_model(to_bytes(model), full_check=True)
    value = emitted_weight(model)
    producer = next(n for n in model.graph if n.outputs[0].name == value)
    assert producer.op_type == "DequantizeLinear"
    feed = {"x": images(prepared)}
    assert np.array_equal(evaluate(model, feed, value), weights["l.weight"].dequantize().numpy())


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul_3d"])
@pytest.mark.parametrize("spec", FORMATS)
def test_the_reference_implementation_agrees(
    spec: str, op: str, one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    prepared = one_layer(op)
    weights = codes_of(prepared, spec)
    feed = {"x": images(prepared, 1)}
    expected = weights["l.weight"].dequantize().numpy()
    for activations in ({}, CODES):
        model = emit(prepared, Quantized(weights, {}, activations))
        assert np.array_equal(evaluate(model, feed, emitted_weight(model), "reference"), expected)


@pytest.mark.parametrize("spec", FORMATS)
def test_weight_only_leaves_plain_float_kernels(spec: str, one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    """Nothing of the packing is left at run time: no Cast, Gather, Slice or DequantizeLinear."""
    for op in ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul_3d"):
        prepared = one_layer(op)
        floating = count_kernels(to_bytes(prepared.model))
        assert count_kernels(to_bytes(emit(prepared, Quantized(codes_of(prepared, spec))))) == floating
        assert floating.integer == 0
        assert floating.float_ == 1


def test_a_wrong_code_would_be_seen(
    one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    """The oracle above is sharp: one changed code in one channel changes the weight that the file computes."""
    prepared = one_layer("Conv")
    weights = codes_of(prepared, "int4")
    expected = weights["l.weight"].dequantize().numpy()
    codes = weights["l.weight"].codes
    codes[2, 1, 0, 0] = -codes[2, 1, 0, 0] if codes[2, 1, 0, 0] else torch.tensor(1, dtype=torch.int8)
    model = emit(prepared, Quantized(weights))
    found = evaluate(model, {"x": images(prepared)}, emitted_weight(model))
    assert (found != expected).sum() == 1
