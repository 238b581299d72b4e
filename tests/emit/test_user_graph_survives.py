"""What need not change does not: names, inputs, outputs, metadata, untouched nodes; and every emission is the same."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from qopt.emit import emit
from qopt.emit.additions import Additions
from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.kernels import count_kernels
from qopt.runtime.patterns import integer_weight
from qopt.runtime.session import Runner, to_bytes

TRACE = "pkg.torch.onnx.stack_trace"


def residual(graph: Any) -> onnx.ModelProto:
    """Two convolutions and a shared weight, a residual sum, a pool, a classifier; metadata everywhere."""
    g = graph((4, 8, 8))
    g.op("Conv", ["x", g.random("a.weight", 4, 4, 3, 3), g.random("a.bias", 4)], "a", pads=[1] * 4)
    g.op("Relu", ["a"], "ar")
    g.op("Conv", ["ar", "a.weight"], "b", pads=[1] * 4)
    g.op("Add", ["b", "ar"], "sum")
    g.op("Relu", ["sum"], "sr")
    g.op("GlobalAveragePool", ["sr"], "pooled")
    g.op("Flatten", ["pooled"], "features")
    g.op("Gemm", ["features", g.random("fc.weight", 7, 4), g.random("fc.bias", 7)], "logits", transB=1)
    proto: onnx.ModelProto = g.proto()
    proto.producer_name, proto.doc_string, proto.domain, proto.model_version = "someone", "a network", "org", 3
    proto.metadata_props.add(key="owner", value="me")
    proto.graph.doc_string = "the graph"
    for node in proto.graph.node:
        node.metadata_props.add(key="user.note", value=f"on {node.name}")
        node.metadata_props.add(key=TRACE, value="File /home/me/secret.py, line 1")
    return proto


@pytest.fixture(scope="session")
def network(graph: Any) -> Prepared:
    return prepare(ir.serde.deserialize_model(residual(graph)))


@pytest.fixture(scope="session")
def full(network: Prepared, codes_of: Any) -> Quantized:
    """Everything at once: mixed formats, codes of 8 and 4 bits, a changed and an added bias."""
    weights = codes_of(network, "int2", "a.weight") | codes_of(network, "log4", "fc.weight")
    activations = {"x": AffineRange.from_bounds(-1, 1, 8), "features": AffineRange.from_bounds(0, 2, 8)}
    activations |= {name: AffineRange.from_bounds(0, 3, 4) for name in ("ar", "sr", "pooled")}
    activations |= {"b": AffineRange.from_bounds(-3, 3, 4)}
    biases = {("a.weight", 1): torch.full((4,), 0.25), ("fc.weight", 0): torch.zeros(7)}
    return Quantized(weights, biases, activations)


def test_nothing_to_do_changes_nothing(network: Prepared, images: Any) -> None:
    pixels = images(network, 5)
    before = Runner(to_bytes(network.model))(pixels)
    model = emit(network, Quantized())
    assert Runner(to_bytes(model))(pixels).tobytes() == before.tobytes()
    assert [(n.name, n.op_type) for n in model.graph] == [(n.name, n.op_type) for n in network.model.graph]
    assert list(model.graph.initializers) == list(network.model.graph.initializers)


def test_the_prepared_graph_is_not_touched(network: Prepared, full: Quantized) -> None:
    before = to_bytes(network.model)
    emit(network, full, metadata={"a": "b"}, layer_metadata={"a.weight": {"c": "d"}})
    assert to_bytes(network.model) == before


def test_everything_at_once_is_valid_and_fuses(network: Prepared, full: Quantized) -> None:
    data = to_bytes(emit(network, full))
    onnx.checker.check_model(data, full_check=True)
    kernels = count_kernels(data)
    assert (kernels.integer, kernels.float_) == (3, 0)
    assert kernels.counts["QLinearConv"] == 2
    assert kernels.counts["QLinearAdd"] == 1


def test_users_part_survives(network: Prepared, full: Quantized) -> None:
    source, model = network.model, emit(network, full, metadata={"qopt.kind": "integer"})
    for before, after in ((source.graph.inputs, model.graph.inputs), (source.graph.outputs, model.graph.outputs)):
        assert [(v.name, v.dtype, str(v.shape)) for v in before] == [(v.name, v.dtype, str(v.shape)) for v in after]
    assert model.opset_imports == source.opset_imports
    assert model.ir_version == source.ir_version
    assert (model.producer_name, model.doc_string, model.domain, model.model_version) == (
        "someone",
        "a network",
        "org",
        3,
    )
    assert model.graph.doc_string == "the graph"
    assert model.metadata_props == {"owner": "me", "qopt.kind": "integer"}
    nodes = {node.name: node for node in model.graph}
    for node in source.graph:
        found = nodes[node.name]
        assert (found.op_type, found.domain, list(found.attributes)) == (
            node.op_type,
            node.domain,
            list(node.attributes),
        )
        assert [v.name for v in found.outputs] == [v.name for v in node.outputs]
        assert found.metadata_props["user.note"] == f"on {node.name}"
    order = [node.name for node in model.graph if node.name in {n.name for n in source.graph}]
    assert order == [node.name for node in source.graph]


def test_layers_carry_their_format(network: Prepared, full: Quantized) -> None:
    model = emit(network, full, layer_metadata={"fc.weight": {"qopt.norm_w": "2.5"}})
    found = {
        node.name: {k: v for k, v in node.metadata_props.items() if k.startswith("qopt.")}
        for node in model.graph
        if "qopt.layer" in node.metadata_props
    }
    assert found == {
        "node_a": {"qopt.layer": "a.weight", "qopt.format": "int2"},
        "node_b": {"qopt.layer": "a.weight", "qopt.format": "int2"},
        "node_logits": {"qopt.layer": "fc.weight", "qopt.format": "log4", "qopt.norm_w": "2.5"},
    }
    plain = emit(network, Quantized())
    assert {n.metadata_props["qopt.format"] for n in plain.graph if "qopt.layer" in n.metadata_props} == {"float"}


def test_exporter_traces_are_dropped(network: Prepared, full: Quantized) -> None:
    assert TRACE.encode() in to_bytes(network.model)
    data = to_bytes(emit(network, full))
    assert b"stack_trace" not in data
    assert b"secret.py" not in data


NOTES = {
    "pkg.torch.onnx.name_scopes": "['', 'a']", "pkg.torch.onnx.class_hierarchy": "['Net']", "namespace": ": Net",
    "pkg.torch.export.ExportedProgram.graph_signature": "inputs", "pkg.onnxscript.rewriter.rule_name": "fuse",
}  # fmt: skip


def test_notes_of_exporters_go_and_those_of_users_stay(network: Prepared, full: Quantized) -> None:
    """On the graph, on nodes, and on values of all kinds; the prepared network keeps its own."""
    kept = {"mine": "stays", "pkg.mine": "stays, too", "namespaces": "and this"}
    network = replace(network, model=network.model.clone())
    graph = network.model.graph
    for holder in (graph, graph[0], graph.inputs[0], graph[0].outputs[0]):
        holder.metadata_props.update(NOTES | kept)
    model = emit(network, full)
    for emitted in (model.graph, model.graph[0], model.graph.inputs[0]):
        found = emitted.metadata_props
        assert not NOTES.keys() & found.keys()
    assert kept.items() <= model.graph.metadata_props.items()
    assert kept.items() <= model.graph.inputs[0].metadata_props.items()
    assert NOTES.items() <= network.model.graph.metadata_props.items()
    assert not [key for key in NOTES if key.startswith("pkg.") and key.encode() in to_bytes(model)]


def test_every_name_is_given_once(network: Prepared, full: Quantized) -> None:
    model = emit(network, full)
    values = Counter(v.name for node in model.graph for v in node.outputs)
    values.update(list(model.graph.initializers))
    values.update(v.name for v in model.graph.inputs)
    assert set(values.values()) == {1}
    nodes = Counter(node.name for node in model.graph if node.name)
    assert set(nodes.values()) == {1}
    assert all(values)
    unnamed = [str(node.outputs[0].name) for node in model.graph if not node.name]
    assert unnamed == [f"q{number + 1}" for number in range(len(unnamed))]
    assert all(name == value.name for name, value in model.graph.initializers.items())


def test_a_shared_weight_is_stored_once(network: Prepared, codes_of: Any) -> None:
    for activations in ({}, {"x": AffineRange.from_bounds(-1, 1, 8), "ar": AffineRange.from_bounds(0, 3, 8)}):
        model = emit(network, Quantized(codes_of(network, "int4"), {}, activations))
        assert [n for n in model.graph.initializers if n.startswith("a.weight") and "codes" in n] == ["a.weight/codes"]
        readers = {node.inputs[1].name for node in model.graph if node.op_type == "Conv" and node.inputs[1]}
        assert len(readers) == 1
        assert "a.weight" not in model.graph.initializers


def test_a_weight_with_one_float_use_is_emitted_once_for_all(
    network: Prepared, codes_of: Any, evaluate: Any, images: Any
) -> None:
    """The first use lies between codes, the second reads float: the weight takes the form that both can use."""
    activations = {"x": AffineRange.from_bounds(-1, 1, 8), "a": AffineRange.from_bounds(-3, 3, 8)}
    weights = codes_of(network, "int4", "a.weight")
    model = emit(network, Quantized(weights, {}, activations))
    assert next(n for n in model.graph if n.name == "a.weight/dequantized").op_type == "Mul"
    kernels = count_kernels(to_bytes(model))
    assert kernels.integer == 0
    assert np.array_equal(
        evaluate(model, {"x": images(network)}, "a.weight/dequantized"), weights["a.weight"].dequantize().numpy()
    )


def test_tables_are_shared_between_layers(graph: Any, codes_of: Any) -> None:
    g = graph((16,))
    g.op("Gemm", ["x", g.random("a.weight", 16, 16)], "a")
    g.op("Gemm", ["a", g.random("b.weight", 16, 15)], "b")
    g.op("Gemm", ["b", g.random("c.weight", 15, 15)], "c")
    g.head("c")
    prepared = g.prepared()
    weights = codes_of(prepared, "int2:full", "a.weight") | codes_of(prepared, "int1", "b.weight")
    model = emit(prepared, Quantized(weights | codes_of(prepared, "log1", "c.weight")))
    assert [name for name in model.graph.initializers if name.endswith("levels")] == [
        "qopt/int2_levels",
        "qopt/binary_levels",
    ]
    mixed = codes_of(prepared, "log3", "a.weight") | codes_of(prepared, "log4", "b.weight", "c.weight")
    model = emit(prepared, Quantized(mixed))
    assert sorted(n for n in model.graph.initializers if n.endswith("levels")) == [
        "qopt/log3_levels",
        "qopt/log4_levels",
    ]


def test_two_emissions_are_equal(network: Prepared, full: Quantized, graph: Any) -> None:
    first = to_bytes(emit(network, full))
    assert to_bytes(emit(network, full)) == first
    again = prepare(ir.serde.deserialize_model(residual(graph)))
    assert hashlib.sha256(to_bytes(emit(again, full))).digest() == hashlib.sha256(first).digest()


def test_an_emitted_file_goes_round(network: Prepared, full: Quantized, images: Any) -> None:
    """Written, read and written again it is the same, and computes the same."""
    data = to_bytes(emit(network, full))
    again = to_bytes(ir.serde.deserialize_model(onnx.load_from_string(data)))
    assert Runner(again)(images(network)).tobytes() == Runner(data)(images(network)).tobytes()


HOSTILE = [
    "x/scale", "x/zero_point", "x/quantized", "x/dequantized", "y/scale", "y/clipped", "l.weight/scale",
    "l.weight/codes", "l.weight/dequantized", "l.weight/levels8", "l.weight/shape", "l.weight/bias", "qopt/flat",
    "qopt/int2_levels", "qopt/largest_code_4", "l.weight/channels", "l.weight/zero_points", "l.weight/bias/codes",
    "l/bias/scale", "q1", "q2",
]  # fmt: skip


@pytest.mark.parametrize("where", ["constants", "values", "nodes"])
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("spec", ["int2", "int4", "log4", "log8", "float"])
def test_names_that_the_user_took(
    spec: str, op: str, where: str, graph: Any, codes_of: Any, evaluate: Any, one_layer: Callable[..., Prepared]
) -> None:
    """Every name that qopt would give is already something else in the user's graph, which stays what it was."""
    twin = one_layer(op, after="Relu")
    g = graph(twin.input_shape)
    proto = onnx.load_from_string(to_bytes(twin.model))
    g.nodes, g.constants = list(proto.graph.node), list(proto.graph.initializer)
    last = g.nodes.pop()
    value = last.input[0]
    for number, name in enumerate(HOSTILE):
        amount = np.float32(number)
        if where == "constants":
            value = g.op("Add", [value, g.constant(name, amount)], f"sum{number}")
        elif where == "values":
            value = g.op("Add", [value, g.constant(f"n{number}", amount)], name, name=f"adds {number}")
        else:
            value = g.op("Add", [value, g.constant(f"n{number}", amount)], f"sum{number}", name=name)
    g.op("Mul", [value, last.input[1]], "logits")
    prepared = g.prepared()
    weights = {} if spec == "float" else codes_of(prepared, spec)
    reference = {} if spec == "float" else codes_of(twin, spec)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, *prepared.input_shape)).astype(np.float32)
    total = 2 * sum(range(len(HOSTILE)))
    for activations in (
        {},
        {"x": AffineRange.from_bounds(-1, 1, 8), "y": AffineRange.from_bounds(-3, 3, 4)},
        {"x": AffineRange.from_bounds(-1, 1, 4), "r": AffineRange.from_bounds(0, 3, 8)},
    ):
        biases = {("l.weight", 0): torch.linspace(-1, 1, 6 if op == "Conv" else 10)}
        model = emit(prepared, Quantized(weights, biases, activations))
        onnx.checker.check_model(to_bytes(model), full_check=True)
        expected = evaluate(emit(twin, Quantized(reference, biases, activations)), {"x": pixels}, "logits")
        found = evaluate(model, {"x": pixels}, "logits")
        assert np.allclose(found - total, expected, atol=1e-3)
        if where == "constants":
            for number, name in enumerate(HOSTILE):
                constant = model.graph.initializers[name].const_value
                assert constant is not None
                assert float(constant.numpy()) == number


