"""What prepare refuses: the right error, one line, naming the place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qopt.errors import CorruptModelError, ModelError, UnsupportedModelError
from qopt.graph.prepare import prepare

Make = Callable[[Any], onnx.ModelProto]


def _flat(g: Any, data: str = "x") -> onnx.ModelProto:
    proto: onnx.ModelProto = g.proto(g.op("Flatten", data))
    return proto


def _no_input(g: Any) -> onnx.ModelProto:
    proto = _flat(g, g.random(2, 3))
    del proto.graph.input[:]
    return proto


def _input_of(kind: int) -> Make:
    def make(g: Any) -> onnx.ModelProto:
        proto: onnx.ModelProto = g.proto(g.op("Identity", "x"))
        for value in (*proto.graph.input, *proto.graph.output):
            value.type.tensor_type.elem_type = kind
        return proto

    return make


def _unknown_rank(g: Any) -> onnx.ModelProto:
    proto = _flat(g)
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    return proto


def _sequence(g: Any) -> onnx.ModelProto:
    proto: onnx.ModelProto = g.proto(g.op("ConcatFromSequence", "x", axis=0))
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, [2, 2])
    proto.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(element))
    return proto


def _image_shape(*dims: int | str | None) -> Make:
    def make(g: Any) -> onnx.ModelProto:
        proto = _flat(g)
        proto.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, dims))
        return proto

    return make


def _no_output(g: Any) -> onnx.ModelProto:
    proto = _flat(g)
    del proto.graph.output[:]
    return proto


def _image_is_output(g: Any) -> onnx.ModelProto:
    proto = _flat(g)
    proto.graph.output[0].CopyFrom(proto.graph.input[0])
    return proto


def _if(g: Any) -> onnx.ModelProto:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])], "b", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    condition = g.constant(True, dtype=np.bool_)
    return _flat(g, g.op("If", condition, name="branch", then_branch=branch, else_branch=branch))


def _loop(g: Any) -> onnx.ModelProto:
    outputs = [
        helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
        helper.make_tensor_value_info("s2", TensorProto.FLOAT, None),
    ]
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("c", TensorProto.BOOL, []),
        helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
    ]
    nodes = [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Neg", ["s"], ["s2"])]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    count = g.constant(2**62, dtype=np.int64)
    return _flat(g, g.op("Loop", count, g.constant(True, dtype=np.bool_), "x", name="forever", body=body))


def _foreign(g: Any) -> onnx.ModelProto:
    proto = _flat(g, g.op("Fancy", "x", domain="com.example", name="f"))
    proto.opset_import.append(helper.make_opsetid("com.example", 1))
    return proto


def _opset(number: int | None) -> Make:
    def make(g: Any) -> onnx.ModelProto:
        proto = _flat(g)
        del proto.opset_import[:]
        if number is not None:
            proto.opset_import.append(helper.make_opsetid("", number))
        return proto

    return make


def _cycle(g: Any) -> onnx.ModelProto:
    g.nodes.append(helper.make_node("Add", ["x", "b"], ["a"], name="first"))
    g.nodes.append(helper.make_node("Neg", ["a"], ["b"], name="second"))
    return _flat(g, "b")


def _constant_with(value: float, op: str) -> Make:
    def make(g: Any) -> onnx.ModelProto:
        array = np.ones((3, 8, 8))
        array[0, 0, 0] = value
        inputs = ["x", g.constant(array, "broken")]
        return _flat(g, g.op(op, *inputs))

    return make


def _constant_node(g: Any) -> onnx.ModelProto:
    tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [float("nan")])
    return _flat(g, g.op("Mul", "x", g.op("Constant", value=tensor)))


def _trained_dropout(g: Any) -> onnx.ModelProto:
    return _flat(g, g.op("Dropout", "x", g.constant(0.5), g.constant(True, dtype=np.bool_)))


REJECTED: dict[str, tuple[Make, type[ModelError], str]] = {
    "no input": (_no_input, UnsupportedModelError, "must have an input (got none)"),
    "a sequence": (_sequence, UnsupportedModelError, "input 'x': not a tensor with a known number of axes"),
    "unknown rank": (_unknown_rank, UnsupportedModelError, "input 'x': not a tensor with a known number of axes"),
    "text": (_input_of(TensorProto.STRING), ModelError, "input"),
    "empty batch": (_image_shape(0, 3, 8, 8), UnsupportedModelError, "impossible size"),
    "2^42 pixels": (_image_shape("n", 2**21, 2**21), UnsupportedModelError, "impossible size"),
    "no output": (_no_output, CorruptModelError, "no outputs"),
    "input is output": (_image_is_output, UnsupportedModelError, "not computed by the graph"),
    "If": (_if, UnsupportedModelError, "node 'branch': control flow operator If"),
    "Loop": (_loop, UnsupportedModelError, "node 'forever': control flow operator Loop"),
    "domain": (_foreign, UnsupportedModelError, "node 'f': operator Fancy of the unknown domain 'com.example'"),
    "operator": (lambda g: _flat(g, g.op("Fancy", "x", name="f")), UnsupportedModelError, "unknown operator Fancy"),
    "nameless": (
        lambda g: _flat(g, g.op("Fancy", "x", name="")), UnsupportedModelError, "the node that computes 'v1': unknown",
    ),
    "opset 999": (_opset(999), UnsupportedModelError, "unknown opset"),
    "opset 0": (_opset(0), UnsupportedModelError, "unknown opset"),
    "no opset": (_opset(None), CorruptModelError, "declares no opset"),
    "noise": (lambda g: _flat(g, g.op("RandomNormalLike", "x")), UnsupportedModelError, "draws random numbers"),
    "dropout": (_trained_dropout, UnsupportedModelError, "Dropout in training mode"),
    "norm": (
        lambda g: _flat(g, g.norm("x", 3, training_mode=1)), UnsupportedModelError, "BatchNormalization in training",
    ),
    "cycle": (_cycle, CorruptModelError, "depend on each other in a circle"),
    "dangling": (lambda g: _flat(g, g.op("Add", "x", "nothing")), CorruptModelError, "not a valid ONNX graph"),
    "attribute": (lambda g: _flat(g, g.op("Relu", "x", slope=1.0)), CorruptModelError, "not a valid ONNX graph"),
    "NaN": (_constant_with(np.nan, "Mul"), CorruptModelError, "'broken': the constant holds NaN"),
    "NaN mask": (_constant_with(np.nan, "Max"), CorruptModelError, "'broken': the constant holds NaN"),
    "infinity": (_constant_with(np.inf, "Mul"), CorruptModelError, "'broken': the constant holds infinity"),
    "NaN in a node": (_constant_node, CorruptModelError, "the constant holds NaN"),
    "shapes that clash": (
        lambda g: g.proto(g.op("Gemm", g.op("Flatten", "x"), g.random(7, 4))), ModelError, "Gemm",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_rejected(case: str, graph: Any) -> None:
    make, kind, message = REJECTED[case]
    model = ir.serde.deserialize_model(make(graph()))
    with pytest.raises(kind) as caught:
        prepare(model)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op", ["Max", "Min"])
def test_infinite_bounds_and_masks_are_no_broken_weights(op: str, graph: Any) -> None:
    value = -np.inf if op == "Max" else np.inf
    prepare(ir.serde.deserialize_model(_constant_with(value, op)(graph())))


def test_unsorted_nodes_are_sorted(graph: Any) -> None:
    g = graph()
    proto = _flat(g, g.op("Relu", g.op("Neg", "x")))
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    prepared = prepare(ir.serde.deserialize_model(proto))
    assert [node.op_type for node in prepared.model.graph] == ["Neg", "Relu", "Flatten"]
