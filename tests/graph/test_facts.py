from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qopt.errors import UsageError
from qopt.graph.compare import random_images
from qopt.graph.facts import find_layers, left_in_float
from qopt.graph.layer_names import layer_name
from qopt.graph.model import Layer, Prepared, Use
from qopt.graph.prepare import prepare

SCOPES = "pkg.torch.onnx.name_scopes"


def _prepare(g: Any, data: str) -> Prepared:
    return prepare(g.model(g.op("Flatten", data)))


def _only(g: Any, data: str) -> Layer:
    (layer,) = _prepare(g, data).layers
    return layer


def test_layers_of_a_small_cnn(small_cnn: Callable[..., ir.Model]) -> None:
    conv, dense = prepare(small_cnn()).layers
    assert (conv.name, conv.op, conv.initializer, conv.shape) == ("conv.weight", "Conv", "conv.weight", (4, 3, 3, 3))
    assert (conv.channel_axis, conv.channels, conv.groups, conv.weights) == (0, 4, 1, 108)
    assert conv.uses == (Use("n3", "x", "v3", "conv.bias", 4 * 8 * 8 * 27),)
    assert (dense.name, dense.op, dense.channel_axis, dense.macs) == ("fc.weight", "Gemm", 0, 2560)
    assert dense.uses[0].bias == "fc.bias"


@pytest.mark.parametrize(
    ("weight", "attributes", "macs"),
    [
        ((4, 3, 3, 3), {}, 4 * 6 * 6 * 27),
        ((4, 3, 3, 3), {"strides": [2, 2]}, 4 * 3 * 3 * 27),
        ((6, 1, 3, 3), {"group": 3}, 6 * 6 * 6 * 9),
        ((4, 3, 3, 3), {"pads": [1, 1, 1, 1]}, 4 * 8 * 8 * 27),
        ((5, 3, 1, 1), {}, 5 * 64 * 3),
    ],
)
def test_macs_of_convolutions(weight: tuple[int, ...], attributes: dict[str, Any], macs: int, graph: Any) -> None:
    g = graph()
    layer = _only(g, g.op("Conv", "x", g.random(*weight), **attributes))
    assert layer.macs == macs
    assert layer.groups == attributes.get("group", 1)
    assert layer.uses[0].bias is None


def test_macs_of_a_transposed_convolution(graph: Any) -> None:
    g = graph()
    layer = _only(g, g.op("ConvTranspose", "x", g.random(3, 5, 2, 2), g.random(5), strides=[2, 2]))
    assert (layer.op, layer.channel_axis, layer.channels) == ("ConvTranspose", 1, 5)
    assert layer.macs == 3 * 64 * 5 * 4


def test_macs_count_every_token(graph: Any) -> None:
    g = graph()
    tokens = g.op("Reshape", "x", g.ints(0, 3, 64))
    product = g.op("MatMul", tokens, g.random(64, 7, name="q.weight"))
    added = g.op("Add", g.random(7, name="q.bias"), product)
    layer = _only(g, added)
    assert (layer.op, layer.shape, layer.channel_axis, layer.macs) == ("MatMul", (64, 7), 1, 3 * 64 * 7)
    assert layer.uses == (Use(layer.uses[0].node, tokens, added, "q.bias", 3 * 64 * 7),)


def test_tokens_merged_into_the_batch_axis_count_too(graph: Any) -> None:
    g = graph()
    rows = g.op("Reshape", "x", g.ints(-1, 64))
    product = g.op("Reshape", g.op("MatMul", rows, g.random(64, 7)), g.ints(-1, 21))
    assert _only(g, product).macs == 3 * 64 * 7


def test_macs_of_a_bound_batch_are_per_image(graph: Any) -> None:
    g = graph(batch=2)
    centred = g.op("Sub", "x", g.op("ReduceMean", "x", g.ints(0)))
    prepared = _prepare(g, g.op("Conv", centred, g.random(4, 3, 3, 3)))
    assert prepared.batch == 2
    assert prepared.layers[0].macs == 4 * 36 * 27


