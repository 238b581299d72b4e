"""The declared opset comes down as far as the graph means the same, and no further."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qopt.emit import emit, lower_opset
from qopt.emit.opset import CHANGED, OLDEST, lowest_opset
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.session import to_bytes

X = np.random.default_rng(0).standard_normal((2, 4, 6, 6)).astype(np.float32)


def single(op: str, inputs: list[str], opset: int = 21, outputs: int = 1, **attributes: Any) -> ir.Model:
    constants = {
        "axes": np.array([1], np.int64), "shape": np.array([2, -1], np.int64), "scale": np.float32(0.1),
        "zero": np.int8(0), "parts": np.array([1, 3], np.int64), "sizes": np.array([2, 4, 3, 3], np.int64),
        "vector": np.ones(4, np.float32),
        "group": np.ones(4, np.float32), "low": np.float32(-1), "high": np.float32(1),
    }  # fmt: skip
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, inputs, names, name="n", **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 6, 6])],
        [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in names],
        [numpy_helper.from_array(np.asarray(constants[name]), name) for name in inputs if name in constants],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


CASES: list[tuple[int, str, list[str], dict[str, Any]]] = [
    (13, "Relu", ["x"], {}),
    (13, "Softmax", ["x"], {"axis": 1}),
    (13, "Reshape", ["x", "shape"], {}),
    (14, "Reshape", ["x", "shape"], {"allowzero": 1}),
    (13, "ReduceSum", ["x", "axes"], {}),
    (18, "ReduceMean", ["x", "axes"], {}),
    (13, "ReduceMean", ["x"], {}),
    (13, "Split", ["x", "parts"], {"axis": 1}),
    (18, "Split", ["x"], {"axis": 1, "num_outputs": 2}),
    (13, "QuantizeLinear", ["x", "scale", "zero"], {}),
    (21, "QuantizeLinear", ["x", "scale", "zero"], {"output_dtype": TensorProto.INT8}),
    (13, "Shape", ["x"], {}),
    (15, "Shape", ["x"], {"start": 1}),
    (20, "Gelu", ["x"], {}),
    (17, "LayerNormalization", ["x", "vector"], {"axis": 1}),
    (13, "Clip", ["x", "low", "high"], {}),
    (19, "AveragePool", ["x"], {"kernel_shape": [2, 2]}),
    (21, "GroupNormalization", ["x", "group", "group"], {"num_groups": 2}),
    (19, "Resize", ["x", "", "", "sizes"], {}),
]


@pytest.mark.parametrize(("oldest", "op", "inputs", "attributes"), CASES, ids=lambda c: str(c) if c else "")
def test_the_oldest_opset_of_one_node(oldest: int, op: str, inputs: list[str], attributes: dict[str, Any]) -> None:
    model = single(op, inputs, outputs=2 if op == "Split" else 1, **attributes)
    assert lowest_opset(model) == oldest


@pytest.mark.parametrize("op", sorted(CHANGED))
def test_what_changed_its_meaning_stays_at_its_own_version(op: str) -> None:
    schema = onnx.defs.get_schema(op, 21, "")
    model = ir.Model(ir.Graph([], [], nodes=[ir.node(op, [ir.Value(name="x")])], opset_imports={"": 21}), ir_version=10)
    assert lowest_opset(model) == max(schema.since_version, OLDEST)


@pytest.mark.parametrize(
    ("spec", "activations", "expected"),
    [("int8", True, 13), ("int8", False, 13), ("int3", True, 13), ("ternary", False, 13), ("int8:tensor", True, 13),
     ("int4", True, 21), ("log4", False, 21), ("int8:block8", False, 13)],
)  # fmt: skip
def test_formats_decide_in_the_folding_dialect(
    one_layer: Callable[..., Prepared], codes_of: Any, images: Any, spec: str, activations: bool, expected: int
) -> None:
    prepared = one_layer("Gemm")
    code = AffineRange.from_bounds(-3.0, 3.0, 8)
    quantized = Quantized(codes_of(prepared, spec), {}, {"x": code, "y": code} if activations else {})
    model = emit(prepared, quantized)
    feeds = {"x": images(prepared)}
    lowered = lower_opset(model, feeds)
    assert lowered.opset_imports[""] == expected
    assert (lowered is model) == (expected == 21)
    assert model.opset_imports[""] == 21
    onnx.checker.check_model(to_bytes(lowered), full_check=True)
    assert lowered.ir_version == (10 if expected == 21 else 7)


@pytest.mark.parametrize(
    ("spec", "expected"), [("int8", 13), ("int8:asym", 13), ("int4", 21), ("int8:block8", 21), ("int8:tensor", 13)]
)
def test_formats_decide_in_plain_qdq(
    one_layer: Callable[..., Prepared], codes_of: Any, images: Any, evaluate: Any, spec: str, expected: int
) -> None:
    prepared = one_layer("MatMul")
    model = emit(prepared, Quantized(codes_of(prepared, spec)), dialect="qdq")
    feeds = {"x": images(prepared)}
    lowered = lower_opset(model, feeds)
    assert lowered.opset_imports[""] == expected
    for how in ("plain", "all"):
        np.testing.assert_array_equal(evaluate(lowered, feeds, "logits", how), evaluate(model, feeds, "logits", how))


def test_a_graph_that_means_something_else_lower_down_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before opset 13 a Softmax flattened all behind its axis: the signature is the same, the outputs are not."""
    monkeypatch.setattr("qopt.emit.opset.OLDEST", 11)
    model = single("Softmax", ["x"], axis=1)
    assert lowest_opset(model) == 11
    assert lower_opset(model, {"x": X}) is model
    last = single("Softmax", ["x"], axis=3)
    assert lower_opset(last, {"x": X}).opset_imports[""] == 11


def test_names_metadata_and_outputs_survive(one_layer: Callable[..., Prepared], codes_of: Any, images: Any) -> None:
    prepared = one_layer("Conv", after="Relu")
    model = emit(prepared, Quantized(codes_of(prepared, "int8")), metadata={"qopt.plan": "abc"})
    lowered = lower_opset(model, {"x": images(prepared)})
    assert lowered.opset_imports[""] == 13
    assert dict(lowered.metadata_props) == {"qopt.plan": "abc"}
    assert [n.name for n in lowered.graph] == [n.name for n in model.graph]
    layer = next(n for n in lowered.graph if n.name == "l")
    assert layer.metadata_props["qopt.layer"] == "l.weight"