def test_a_layer_and_a_value_of_one_name(graph: Any, codes_of: Any, evaluate: Any) -> None:
    """A layer may be called like an activation: its scales and the activation's are two things."""
    g = graph((16,))
    g.op("Relu", ["x"], "fc.weight")
    g.random("val_3", 16, 10)
    g.op("MatMul", ["fc.weight", "val_3"], "product", name="fc")
    g.op("Add", ["product", g.random("fc.bias", 10)], "y")
    g.head("y")
    prepared = g.prepared()
    assert prepared.layers[0].name == "fc.weight"
    weights = codes_of(prepared, "int8")
    code = AffineRange.from_bounds(0, 1, 8)
    model = emit(prepared, Quantized(weights, {}, {"fc.weight": code}))
    onnx.checker.check_model(to_bytes(model), full_check=True)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, 16)).astype(np.float32)
    seen = code.dequantize(code.quantize(torch.from_numpy(np.maximum(pixels, 0)))).numpy()
    expected = 2 * (seen @ weights["fc.weight"].dequantize().numpy() + prepared.initializer("fc.bias"))
    assert np.allclose(evaluate(model, {"x": pixels}, "logits"), expected, atol=1e-3)


def test_names_are_counted_up() -> None:
    graph = ir.Graph([], [], nodes=[], name="g", opset_imports={"": 21})
    additions = Additions(graph)
    assert [additions.name("a") for _ in range(3)] == ["a", "a_2", "a_3"]
    first, second = (additions.constant("a", np.zeros(1)) for _ in range(2))
    assert (first.name, second.name) == ("a_4", "a_5")
    assert additions.shared("t", np.zeros(1)) is additions.shared("t", np.zeros(1))
    assert additions.constant("t", np.ones(1)).name == "t_2"
    assert list(graph.initializers) == ["a_4", "a_5", "t", "t_2"]


def test_the_same_weight_twice_in_one_graph(one_layer: Callable[..., Prepared], codes_of: Any) -> None:
    """Placing a subgraph a second time gives new names and the same tables."""
    prepared = one_layer("Conv")
    weight = codes_of(prepared, "log4")["l.weight"]
    model = prepared.model.clone()
    additions = Additions(model.graph)
    values = []
    for _ in range(2):
        packed, value = integer_weight("l.weight", weight, zero_points=False)
        additions.place(packed, model.graph[0])
        values.append(value.name)
    assert values == ["l.weight/dequantized", "l.weight/dequantized_2"]
    assert [n for n in model.graph.initializers if "levels" in n] == ["qopt/log4_levels"]