def test_shapes_that_inference_cannot_tell_are_observed(graph: Any) -> None:
    g = graph()
    count = g.op("Cast", g.op("ReduceMax", g.op("Ceil", "x"), keepdims=0), to=7)  # at run time, 1 or 0
    length = g.op("Add", g.op("Mul", count, g.constant(0, dtype=np.int64)), g.constant(64, dtype=np.int64))
    target = g.op("Concat", g.ints(-1), g.op("Unsqueeze", length, g.ints(0)), axis=0)
    rows = g.op("Reshape", "x", target)
    product = g.op("Reshape", g.op("MatMul", rows, g.random(64, 7)), g.ints(-1, 21))
    assert _only(g, product).macs == 3 * 64 * 7


@pytest.mark.parametrize("bias", [(8, 7), (1,), (8, 1)])
def test_an_add_that_is_no_channel_bias_is_left_alone(bias: tuple[int, ...], graph: Any) -> None:
    g = graph()
    product = g.op("MatMul", "x", g.random(8, 7))
    use = _only(g, g.op("Add", product, g.random(*bias))).uses[0]
    assert (use.output, use.bias) == (product, None)


def test_a_product_with_two_readers_keeps_its_own_output(graph: Any) -> None:
    g = graph()
    product = g.op("MatMul", "x", g.random(8, 7))
    use = _only(g, g.op("Mul", product, g.op("Add", product, g.random(7)))).uses[0]
    assert (use.output, use.bias) == (product, None)


def test_a_shared_weight_is_one_layer(graph: Any) -> None:
    g = graph()
    weight = g.random(3, 3, 3, 3, name="w")
    first = g.op("Conv", "x", weight, pads=[1] * 4)
    layer = _only(g, g.op("Conv", g.op("Relu", first), weight, g.random(3, name="b"), pads=[1] * 4))
    assert [use.bias for use in layer.uses] == [None, "b"]
    assert layer.macs == 2 * 3 * 64 * 27
    assert layer.uses[0].output == first


@pytest.mark.parametrize(("transposed", "axis"), [(1, 0), (0, 1)])
def test_gemm_channels(transposed: int, axis: int, graph: Any) -> None:
    g = graph()
    shape = (10, 192) if transposed else (192, 10)
    bias = g.random(1, 10, name="b")
    prepared = prepare(g.model(g.op("Gemm", g.op("Flatten", "x"), g.random(*shape), bias, transB=transposed)))
    (layer,) = prepared.layers
    assert (layer.channel_axis, layer.channels, layer.uses[0].bias) == (axis, 10, "b")


def _scaled(g: Any) -> str:
    return str(g.op("Gemm", g.op("Flatten", "x"), g.random(10, 192, name="w"), transB=1, alpha=0.5))


def _grouped_up(g: Any) -> str:
    return str(g.op("ConvTranspose", "x", g.random(3, 2, 2, 2, name="w"), group=3))


def _stack(g: Any) -> str:
    return str(g.op("MatMul", "x", g.random(3, 8, 4, name="w")))


def _scalar_bias(g: Any) -> str:
    return str(g.op("Gemm", g.op("Flatten", "x"), g.random(192, 10, name="w"), g.random()))


def _two_kinds(g: Any) -> str:
    weight = g.random(8, 8, name="w")
    return str(g.op("MatMul", g.op("MatMul", "x", weight), g.op("Mul", weight, g.op("ReduceMax", "x"))))


def _two_axes(g: Any) -> str:
    weight, rows = g.random(192, 192, name="w"), g.op("Flatten", "x")
    return str(g.op("Gemm", g.op("Gemm", rows, weight), weight, transB=1))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (_scaled, "Gemm with scaling or a transposed left side"),
        (_grouped_up, "ConvTranspose with groups"),
        (_stack, "MatMul by a stack of matrices"),
        (_scalar_bias, "its bias is no constant vector"),
        (_two_kinds, "another kind of operator uses the weight too"),
        (_two_axes, "another kind of operator uses the weight too"),
    ],
)
def test_what_stays_in_float_and_why(build: Callable[[Any], str], reason: str, graph: Any) -> None:
    g = graph()
    prepared = _prepare(g, build(g))
    assert prepared.layers == ()
    assert left_in_float(prepared.model) == (f"w stays in float: {reason}",)
    assert f"w stays in float: {reason}" in prepared.notes


