"""A file that quantizes weights alone is held to the same weights in float, and to the user's graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qopt.emit import check_weight_only, dequantized, emit
from qopt.errors import VerificationError
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.quantized import Quantized
from qopt.plan import uniform
from qopt.quantize import WeightOnly
from qopt.runtime.session import to_bytes
from qopt.spec import WeightSpec

Text = Callable[..., onnx.ModelProto]
TEXT = """
g (int64[b, s] ids, int64[b, s] mask) => (float[b, s, 30] scores, float[b, s, 16] hidden) {
    words = Gather(table, ids)
    m = Cast<to = 1>(mask)
    column = Unsqueeze(m, axis)
    kept = Mul(words, column)
    inner = MatMul(kept, up)
    shifted = Add(inner, shift)
    hidden = Relu(shifted)
    back = MatMul(hidden, down)
    turned = Transpose<perm = [1, 0]>(table)
    scores = MatMul(back, turned)
}
"""


@pytest.fixture(scope="module")
def network(text_model: Text) -> Prepared:
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.standard_normal(shape).astype(np.float32)
        for name, shape in {"table": (30, 8), "up": (8, 16), "shift": (16,), "down": (16, 8)}.items()
    }
    return prepare(ir.from_proto(text_model(TEXT, axis=np.array([2]), **arrays)))


def _quantized(network: Prepared, spec: str) -> Quantized:
    return WeightOnly(network).apply(uniform(WeightSpec.parse(spec))).quantized


def _run(model: ir.Model, feeds: Any) -> list[Any]:
    """An oracle that shares no code with qopt."""
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    return list(session.run(None, dict(feeds)))


FORMATS = ["int1", "int2", "int3", "int4", "int4:max", "int8", "log4", "ternary", "int4:tensor", "int4:block8"]


@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_of_an_embedding_and_its_output_layer(spec: str, network: Prepared) -> None:
    quantized = _quantized(network, spec)
    assert set(quantized.weights) == {"table", "up", "down"}
    model = emit(network, quantized)
    check_weight_only(network, quantized, model, to_bytes(model))
    found, expected = (_run(m, network.example) for m in (model, dequantized(network, quantized)))
    for one, other in zip(found, expected, strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_network_in_float_holds_the_quantized_values(network: Prepared) -> None:
    quantized = _quantized(network, "int2")
    model = dequantized(network, quantized)
    for layer in network.layers:
        value = model.graph.initializers[layer.initializer].const_value
        assert value is not None
        assert np.array_equal(value.numpy(), quantized.weights[layer.name].dequantize().numpy())
        assert not np.array_equal(value.numpy(), network.initializer(layer.initializer))


def test_a_tied_table_is_stored_once(network: Prepared) -> None:
    model = emit(network, _quantized(network, "int4"))
    stored = [value for name, value in model.graph.initializers.items() if name.startswith("table")]
    assert sorted(str(value.name) for value in stored) == ["table/codes", "table/scale"]
    gather = next(node for node in model.graph if node.op_type == "Gather" and node.inputs[1].name == "ids")  # type: ignore[union-attr]
    assert gather.metadata_props["qopt.layer"] == "table"


def test_a_layer_that_stays_float_is_left_alone(network: Prepared) -> None:
    plan = uniform(WeightSpec.parse("int4")).with_changes(weights={"up": "float"})
    quantized = WeightOnly(network).apply(plan).quantized
    model = emit(network, quantized)
    check_weight_only(network, quantized, model, to_bytes(model))
    assert "up" in model.graph.initializers


def _other_scale(model: ir.Model) -> None:
    value = model.graph.initializers["down/scale"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.01), name=value.name)


def _other_codes(model: ir.Model) -> None:
    value = model.graph.initializers["table/codes"]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.roll(value.const_value.numpy(), 1, axis=0), name=value.name)


def _node(model: ir.Model, op: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op)


def _other_operator(model: ir.Model) -> None:
    _node(model, "Relu").op_type = "Abs"


def _other_attribute(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "Gather" and node.inputs[1] is model.graph.inputs[0])
    node.attributes["axis"] = ir.AttrInt64("axis", 0)


def _other_input(model: ir.Model) -> None:
    _node(model, "Unsqueeze").replace_input_with(0, model.graph.inputs[1])


def _lost_output(model: ir.Model) -> None:
    model.graph.outputs.pop()


def _other_type(model: ir.Model) -> None:
    model.graph.inputs[1].type = ir.TensorType(ir.DataType.INT32)


def _renamed_node(model: ir.Model) -> None:
    _node(model, "Relu").name = "another"


def _float_again(model: ir.Model) -> None:
    value = ir.Value(name="plain", const_value=ir.tensor(np.ones((8, 16), np.float32), name="plain"))
    model.graph.register_initializer(value)
    _node(model, "MatMul").replace_input_with(1, value)


def _other_opset(model: ir.Model) -> None:
    model.opset_imports[""] = 22


PLANTED: dict[Callable[[ir.Model], None], str] = {
    _other_scale: "computes something else than the quantized network", _other_codes: "computes something else",
    _other_operator: "another graph .*Relu.*Abs", _other_attribute: "another graph than the network",
    _other_input: "another graph .*expected m, got mask", _lost_output: "outputs: the file is another graph",
    _other_type: "inputs: the file is another graph", _renamed_node: "a node of the network is missing",
    _float_again: "a quantized weight is still float in the file", _other_opset: "opset: the file is another graph",
}  # fmt: skip


@pytest.mark.parametrize("change", PLANTED, ids=lambda change: change.__name__)
def test_planted_mistakes_are_caught(change: Callable[[ir.Model], None], network: Prepared) -> None:
    quantized = _quantized(network, "int4")
    model = emit(network, quantized)
    data = to_bytes(model)
    change(model)
    if change in (_other_scale, _other_codes):
        data = to_bytes(model)
    with pytest.raises(VerificationError, match=PLANTED[change]):
        check_weight_only(network, quantized, model, data)
