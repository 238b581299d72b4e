"""Rows of several formats as packed constants: joined, put in order, and exact wherever they run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from qopt.quant import QuantizedRows, quantize_weight, quantize_whole
from qopt.runtime.patterns import Subgraph, float_weight, has_integer_levels, integer_weight
from qopt.size import Stored, stored_bytes
from qopt.spec import WeightSpec

FORMATS = [
    "int8",
    "int5",
    "int4",
    "int4:mid",
    "int4:max",
    "int3",
    "int2",
    "int2:mid",
    "int1",
    "ternary",
    "log4",
    "log3",
]
FORMS = ["float", "integer", "zero points"]
JOIN = ["Concat", "Cast", "Gather"]


def coded(rows: str, shape: tuple[int, ...], axis: int, seed: int = 0) -> QuantizedRows:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.movedim(axis, 0)[0] = 0
    found = quantize_weight(weight, WeightSpec.parse(f"rows({rows})"), axis)
    assert isinstance(found, QuantizedRows)
    return found


def packed(weight: QuantizedRows, form: str) -> tuple[Subgraph, ir.Value]:
    if form == "float":
        return float_weight("layer", weight)
    return integer_weight("layer", weight, zero_points=form == "zero points")


def model_of(subgraph: Subgraph, value: ir.Value) -> onnx.ModelProto:
    value.type = ir.TensorType(ir.DataType.FLOAT)
    constants = [*subgraph.initializers.values(), *subgraph.tables.values()]
    graph = ir.Graph([], [value], nodes=subgraph.nodes, initializers=constants, name="g", opset_imports={"": 21})
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10))


def in_onnxruntime(proto: onnx.ModelProto, optimise: bool) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: NDArray[Any] = session.run(None, {})[0]
    return result


ROWS = [
    ("int8*2,ternary*3,int4", (6, 4, 3, 3), 0), ("int8,ternary,int8,int4,ternary,int8", (6, 4, 3, 3), 0),
    ("int1,int2,int3,int4", (4, 1, 3, 3), 0), ("int4,int2,int4", (4, 3, 2, 2), 1), ("int4*3", (3, 5, 3), 0),
    ("log4,int4:mid,log4", (7, 3), 1), ("int2,int2:mid,int2:narrow,int2:max", (4, 7), 0), ("int8", (1, 1), 0),
    (",".join(FORMATS), (12, 5), 0), (",".join(FORMATS * 2), (5, 24), 1),
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "shape", "axis"), ROWS)
def test_every_evaluator_finds_the_weight(rows: str, shape: tuple[int, ...], axis: int, form: str) -> None:
    weight = coded(rows, shape, axis)
    proto = model_of(*packed(weight, form))
    expected = weight.dequantize().numpy()
    reference = np.asarray(ReferenceEvaluator(proto).run(None, {})[0])  # type: ignore[index]
    for result in (in_onnxruntime(proto, True), in_onnxruntime(proto, False), reference):
        assert result.dtype == np.float32
        assert result.shape == shape
        assert np.array_equal(result, expected)


@given(
    rows=st.lists(st.sampled_from(FORMATS), min_size=1, max_size=9), columns=st.integers(1, 9), axis=st.integers(0, 1),
    seed=st.integers(0, 2**31), form=st.sampled_from(FORMS),
)  # fmt: skip
@settings(max_examples=60)
def test_any_matrix(rows: list[str], columns: int, axis: int, seed: int, form: str) -> None:
    shape = (columns, len(rows)) if axis else (len(rows), columns)
    weight = coded(",".join(rows), shape, axis, seed)
    assert np.array_equal(in_onnxruntime(model_of(*packed(weight, form)), False), weight.dequantize().numpy())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "shape", "axis"), ROWS)
def test_bytes(rows: str, shape: tuple[int, ...], axis: int, form: str) -> None:
    """Codes, scales, the order and tables are what `qopt.size` says of the grids that were taken; all else are shapes.

    From the spec alone it says no less: it counts the tables of every grid that ``auto`` may take.
    """
    weight = coded(rows, shape, axis)
    subgraph, _ = packed(weight, form)
    held = {**subgraph.initializers, **subgraph.tables}
    values = sum(len(v.const_value.tobytes()) for v in held.values() if v.const_value and v.dtype != ir.DataType.INT64)
    predicted = Stored(int(np.prod(shape)), shape[axis], weight.spec)
    parts = [
        Stored(part.weights, part.channels, part.spec, codes.grid, part.order_bytes)
        for part, codes in zip(predicted.parts, weight.parts, strict=True)
    ]
    assert values == stored_bytes(parts) <= stored_bytes([predicted])
    order = subgraph.initializers.get("layer/order")
    assert (order is not None) == (predicted.parts[0].order_bytes > 0)


@pytest.mark.parametrize(
    ("rows", "form", "ops"),
    [
        ("int8*5", "integer", ["DequantizeLinear"]),
        ("int4*5", "float", ["Cast", "Mul"]),
        ("int8*2,int4:full*3", "integer", ["Cast", "Concat", "DequantizeLinear"]),
        ("int8*2,int4:full*3", "zero points", ["Cast", "Concat", "ConstantOfShape", "DequantizeLinear"]),
        ("int8*2,int4:full*2,int8", "integer", ["Cast", *JOIN, "DequantizeLinear"]),
        ("int4:full,int8,int4:max,int8*2", "float", ["Cast", "Cast", *JOIN, "Cast", "Mul"]),
        ("log4*2,int8,log4*2", "integer", ["Cast", "Gather", *JOIN, "DequantizeLinear"]),
        ("int2,int8*3,int2", "float", ["Cast", "Div", "Mod", "Gather", "Reshape", *JOIN, "Cast", "Mul"]),
    ],
)
def test_nodes(rows: str, form: str, ops: list[str]) -> None:
    """Golden: nothing is joined where there is one part, nothing put in order where the parts lie in order."""
    subgraph, value = packed(coded(rows, (5, 8), 0), form)
    assert [node.op_type for node in subgraph.nodes] == ops
    assert value.name == "layer/dequantized"
    names = [node.name for node in subgraph.nodes]
    assert len(set(names)) == len(names)
    assert all(str(name).startswith("layer/") for name in [*names, *subgraph.initializers])


@pytest.mark.parametrize(("channels", "dtype"), [(256, "UINT8"), (257, "UINT16"), (65537, "INT32")])
def test_the_order_is_stored_in_the_smallest_type(channels: int, dtype: str) -> None:
    weight = coded(f"int1,int8:max*{channels - 2},int1", (channels, 1), 0)
    proto = model_of(*packed(weight, "float"))
    subgraph, _ = packed(weight, "integer")
    assert subgraph.initializers["layer/order"].dtype == ir.DataType[dtype]
    assert np.array_equal(in_onnxruntime(proto, False), weight.dequantize().numpy())


def test_formats_share_their_tables() -> None:
    """The constants that take bytes apart are stored once, however many parts of whatever format need them."""
    subgraph, _ = packed(coded("int2:narrow,int2:full,int2:max", (3, 8), 0), "integer")
    assert set(subgraph.tables) == {"qopt/base4_powers", "qopt/base4", "qopt/int2_levels"}
    assert len([name for name in subgraph.initializers if name.endswith("/codes")]) == 3


def test_all_rows_have_integer_levels() -> None:
    assert has_integer_levels(coded(",".join(FORMATS), (12, 5), 0))
    assert not has_integer_levels(quantize_whole(torch.randn(3, 5), WeightSpec.parse("log5")))


def test_a_wrong_order_would_be_seen() -> None:
    weight = coded("int8*2,int4*2,int8", (5, 8), 0)
    subgraph, value = packed(weight, "float")
    order = subgraph.initializers["layer/order"]
    assert order.const_value is not None
    assert order.const_value.numpy().tolist() == [0, 1, 3, 4, 2]
    order.const_value = ir.tensor(np.array([0, 1, 2, 4, 3], np.uint8), name=order.name)
    found = in_onnxruntime(model_of(subgraph, value), False)
    assert (found != weight.dequantize().numpy()).any(axis=1).tolist() == [False, False, True, False, True]
