"""Scales per block and zero points as packed constants: exact wherever they run, and folded to plain float weights."""

from __future__ import annotations

from pathlib import Path
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
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from qopt.quant import QuantizedWeight, quantize_whole
from qopt.runtime.patterns import Subgraph, float_weight, has_integer_levels
from qopt.size import Stored, stored_bytes, table_bytes
from qopt.spec import WeightSpec

BLOCKS = [f"{kind}{bits}:block8" for kind in ("int", "log") for bits in range(1, 9)]
BLOCKS += ["ternary:block8", "int2:block8:mid", "int3:block24:mid", "int4:block8:mid", "int3:block12:full"]
ASYMMETRIC = [f"int{bits}{shared}:asym" for bits in range(2, 9) for shared in ("", ":tensor", ":block8")]
FORMATS = [*BLOCKS, *ASYMMETRIC, "int4:block24:max:asym"]
SHAPES = [((6, 8, 3, 3), 0), ((8, 5, 3, 1), 1), ((3, 24), 0), ((24, 7), 1), ((4, 3, 6, 2), 1), ((2, 24, 3), 2)]
DIGITS = ["Cast", "Div", "Mod", "Gather", "Reshape"]


def coded(spec: str, shape: tuple[int, ...], axis: int, seed: int = 0) -> QuantizedWeight | None:
    """A weight with a channel of zeros; None where the blocks do not fill its channels."""
    parsed, weight = WeightSpec.parse(spec), torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    weight.movedim(axis, 0)[0] = 0
    if parsed.block and weight.numel() // shape[axis] % parsed.block:
        return None
    return quantize_whole(weight, parsed, axis)


def model_of(subgraph: Subgraph, value: ir.Value, shape: tuple[int, ...] | None = None) -> onnx.ModelProto:
    """The weight alone, or added to an input of ``shape``."""
    value.type = ir.TensorType(ir.DataType.FLOAT)
    inputs, nodes, output = [], list(subgraph.nodes), value
    if shape is not None:
        inputs = [ir.Value(name="x", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))]
        added = ir.node("Add", [inputs[0], value], name="added")
        output = added.outputs[0]
        output.name, output.type = "y", ir.TensorType(ir.DataType.FLOAT)
        nodes.append(added)
    constants = [*subgraph.initializers.values(), *subgraph.tables.values()]
    graph = ir.Graph(inputs, [output], nodes=nodes, initializers=constants, name="g", opset_imports={"": 21})
    return ir.serde.serialize_model(ir.Model(graph, ir_version=10))