def test_a_convolution_over_three_axes_stays_in_float(graph: Any) -> None:
    g = graph((1, 4, 4, 4))
    prepared = _prepare(g, g.op("Conv", "x", g.random(2, 1, 2, 2, 2, name="w")))
    assert prepared.notes == ("w stays in float: Conv over 3 axes",)


def test_names_are_unique(graph: Any) -> None:
    g = graph()
    rows = g.op("Flatten", "x", name="/fc/Flatten")
    first = g.op("MatMul", rows, g.random(192, 5, name="onnx::MatMul_1"), name="/fc/MatMul")
    second = g.op("MatMul", first, g.random(5, 4, name="onnx::MatMul_2"), name="/fc/MatMul_1")
    assert [layer.name for layer in prepare(g.model(second)).layers] == ["fc.weight", "fc.weight_2"]


@pytest.mark.parametrize(
    ("weight", "node", "bias", "metadata", "expected"),
    [
        ("net.fc.weight", "n", None, {}, "net.fc.weight"),
        ("w", "n", None, {SCOPES: "['', 'other', 'linear']"}, "w"),
        ("val_12", "n", None, {SCOPES: "['', 'm.vit', 'm.vit.layers.0.attention.q_proj', 'linear']"},
         "m.vit.layers.0.attention.q_proj.weight"),
        ("val_12", "/a/MatMul", None, {SCOPES: "['', 'matmul']"}, "a.weight"),
        ("onnx::MatMul_9", "/1/1.0/1.0.0/fn/fn.1/query/MatMul", None, {}, "1.0.0.fn.1.query.weight"),
        ("onnx::MatMul_9", "MatMul_3", "head.bias", {}, "head.weight"),
        ("17", "MatMul_3", "18", {}, "MatMul_3.weight"),
        ("/fc/Transpose_output_0", "MatMul", None, {}, "MatMul.weight"),
        ("val", "/MatMul", None, {}, "/MatMul.weight"),
        ("val_1", "", None, {SCOPES: "not a list"}, "val_1.weight"),
    ],
)  # fmt: skip
def test_layer_names(weight: str, node: str, bias: str | None, metadata: dict[str, str], expected: str) -> None:
    value = ir.Value(name=weight)
    made = ir.Node("", "MatMul", [value], name=node, metadata_props=metadata)
    assert layer_name(value, made, bias) == expected


def test_a_folded_weight_keeps_the_parameter_that_it_came_from() -> None:
    value = ir.Value(name="val_3", metadata_props={"pkg.onnxscript.optimizer.folded_from": "['fc.weight', 'val_2']"})
    assert layer_name(value, ir.Node("", "MatMul", [value], name="n"), None) == "fc.weight"


@pytest.mark.parametrize(("scopes", "expected"), [("['', 'net.c', 'conv2d']", "net.c.weight"), ("", "mul")])
def test_a_weight_computed_from_two_parameters_is_named_after_its_module(scopes: str, expected: str) -> None:
    value = ir.Value(name="mul", metadata_props={"pkg.onnxscript.optimizer.folded_from": "['c.g', 'c.v']"})
    node = ir.Node("", "Conv", [value], name="n", metadata_props={SCOPES: scopes})
    assert layer_name(value, node, None) == expected


def test_prepared_finds_layers_and_weights(small_cnn: Callable[..., ir.Model]) -> None:
    prepared = prepare(small_cnn())
    assert prepared.layer("fc.weight").op == "Gemm"
    assert prepared.initializer("fc.weight").shape == (10, 256)
    with pytest.raises(UsageError, match=r"did you mean 'fc\.weight'"):
        prepared.layer("fc.wieght")


def test_layers_do_not_depend_on_the_declared_batch(small_cnn: Callable[..., ir.Model]) -> None:
    prepared = prepare(small_cnn())
    assert find_layers(prepared.model, {"x": random_images(prepared.input_shape, 1)}) == prepared.layers
    shape = prepared.model.graph.inputs[0].shape
    assert shape is not None
    assert str(shape[0]) == "n"  # the probe was a copy
