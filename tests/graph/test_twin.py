from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import fx

from qopt.graph.compare import TOLERANCE, Runner, difference, matches_onnxruntime, random_images
from qopt.graph.operators.convolution import affine
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin, import_graph

Build = Callable[..., ir.Model]


def _by_value(twin: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.meta["value"]: node for node in twin.graph.nodes if "value" in node.meta}


def _layer_calls(twin: fx.GraphModule) -> list[fx.Node]:
    return [node for node in twin.graph.nodes if "layer" in node.meta]


def test_every_value_has_a_node_of_its_name(small_cnn: Build) -> None:
    prepared = prepare(small_cnn())
    twin = build_twin(prepared)
    by_value = _by_value(twin)
    expected = {"x", *prepared.model.graph.initializers, *(o.name for n in prepared.model.graph for o in n.outputs)}
    assert set(by_value) == expected
    assert by_value["x"].op == "placeholder"
    assert by_value["conv.weight"].op == "get_attr"
    assert by_value["conv.weight"].name == "conv_weight"
    output = next(node for node in twin.graph.nodes if node.op == "output")
    assert output.args == (by_value[prepared.output],)


def test_layers_are_marked_with_their_arguments_in_place(small_cnn: Build) -> None:
    prepared = prepare(small_cnn())
    calls = _layer_calls(build_twin(prepared))
    assert [(call.meta["layer"], call.meta["use"]) for call in calls] == [("conv.weight", 0), ("fc.weight", 0)]
    assert [call.target for call in calls] == [torch.conv2d, torch.nn.functional.linear]
    for call, layer in zip(calls, prepared.layers, strict=True):
        data, weight, bias = call.args[:3]
        assert isinstance(data, fx.Node)
        assert isinstance(weight, fx.Node)
        assert isinstance(bias, fx.Node)
        assert data.meta["value"] == layer.uses[0].input
        assert weight.meta["value"] == layer.initializer
        assert bias.meta["value"] == layer.uses[0].bias
        assert call.meta["value"] == layer.uses[0].output


def test_a_shared_weight_is_one_buffer_with_two_uses(graph: Any) -> None:
    g = graph()
    weight = g.random(3, 3, 3, 3, name="w")
    first = g.op("Relu", g.op("Conv", "x", weight, pads=[1] * 4))
    prepared = prepare(g.model(g.op("Flatten", g.op("Conv", first, weight, pads=[1] * 4))))
    twin = build_twin(prepared)
    calls = _layer_calls(twin)
    assert [(call.meta["layer"], call.meta["use"]) for call in calls] == [("w", 0), ("w", 1)]
    assert calls[0].args[1] is calls[1].args[1]
    assert matches_onnxruntime(prepared, twin) <= TOLERANCE


def test_gemm_and_matmul_keep_the_stored_orientation(graph: Any) -> None:
    g = graph()
    hidden = g.op("Gemm", g.op("Flatten", "x"), g.random(192, 6, name="a"), g.random(6))
    prepared = prepare(g.model(g.op("Add", g.op("MatMul", hidden, g.random(6, 4, name="b")), g.random(4))))
    twin = build_twin(prepared)
    assert [tuple(getattr(twin, name).shape) for name in ("a", "b")] == [(192, 6), (6, 4)]
    assert [call.target for call in _layer_calls(twin)] == [affine, torch.matmul]


def test_constants_take_no_gradient_and_the_image_does(small_cnn: Build) -> None:
    twin = build_twin(prepare(small_cnn()))
    assert list(twin.parameters()) == []
    assert all(b.dtype == torch.float32 and not b.requires_grad for b in twin.buffers())
    assert not twin.training
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    twin(image).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def test_weights_are_copies(small_cnn: Build) -> None:
    prepared = prepare(small_cnn())
    twin = build_twin(prepared)
    with torch.no_grad():
        twin.get_buffer("fc_weight").zero_()
    assert prepared.initializer("fc.weight").any()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_size(batch: int, small_cnn: Build) -> None:
    prepared = prepare(small_cnn(batch=1))
    images = random_images((3, 8, 8), batch, seed=1)
    assert (
        difference(build_twin(prepared)(torch.from_numpy(images)).numpy(), Runner(prepared.model)(images)) <= TOLERANCE
    )


def test_a_fixed_batch(graph: Any) -> None:
    g = graph(batch=2)
    prepared = prepare(g.model(g.op("Flatten", g.op("Sub", "x", g.op("ReduceMean", "x", g.ints(0))))))
    assert prepared.batch == 2
    assert matches_onnxruntime(prepared, build_twin(prepared)) <= TOLERANCE


