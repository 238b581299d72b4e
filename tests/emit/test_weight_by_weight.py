"""Weights as the file computes them, one at a time, against the codes; planted mistakes are found and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qopt.emit import check_weights, emit, packed_layers
from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized

OPERATORS = ["Conv", "grouped", "depthwise", "Conv1d", "ConvTranspose", "Gemm", "Gemm_t", "MatMul", "MatMul_left"]
PLAIN = ["int8", "int4:max", "int3:full", "int4:tensor", "int4:asym", "int4:block9"]
PACKED = ["int4", "int2:mid", "ternary", "int1", "log4", "log8"]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("spec", ["int4", "ternary", "log4"])
def test_every_operator(one_layer: Callable[..., Prepared], codes_of: Any, op: str, spec: str) -> None:
    prepared = one_layer(op)
    quantized = Quantized(codes_of(prepared, spec))
    check_weights(prepared, quantized, emit(prepared, quantized))


@pytest.mark.parametrize(("spec", "dialect"), [*((s, "folding") for s in PLAIN + PACKED), *((s, "qdq") for s in PLAIN)])
def test_every_format(one_layer: Callable[..., Prepared], codes_of: Any, spec: str, dialect: Any) -> None:
    prepared = one_layer("Conv")
    quantized = Quantized(codes_of(prepared, spec))
    check_weights(prepared, quantized, emit(prepared, quantized, dialect=dialect))


def test_formats_per_row(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("depthwise")
    quantized = Quantized(codes_of(prepared, "rows(int4*2,ternary*2)"))
    check_weights(prepared, quantized, emit(prepared, quantized))


@pytest.mark.parametrize("spec", ["int4:full", "int4:asym", "int3", "int4:block16:full"])
@pytest.mark.parametrize("op", ["Gemm", "Gemm_t", "MatMul", "MatMul_left"])
def test_packed_products(one_layer: Callable[..., Prepared], codes_of: Any, op: str, spec: str) -> None:
    prepared = one_layer(op)
    quantized = Quantized(codes_of(prepared, spec))
    model = emit(prepared, quantized, memory=True)
    assert bool(packed_layers(prepared, quantized)) == any(node.op_type == "MatMulNBits" for node in model.graph)
    check_weights(prepared, quantized, model)


def test_the_graph_is_left_as_it_is(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Gemm")
    quantized = Quantized(codes_of(prepared, "int4:full"))
    for memory in (False, True):
        model = emit(prepared, quantized, memory=memory)
        before = ir.serde.serialize_model(model).SerializeToString(deterministic=True)
        check_weights(prepared, quantized, model)
        assert ir.serde.serialize_model(model).SerializeToString(deterministic=True) == before


def spoil(model: ir.Model, wanted: Callable[[np.ndarray], bool], change: Callable[[np.ndarray], np.ndarray]) -> int:
    """Change every constant that is ``wanted``; returns how many there were."""
    found = 0
    for name, value in model.graph.initializers.items():
        array = value.const_value.numpy() if value.const_value is not None else np.zeros(0)
        if wanted(array):
            value.const_value = ir.tensor(change(array.copy()), name=name)
            found += 1
    return found


def one_more(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] ^= 1
    return array


def a_bit_larger(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[-1] *= np.float32(1.0001)
    return array


@pytest.mark.parametrize(
    ("op", "memory"), [("Conv", False), ("Gemm", False), ("MatMul", False), ("Gemm", True), ("MatMul", True)]
)
@pytest.mark.parametrize("what", ["a scale", "a code"])
def test_planted_mistakes_are_found(
    one_layer: Callable[..., Prepared], codes_of: Any, op: str, memory: bool, what: str
) -> None:
    prepared = one_layer(op, bias=False)
    quantized = Quantized(codes_of(prepared, "int4:full" if memory else "ternary"))
    model = emit(prepared, quantized, memory=memory)
    if what == "a scale":
        channels = prepared.layers[0].channels
        found = spoil(model, lambda a: a.dtype == np.float32 and a.size == channels, a_bit_larger)
    else:
        found = spoil(model, lambda a: a.dtype == np.uint8 and a.size == most_bytes(model), one_more)
    assert found == 1
    with pytest.raises(VerificationError, match=r"l\.weight, node 'l': the file computes another weight"):
        check_weights(prepared, quantized, model)


def most_bytes(model: ir.Model) -> int:
    """The size of the largest array of bytes: the packed weight, and no table."""
    arrays = [v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value is not None]
    return max(array.size for array in arrays if array.dtype == np.uint8)
