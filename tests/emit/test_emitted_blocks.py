"""Scales per block and zero points in every operator: the file computes what the codes say, in float32 kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qopt.emit import emit, integer_layers, runs_on_integers
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import to_bytes
from qopt.size import stored_bytes

FILLING = {
    "Conv": 12, "grouped": 9, "depthwise": 9, "Conv1d": 12, "ConvTranspose": 18, "Gemm": 8, "Gemm_t": 16,
    "Gemm_row": 8, "MatMul": 8, "MatMul_left": 16, "MatMul_3d": 8,
}  # fmt: skip
FORMATS = ["int4:block{}", "int3:block{}:asym", "ternary:block{}", "log6:block{}", "int4:asym", "int8:tensor:asym"]
CODES = {"x": AffineRange.from_bounds(-1, 1, 8), "y": AffineRange.from_bounds(-4, 4, 8)}


def emitted_weight(model: ir.Model) -> str:
    name = next(n.inputs[1].name for n in model.graph if n.metadata_props.get("qopt.layer") == "l.weight")  # type: ignore[union-attr]
    assert name is not None
    return name


@pytest.mark.parametrize("op", FILLING)
@pytest.mark.parametrize("spec", FORMATS)
def test_the_weight_alone(
    spec: str, op: str, one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    prepared = one_layer(op)
    weights = codes_of(prepared, spec.format(FILLING[op]))
    model = emit(prepared, Quantized(weights))
    onnx.checker.check_model(to_bytes(model), full_check=True)
    feed, expected = {"x": images(prepared)}, weights["l.weight"].dequantize().numpy()
    for how in ("plain", "optimised", "reference"):
        assert np.array_equal(evaluate(model, feed, emitted_weight(model), how), expected)
    oracle = prepared.model.clone()
    oracle.graph.initializers["l.weight"].const_value = ir.tensor(expected, name="l.weight")
    assert np.array_equal(evaluate(model, feed, "logits", "optimised"), evaluate(oracle, feed, "logits", "optimised"))
    assert count_kernels(to_bytes(model)) == count_kernels(to_bytes(prepared.model))


@pytest.mark.parametrize("op", FILLING)
@pytest.mark.parametrize("spec", FORMATS)
def test_between_quantized_activations(
    spec: str, op: str, one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any
) -> None:
    """No integer kernel, neither ours nor one that ONNX Runtime makes of it unasked: the weight stays what it is."""
    prepared = one_layer(op)
    quantized = Quantized(codes_of(prepared, spec.format(FILLING[op])), {}, CODES)
    assert integer_layers(prepared, quantized) == frozenset()
    assert not any(runs_on_integers(layer, quantized) for layer in prepared.layers)
    model, feed = emit(prepared, quantized), {"x": images(prepared)}
    onnx.checker.check_model(to_bytes(model), full_check=True)
    assert count_kernels(to_bytes(model)).integer == 0
    expected = quantized.weights["l.weight"].dequantize().numpy()
    assert np.array_equal(evaluate(model, feed, emitted_weight(model), "optimised"), expected)
    plain, optimised = (evaluate(model, feed, "logits", how) for how in ("plain", "optimised"))
    assert np.mean(np.abs(plain - optimised) > 1e-5) < 0.01, "a code may tip over where sums are rounded otherwise"


@pytest.mark.parametrize("spec", FORMATS)
def test_the_file_holds_what_is_counted(spec: str, one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Conv", bias=False)
    quantized = Quantized(codes_of(prepared, spec.format(12)))
    proto = onnx.load_from_string(to_bytes(emit(prepared, quantized)))
    own = [t for t in proto.graph.initializer if t.name.startswith(("l.weight/", "qopt/"))]
    values = sum(len(t.raw_data) for t in own if t.data_type != onnx.TensorProto.INT64)
    assert values == stored_bytes(quantized.stored(prepared))