def test_split_parts_are_named_after_their_values(graph: Any) -> None:
    g = graph()
    low, high = g.ops("Split", "x", g.ints(1, 2), outputs=2, axis=1)
    prepared = prepare(g.model(g.op("Flatten", g.op("Add", low, high))))
    twin = build_twin(prepared)
    assert {low, high} <= set(_by_value(twin))
    parts = [node for node in twin.graph.nodes if node.target is torch.split]
    assert "value" not in parts[0].meta


@pytest.mark.parametrize(
    "name", ["training", "code", "forward", "1.weight", "a b", "ünïcode", "class", "/x/y.z", "input"]
)
def test_awkward_names(name: str, graph: Any) -> None:
    g = graph()
    model = g.model(g.op("Flatten", g.op("Conv", "x", g.random(4, 3, 3, 3, name=name))))
    model.graph.inputs[0].name = "0"
    prepared = prepare(model)
    twin = build_twin(prepared)
    assert _by_value(twin)[name].op == "get_attr"
    assert prepared.layers[0].initializer == name
    assert matches_onnxruntime(prepared, twin) <= TOLERANCE


def test_names_that_clash_once_sanitised(graph: Any) -> None:
    g = graph()
    first = g.op("Mul", "x", g.constant(2.0, name="a.b"))
    prepared = prepare(g.model(g.op("Flatten", g.op("Add", first, g.constant(3.0, name="a_b")))))
    twin = build_twin(prepared)
    assert {"a.b", "a_b"} <= set(_by_value(twin))
    assert matches_onnxruntime(prepared, twin) <= TOLERANCE


def test_the_twin_can_be_copied_and_moved(small_cnn: Build) -> None:
    prepared = prepare(small_cnn())
    twin = copy.deepcopy(build_twin(prepared))
    assert matches_onnxruntime(prepared, twin) <= TOLERANCE
    assert len(_layer_calls(twin)) == 2
    images = torch.from_numpy(random_images((3, 8, 8), 2))
    double = twin.double()(images.double())
    assert double.dtype == torch.float64


def test_two_twins_are_equal(small_cnn: Build) -> None:
    prepared = prepare(small_cnn())
    assert str(build_twin(prepared).graph) == str(build_twin(prepared).graph)


@pytest.mark.parametrize("buffer", ["conv_weight", "conv_bias", "fc_weight", "fc_bias"])
def test_a_wrong_twin_is_caught(buffer: str, small_cnn: Build) -> None:
    prepared = prepare(small_cnn())
    twin = build_twin(prepared)
    with torch.no_grad():
        twin.get_buffer(buffer).add_(0.05)
    assert matches_onnxruntime(prepared, twin) > TOLERANCE


def _two_in_two_out() -> ir.Model:
    """Embeddings of ids, weighed; also the ids' cumulative sum. The table is stored as uint4 codes."""
    table = helper.make_tensor("codes", TensorProto.UINT4, [5, 2], list(range(10)))
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5])
    axis = helper.make_tensor("axis", TensorProto.INT64, [], [1])
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["table"], name="unpack"),
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="look_up"),
        helper.make_node("Mul", ["rows", "weights"], ["weighed"], name="weigh"),
        helper.make_node("CumSum", ["ids", "axis"], ["sums"], name="count"),
    ]
    inputs = [
        helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", 3]),
        helper.make_tensor_value_info("weights", TensorProto.FLOAT, ["n", 3, 1]),
    ]
    outputs = [
        helper.make_tensor_value_info("weighed", TensorProto.FLOAT, ["n", 3, 2]),
        helper.make_tensor_value_info("sums", TensorProto.INT64, ["n", 3]),
    ]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializer=[table, scale, axis])
    return ir.serde.deserialize_model(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    )


def test_any_number_and_type_of_inputs_and_outputs() -> None:
    twin = import_graph(_two_in_two_out())
    ids, weights = torch.tensor([[0, 4, -1]]), torch.tensor([[[1.0], [2.0], [0.5]]], requires_grad=True)
    weighed, sums = twin(ids, weights)
    assert weighed.tolist() == [[[0.0, 0.5], [8.0, 9.0], [2.0, 2.25]]]
    assert sums.tolist() == [[0, 4, 3]]
    (slope,) = torch.autograd.grad(weighed.sum(), weights)
    assert slope.flatten().tolist() == [0.5, 8.5, 8.5]
    assert [node.name for node in twin.graph.nodes if node.op == "placeholder"] == ["ids", "weights"]


def test_codes_of_constants_become_numbers_once() -> None:
    twin = import_graph(_two_in_two_out())
    assert _by_value(twin)["table"].op == "get_attr"
    assert dict(twin.named_buffers()).keys() == {"table"}
    assert twin.get_buffer("table").dtype == torch.float32
    assert not {"codes", "scale", "axis"} & set(_by_value(twin))
