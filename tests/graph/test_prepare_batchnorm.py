"""Folding batch norm: exact where it is allowed, left alone where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from qopt.graph.compare import TOLERANCE, difference, random_images
from qopt.graph.fold_batchnorm import fold_batchnorm
from qopt.graph.names import name_everything
from qopt.graph.prepare import prepare

Run = Callable[[ir.Model, NDArray[np.float32]], NDArray[Any]]


def _conv(g: Any) -> str:
    return str(g.norm(g.op("Conv", "x", g.random(4, 3, 3, 3, name="w"), g.random(4, name="b")), 4))


def _bare_conv(g: Any) -> str:
    return str(g.norm(g.op("Conv", "x", g.random(6, 1, 3, 3, name="w"), group=3), 6))


def _up(g: Any) -> str:
    return str(g.norm(g.op("ConvTranspose", "x", g.random(3, 4, 2, 2, name="w"), strides=[2, 2]), 4))


def _grouped_up(g: Any) -> str:
    return str(g.norm(g.op("ConvTranspose", "x", g.random(3, 2, 2, 2, name="w"), g.random(6), group=3), 6))


def _gemm(g: Any) -> str:
    return str(g.norm(g.op("Gemm", g.op("Flatten", "x"), g.random(5, 192, name="w"), g.random(1, 5), transB=1), 5))


def _stored_gemm(g: Any) -> str:
    return str(g.norm(g.op("Gemm", g.op("Flatten", "x"), g.random(192, 5, name="w"), g.random()), 5))


def _two_in_a_row(g: Any) -> str:
    return str(g.norm(_conv(g), 4, epsilon=0.1))


FOLDED = {
    "conv": (_conv, 1),
    "conv without bias, grouped": (_bare_conv, 1),
    "transposed": (_up, 1),
    "transposed, grouped": (_grouped_up, 1),
    "gemm": (_gemm, 1),
    "gemm stored the other way, scalar bias": (_stored_gemm, 1),
    "two norms": (_two_in_a_row, 2),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str, graph: Any, run: Run) -> None:
    build, count = FOLDED[name]
    g = graph()
    model = g.model(g.op("Flatten", build(g)))
    images = random_images((3, 8, 8), 2)
    expected = run(model, images)
    assert fold_batchnorm(model) == count
    assert "w" in model.graph.initializers
    assert all(node.op_type != "BatchNormalization" for node in model.graph)
    assert difference(run(model, images), expected) <= TOLERANCE


def _two_readers(g: Any) -> str:
    conv = g.op("Conv", "x", g.random(3, 3, 3, 3))
    return str(g.op("Add", g.norm(conv, 3), conv))


def _shared_weight(g: Any) -> str:
    weight = g.random(3, 3, 1, 1)
    return str(g.norm(g.op("Conv", g.op("Conv", "x", weight), weight), 3))


def _computed_weight(g: Any) -> str:
    weight = g.op("Mul", g.random(4, 3, 3, 3), g.op("ReduceMax", "x", keepdims=0))
    return str(g.norm(g.op("Conv", "x", weight), 4))


def _computed_scale(g: Any) -> str:
    scale = g.op("Reshape", g.op("ReduceMax", "x", g.ints(0, 2, 3)), g.ints(3))
    conv = g.op("Conv", "x", g.random(3, 3, 3, 3))
    return str(g.op("BatchNormalization", conv, scale, g.random(3), g.random(3), g.positive(3)))


def _scaled_gemm(g: Any) -> str:
    return str(g.norm(g.op("Gemm", g.op("Flatten", "x"), g.random(192, 5), alpha=0.5), 5))


def _overflow(g: Any) -> str:
    parts = [g.constant([1e30] * 3), g.random(3), g.random(3), g.constant([1e-30] * 3)]
    return str(g.op("BatchNormalization", g.op("Conv", "x", g.random(3, 3, 1, 1)), *parts, epsilon=0.0))


def _first(g: Any) -> str:
    return str(g.norm("x", 3))


@pytest.mark.parametrize(
    "build", [_two_readers, _shared_weight, _computed_weight, _computed_scale, _scaled_gemm, _overflow, _first]
)
def test_left_alone(build: Callable[[Any], str], graph: Any) -> None:
    g = graph()
    model = g.model(g.op("Flatten", build(g)))
    before = ir.serde.serialize_model(model).SerializeToString()
    assert fold_batchnorm(model) == 0
    assert ir.serde.serialize_model(model).SerializeToString() == before


def test_the_layer_takes_the_place_of_the_output(graph: Any, run: Run) -> None:
    g = graph()
    logits = g.norm(g.op("Gemm", g.op("Flatten", "x"), g.random(5, 192, name="fc.weight"), transB=1), 5)
    model = g.model(logits)
    prepared = prepare(model)
    assert prepared.output == logits
    assert prepared.layers[0].uses[0].bias == "fc.bias"
    images = random_images((3, 8, 8), 2)
    assert difference(run(prepared.model, images), run(model, images)) <= TOLERANCE


def test_a_bias_that_others_read_is_not_touched(graph: Any, run: Run) -> None:
    g = graph()
    bias = g.random(4, name="a.bias")
    first = g.norm(g.op("Conv", "x", g.random(4, 3, 1, 1, name="a.weight"), bias), 4)
    model = g.model(g.op("Flatten", g.op("Conv", first, g.random(4, 4, 1, 1), bias)))
    prepared = prepare(model)
    assert [layer.uses[0].bias for layer in prepared.layers] == ["a.bias_2", "a.bias"]
    images = random_images((3, 8, 8), 2)
    assert difference(run(prepared.model, images), run(model, images)) <= TOLERANCE


def test_values_without_a_name_get_one(small_cnn: Callable[..., ir.Model]) -> None:
    model = small_cnn()
    for node in model.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].name = None
        node.name = None
    assert name_everything(model) == len(model.graph)
    values = [output.name for node in model.graph for output in node.outputs]
    assert values[0] == "Conv_0_output"
    assert len(set(values)) == len(values)
    assert name_everything(model) == 0
