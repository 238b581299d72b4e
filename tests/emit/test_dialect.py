"""The plain-QDQ dialect: codes in one initializer straight into DequantizeLinear, the same numbers as folding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from qopt.emit import check_shipped, emit, fused_layers
from qopt.errors import PlanError, VerificationError
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.kernels import count_kernels
from qopt.runtime.session import to_bytes

CONTAINERS = [
    ("int1", "INT4"), ("int2", "INT4"), ("int3:max", "INT4"), ("int4:full", "INT4"), ("int4:tensor:full", "INT4"),
    ("int2:mid", "INT4"), ("int3:mid", "INT4"), ("int4:mid", "INT8"), ("ternary", "INT4"), ("int5", "INT8"),
    ("int8", "INT8"), ("int8:tensor:max", "INT8"), ("log2", "INT8"), ("log4", "INT8"), ("int3:asym", "UINT4"),
    ("int4:asym", "UINT4"), ("int8:asym:tensor", "UINT8"), ("int6:asym", "UINT8"),
]  # fmt: skip
OPERATORS = ["Conv", "grouped", "Conv1d", "ConvTranspose", "Gemm", "Gemm_t", "MatMul"]


def plain(prepared: Prepared, quantized: Quantized) -> ir.Model:
    return emit(prepared, quantized, dialect="qdq")


def weight_nodes(model: ir.Model) -> list[str]:
    """The operators between the constants and the layer's weight."""
    node = next(n for n in model.graph if n.name == "l")
    value, found = node.inputs[1], []
    while value is not None and value.producer() is not None:
        producer = value.producer()
        assert producer is not None
        found.append(producer.op_type)
        value = producer.inputs[0]
    return found


def stored(model: ir.Model, name: str = "l.weight/codes") -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize(("spec", "container"), CONTAINERS)
def test_one_initializer_and_the_same_numbers(
    one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any, op: str, spec: str, container: str
) -> None:
    prepared = one_layer(op)
    quantized = Quantized(codes_of(prepared, spec))
    model = plain(prepared, quantized)
    assert weight_nodes(model) == ["DequantizeLinear"]
    assert stored(model).dtype == ir.DataType[container]
    assert tuple(stored(model).shape) == prepared.layers[0].shape
    feed = {"x": images(prepared)}
    expected = evaluate(emit(prepared, quantized), feed, "logits")
    np.testing.assert_allclose(evaluate(model, feed, "logits"), expected, rtol=1e-5, atol=1e-5)
    check_shipped(prepared, quantized, to_bytes(model))


BLOCKS = [
    ("Gemm", "int4:block8", []), ("Gemm_t", "int4:block8", []), ("MatMul", "int2:block16", []),
    ("MatMul", "int4:asym:block8", []), ("Gemm", "int8:asym:block16", []),
    ("Conv", "int4:block12", ["Reshape"]), ("grouped", "int8:block9", ["Reshape"]),
    ("ConvTranspose", "int4:block12", ["Transpose", "Reshape"]),
]  # fmt: skip


@pytest.mark.parametrize(("op", "spec", "behind"), BLOCKS)
def test_blocks(
    one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any, op: str, spec: str, behind: list[str]
) -> None:
    prepared = one_layer(op)
    quantized = Quantized(codes_of(prepared, spec))
    model = plain(prepared, quantized)
    assert weight_nodes(model) == [*behind, "DequantizeLinear"]
    onnx.checker.check_model(to_bytes(model), full_check=True)
    feed = {"x": images(prepared)}
    for how in ("plain", "all"):
        np.testing.assert_allclose(
            evaluate(model, feed, "logits"), evaluate(emit(prepared, quantized), feed, "logits", how), 1e-5, 1e-5
        )


def test_rows_of_several_formats(one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any) -> None:
    prepared = one_layer("Gemm")
    for spec, container in (("rows(int4*2,ternary*8)", "INT4"), ("rows(ternary*5,int8,log4*4)", "INT8")):
        quantized = Quantized(codes_of(prepared, spec))
        model = plain(prepared, quantized)
        assert stored(model).dtype == ir.DataType[container]
        feed = {"x": images(prepared)}
        expected = evaluate(emit(prepared, quantized), feed, "logits")
        np.testing.assert_allclose(evaluate(model, feed, "logits"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["log5", "log8"])
def test_float_levels_are_refused(one_layer: Callable[..., Prepared], codes_of: Any, spec: str) -> None:
    prepared = one_layer("Gemm")
    with pytest.raises(PlanError, match="plain QDQ") as caught:
        plain(prepared, Quantized(codes_of(prepared, spec)))
    assert caught.value.where == "l.weight"


def activated(prepared: Prepared, codes: Any) -> Quantized:
    code = AffineRange.from_bounds(-3.0, 3.0, 8)
    return Quantized(codes, {}, {"x": code, "y": code})


@pytest.mark.parametrize("op", ["Conv", "Gemm", "Gemm_t", "MatMul"])
@pytest.mark.parametrize(("spec", "fuses"), [("int8", True), ("log4", True), ("int4", False), ("ternary", False)])
def test_what_fuses_is_what_is_said_to(
    one_layer: Callable[..., Prepared], codes_of: Any, evaluate: Any, images: Any, op: str, spec: str, fuses: bool
) -> None:
    prepared = one_layer(op)
    quantized = activated(prepared, codes_of(prepared, spec))
    model = plain(prepared, quantized)
    assert fused_layers(prepared, quantized, "folding") == {"l.weight"}
    assert bool(fused_layers(prepared, quantized, "qdq")) == fuses
    assert count_kernels(to_bytes(model)).integer == fuses
    feed = {"x": images(prepared)}
    got, expected = (evaluate(m, feed, "logits") for m in (model, emit(prepared, quantized)))
    np.testing.assert_allclose(got, expected, atol=2.1 * 6 / 255, rtol=0)  # a code here or there


def test_a_file_whose_codes_became_float_is_found(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    prepared = one_layer("Gemm")
    quantized = Quantized(codes_of(prepared, "int4"))
    proto = onnx.load_model_from_string(to_bytes(plain(prepared, quantized)))
    tensor = next(t for t in proto.graph.initializer if t.name == "l.weight/codes")
    values = np.zeros(prepared.layers[0].shape, np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    assert tensor.data_type == TensorProto.FLOAT
    with pytest.raises(VerificationError, match="not quantized in the file that ships"):
        check_shipped(prepared, quantized, proto.SerializeToString())