def session(proto: onnx.ModelProto, optimise: bool, folded: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folded is not None:
        options.optimized_model_filepath = str(folded)
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def in_onnxruntime(proto: onnx.ModelProto, optimise: bool) -> NDArray[Any]:
    result: NDArray[Any] = session(proto, optimise).run(None, {})[0]
    return result


@pytest.mark.parametrize("spec", FORMATS)
def test_every_evaluator_finds_the_weight(spec: str) -> None:
    seen = 0
    for shape, axis in SHAPES:
        weight = coded(spec, shape, axis)
        if weight is None:
            continue
        seen += 1
        proto = model_of(*float_weight("layer", weight))
        expected = weight.dequantize().numpy()
        reference = np.asarray(ReferenceEvaluator(proto).run(None, {})[0])  # type: ignore[index]
        for result in (in_onnxruntime(proto, True), in_onnxruntime(proto, False), reference):
            assert result.dtype == np.float32
            assert result.shape == shape
            assert np.array_equal(result, expected)
    assert seen >= 3


@given(
    spec=st.sampled_from(FORMATS), rows=st.integers(1, 6), blocks=st.integers(1, 3), axis=st.integers(0, 1),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60)
def test_any_matrix(spec: str, rows: int, blocks: int, axis: int, seed: int) -> None:
    columns = (WeightSpec.parse(spec).block or 5) * blocks
    weight = coded(spec, (columns, rows) if axis else (rows, columns), axis, seed)
    assert weight is not None
    proto = model_of(*float_weight("layer", weight))
    assert np.array_equal(in_onnxruntime(proto, False), weight.dequantize().numpy())


@pytest.mark.parametrize("spec", FORMATS)
def test_it_folds_to_a_plain_float_weight(spec: str, tmp_path: Path) -> None:
    """What stock ONNX Runtime keeps after loading: one Add, and the weight as float32 numbers."""
    for shape, axis in (((6, 8, 3, 1), 0), ((24, 7), 1)):
        weight = coded(spec, shape, axis)
        assert weight is not None
        proto, path = model_of(*float_weight("layer", weight), shape=shape), tmp_path / "folded.onnx"
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        found = session(proto, True, path).run(None, {"x": x})[0]
        expected = weight.dequantize().numpy()
        assert np.array_equal(found, x + expected)
        graph = onnx.load(path).graph
        assert [node.op_type for node in graph.node] == ["Add"]
        (constant,) = graph.initializer
        assert constant.data_type == onnx.TensorProto.FLOAT
        assert np.array_equal(numpy_helper.to_array(constant), expected)


def held(value: ir.Value) -> int:
    assert value.const_value is not None
    return len(value.const_value.tobytes())


@pytest.mark.parametrize("spec", FORMATS)
def test_bytes(spec: str) -> None:
    """Codes, scales, zero points and tables are what `qopt.size` says; all else are shapes."""
    for shape, axis in SHAPES:
        weight = coded(spec, shape, axis)
        if weight is None:
            continue
        subgraph, _ = float_weight("layer", weight)
        constants = {**subgraph.initializers, **subgraph.tables}
        sizes = {name: held(value) for name, value in constants.items() if value.dtype != ir.DataType.INT64}
        sizes |= {"qopt/last_axis": 0} if "qopt/last_axis" in subgraph.tables else {}
        stored = Stored(int(np.prod(shape)), shape[axis], weight.spec, weight.grid)
        assert sizes["layer/codes"] == stored.code_bytes
        assert sizes["layer/scale"] == 4 * stored.scales == 4 * weight.scale.numel()
        assert sizes.get("layer/zero", 0) == (stored.scales if weight.zero is not None else 0)
        assert sum(sizes.values()) == stored_bytes([stored])
        assert stored.bytes == stored.code_bytes + sizes["layer/scale"] + sizes.get("layer/zero", 0)
        assert table_bytes(weight.spec, weight.grid) <= table_bytes(weight.spec)


@pytest.mark.parametrize(
    ("spec", "axis", "ops"),
    [
        ("int8:block8", 0, ["Cast", "Mul", "Reshape"]),
        ("int8:block8", 1, ["Cast", "Mul", "Reshape", "Transpose"]),
        ("int4:block8:narrow", 0, ["Cast", "Mul", "Reshape"]),
        ("int4:block8:mid", 0, ["Cast", "Gather", "Cast", "Mul", "Reshape"]),
        ("log6:block8", 1, ["Cast", "Gather", "Mul", "Reshape", "Transpose"]),
        ("ternary:block8", 0, [*DIGITS[:-1], "Reshape", "Slice", "Reshape", "Cast", "Mul", "Reshape"]),
        ("int2:block8", 0, [*DIGITS, "Cast", "Mul", "Reshape"]),
        ("int8:asym", 0, ["Cast", "Cast", "Sub", "Mul"]),
        ("int4:asym", 1, ["Cast", "Cast", "Sub", "Mul"]),
        ("int2:asym", 0, ["Cast", "Div", "Mod", "Reshape", "Cast", "Cast", "Sub", "Mul"]),
        ("int4:block8:asym", 1, ["Cast", "Cast", "Sub", "Mul", "Reshape", "Transpose"]),
    ],
)
def test_nodes(spec: str, axis: int, ops: list[str]) -> None:
    """Golden: what the module's table says."""
    weight = coded(spec, (8, 8), axis)
    assert weight is not None
    subgraph, value = float_weight("layer", weight)
    assert [node.op_type for node in subgraph.nodes] == ops
    assert value is subgraph.nodes[-1].outputs[0]
    assert value.name == "layer/dequantized"
    names = [node.name for node in subgraph.nodes]
    assert len(set(names)) == len(names)
    assert all(str(name).startswith("layer/") for name in names)


def test_codes_and_zero_points_are_stored_in_their_containers() -> None:
    types = {"int8:asym": "UINT8", "int5:asym": "UINT8", "int4:asym": "UINT4", "int3:asym": "UINT8",
             "int4:block8:asym": "UINT4", "int4:block8:full": "INT4", "int8:block8": "INT8"}  # fmt: skip
    for spec, name in types.items():
        weight = coded(spec, (4, 8), 0)
        assert weight is not None
        constants = float_weight("layer", weight)[0].initializers
        assert constants["layer/codes"].dtype == ir.DataType[name]
        assert ("layer/zero" in constants) == ("asym" in spec)
        if "asym" in spec:
            assert constants["layer/zero"].dtype == ir.DataType.UINT8


def test_no_integer_kernel_takes_them() -> None:
    for spec in FORMATS:
        weight = coded(spec, (24, 24), 0)
        assert weight is not None
        assert not has_integer_levels(weight)


def test_blocks_that_lie_elsewhere_are_seen() -> None:
    """A planted mistake: the scales of two blocks changed over."""
    weight = coded("int4:block8", (3, 16), 0)
    assert weight is not None
    expected = weight.dequantize().numpy()
    weight.scale[1] = weight.scale[1].flip(0)
    found = in_onnxruntime(model_of(*float_weight("layer", weight)), True)
    assert not np.array_equal(found[1], expected[1])
    assert np.array_equal(found[[0, 2]], expected[[0, 2]])
