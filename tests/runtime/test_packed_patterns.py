"""Packed weights alone: the subgraph computes the weight, in few bytes, wherever it runs."""

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

from qopt.errors import VerificationError
from qopt.quant import QuantizedWeight, quantize_whole
from qopt.runtime.patterns import Subgraph, float_weight, has_integer_levels, integer_weight
from qopt.size import Stored, table_bytes
from qopt.spec import WeightSpec

FORMATS = [f"{kind}{bits}{option}" for kind in ("int", "log") for bits in range(1, 9) for option in ("", ":tensor")]
FORMATS += ["ternary", "ternary:tensor", "int8:full", "int4:narrow"]
FORMATS += [f"int{bits}:{grid}" for bits in (2, 3, 4) for grid in ("full", "mid")]
SHAPES = [
    ((6, 4, 3, 3), 0),
    ((4, 1, 3, 3), 0),
    ((4, 6, 2, 2), 1),
    ((3, 5, 3), 0),
    ((7, 3), 1),
    ((3, 7), 0),
    ((1, 1), 0),
]
FORMS = ["float", "integer", "zero points"]
DIGITS = ["Div", "Mod", "Gather", "Reshape"]
JOIN = ["Cast", "Mul", "ReduceSum"]


def coded(spec: str, shape: tuple[int, ...], axis: int, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight.movedim(axis, 0)[0] = 0
    return quantize_whole(weight, WeightSpec.parse(spec), axis)


def packed(weight: QuantizedWeight, form: str) -> tuple[Subgraph, ir.Value]:
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", FORMATS)
def test_every_evaluator_finds_the_weight(spec: str, form: str) -> None:
    for shape, axis in SHAPES:
        weight = coded(spec, shape, axis)
        if form != "float" and not has_integer_levels(weight):
            continue
        proto = model_of(*packed(weight, form))
        expected = weight.dequantize().numpy()
        reference = np.asarray(ReferenceEvaluator(proto).run(None, {})[0])  # type: ignore[index]
        for result in (in_onnxruntime(proto, True), in_onnxruntime(proto, False), reference):
            assert result.dtype == np.float32
            assert result.shape == shape
            assert np.array_equal(result, expected)


@given(
    spec=st.sampled_from(FORMATS), rows=st.integers(1, 9), columns=st.integers(1, 9), axis=st.integers(0, 1),
    seed=st.integers(0, 2**31), form=st.sampled_from(FORMS),
)  # fmt: skip
@settings(max_examples=60)
def test_any_matrix(spec: str, rows: int, columns: int, axis: int, seed: int, form: str) -> None:
    weight = coded(spec, (rows, columns), axis, seed)
    if form != "float" and not has_integer_levels(weight):
        return
    proto = model_of(*packed(weight, form))
    assert np.array_equal(in_onnxruntime(proto, False), weight.dequantize().numpy())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spec", FORMATS)
def test_bytes(spec: str, form: str) -> None:
    """Codes, scales and tables are what `qopt.size` says; all else are shapes."""
    for shape, axis in SHAPES:
        weight = coded(spec, shape, axis)
        if form != "float" and not has_integer_levels(weight):
            continue
        subgraph, _ = packed(weight, form)
        sizes = {name: held(value) for name, value in {**subgraph.initializers, **subgraph.tables}.items()}
        shapes = {f"layer/{label}" for label in ("shape", "size", "channels")}
        shapes |= {"qopt/flat", "qopt/start", "qopt/last_axis"}
        stored = Stored(int(np.prod(shape)), shape[axis], weight.spec, weight.grid)
        assert sizes["layer/codes"] == stored.code_bytes
        assert sizes["layer/scale"] == stored.bytes - stored.code_bytes
        tables = {name: sizes[name] for name in subgraph.tables if name not in shapes}
        assert sum(tables.values()) == table_bytes(weight.spec, weight.grid) <= table_bytes(weight.spec)
        assert set(tables) <= set(subgraph.tables)
        assert set(sizes) - set(tables) - {"layer/codes", "layer/scale"} <= shapes


def held(value: ir.Value) -> int:
    assert value.const_value is not None
    return len(value.const_value.tobytes())


@pytest.mark.parametrize(
    ("spec", "form", "ops"),
    [
        ("int8", "integer", ["DequantizeLinear"]),
        ("int8", "zero points", ["ConstantOfShape", "DequantizeLinear"]),
        ("int8", "float", ["Cast", "Mul"]),
        ("int4", "integer", ["Cast", "DequantizeLinear"]),
        ("int4:mid", "float", ["Cast", "Gather", "Cast", "Mul"]),
        ("int3", "integer", [*JOIN, *DIGITS, "DequantizeLinear"]),
        ("log4", "integer", ["Cast", "Gather", "DequantizeLinear"]),
        ("log3", "float", [*JOIN, *DIGITS, "Cast", "Mul"]),
        ("log6", "float", ["Cast", "Gather", "Mul"]),
        ("int1", "integer", ["Cast", *DIGITS, "DequantizeLinear"]),
        ("ternary", "integer", ["Cast", *DIGITS, "DequantizeLinear"]),
        ("int2", "integer", ["Cast", *DIGITS, "DequantizeLinear"]),
        ("log2", "float", ["Cast", *DIGITS, "Cast", "Mul"]),
    ],
)
def test_nodes(spec: str, form: str, ops: list[str]) -> None:
    """Golden: what the module's table says, for sizes that fill their bytes."""
    subgraph, value = packed(coded(spec, (5, 8), 0), form)
    assert [node.op_type for node in subgraph.nodes] == ops
    assert value is subgraph.nodes[-1].outputs[0]
    assert value.name == "layer/dequantized"
    names = [node.name for node in subgraph.nodes]
    assert len(set(names)) == len(names)
    assert all(str(name).startswith("layer/") for name in names)


def test_a_last_byte_that_is_not_full_is_cut() -> None:
    for spec, shape in (("int1", (2, 1)), ("ternary", (2, 1)), ("int2", (3, 1)), ("int3", (2, 3))):
        subgraph, _ = packed(coded(spec, (3, 3), 0), "integer")
        operators = [n.op_type for n in subgraph.nodes]
        assert operators[-5:] == ["Gather", "Reshape", "Slice", "Reshape", "DequantizeLinear"]
        codes = subgraph.initializers["layer/codes"].const_value
        assert codes is not None
        assert codes.numpy().shape == shape


def test_codes_are_stored_in_their_container() -> None:
    types = {
        "int8": "INT8",
        "int5": "INT8",
        "int4": "INT4",
        "int3": "UINT8",
        "int4:mid": "UINT4",
        "ternary": "UINT8",
        "log4": "UINT4",
        "log5": "UINT8",
        "int1": "UINT8",
    }
    for spec, name in types.items():
        subgraph, _ = packed(coded(spec, (4, 4), 0), "float")
        assert subgraph.initializers["layer/codes"].dtype == ir.DataType[name]


def test_tables_by_hand() -> None:
    """Two's complement digits; signs; the log table; the odd numbers."""
    levels = {
        "int1": ("binary", [1, -1]), "ternary": ("ternary", [0, 1, -1]), "int2:full": ("int2:full", [0, 1, -2, -1]),
        "log2": ("log2", [0, 64, -64, 0]), "int3:narrow": ("int3", [0, 1, 2, 3, -4, -3, -2, -1]),
        "int2:mid": ("mid2", [-3, -1, 1, 3]),
    }  # fmt: skip
    for spec, (name, expected) in levels.items():
        subgraph, _ = packed(coded(spec, (4, 4), 0), "integer")
        table = subgraph.tables[f"qopt/{name.split(':')[0]}_levels"].const_value
        assert table is not None
        assert table.numpy().dtype == np.int8
        assert table.numpy().tolist() == expected


def test_a_code_that_the_format_does_not_have_is_refused() -> None:
    """A planted mistake: -4 in a ternary weight would come out as -1."""
    weight = coded("ternary", (4, 5), 0)
    weight.codes[1, 2] = -4
    with pytest.raises(VerificationError, match="layer: codes that are no levels"):
        packed(weight, "integer")


def test_low_bits_cost_their_bits() -> None:
    """Codes and constants of a matrix of 64 x 64, in bytes."""
    for spec, bits in (("int1", 1), ("ternary", 1.6), ("int2", 2), ("int3", 3), ("int4", 4)):
        subgraph, _ = packed(coded(spec, (64, 64), 0), "integer")
        everything = sum(held(v) for v in {**subgraph.initializers, **subgraph.tables}.values())
        assert everything <= bits * 4096 / 8 + 64 * 4 + 100


def test_integer_levels() -> None:
    assert {spec: has_integer_levels(coded(spec, (4, 4), 0)) for spec in ("int1", "int8", "log1", "log4", "log5")} == {
        "int1": True, "int8": True, "log1": True, "log4": True, "log5": False,
    }  # fmt: skip
