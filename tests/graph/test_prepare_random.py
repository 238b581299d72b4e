"""Random small networks, at old and new opsets: cleaned, freed and imported, they compute what they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.graph.compare import TOLERANCE, difference, random_images
from qopt.graph.prepare import prepare
from qopt.graph.twin import build_twin

Run = Callable[[ir.Model, NDArray[np.float32]], NDArray[Any]]


def _activation(draw: st.DrawFn, g: Any, data: str) -> str:
    kind = draw(st.sampled_from(["Relu", "Clip", "LeakyRelu", "Sigmoid", "Dropout"]))
    if kind == "Clip":
        if g.opset < 11:
            return str(g.op("Clip", data, min=0.0, max=6.0))
        return str(g.op("Clip", data, g.constant(0.0), g.constant(6.0)))
    if kind == "Dropout" and g.opset < 12:
        return str(g.op("Dropout", data, ratio=0.4))
    return str(g.op(kind, data, **({"alpha": 0.1} if kind == "LeakyRelu" else {})))


def _conv(draw: st.DrawFn, g: Any, data: str, channels: int, wanted: int, stride: int = 1) -> str:
    kernel = draw(st.sampled_from([1, 3]))
    groups = channels if wanted % channels == 0 and draw(st.booleans()) else 1
    inputs = [data, g.random(wanted, channels // groups, kernel, kernel)]
    if draw(st.booleans()):
        inputs.append(g.random(wanted))
    pads = [kernel // 2] * 4
    result = str(g.op("Conv", *inputs, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=pads, group=groups))
    return str(g.norm(result, wanted)) if draw(st.booleans()) else result


def _block(draw: st.DrawFn, g: Any, data: str, channels: int) -> str:
    inner = _activation(draw, g, _conv(draw, g, data, channels, channels))
    return str(g.op("Relu", g.op("Add", _conv(draw, g, inner, channels, channels), data)))


def _head(draw: st.DrawFn, g: Any, data: str, features: int) -> str:
    kind = draw(st.sampled_from(["Gemm", "MatMul", "Reshape"]))
    batch = g.batch if isinstance(g.batch, int) else -1
    flat = g.op("Flatten", data) if kind == "Gemm" else g.op("Reshape", data, g.ints(batch, features))
    if kind == "Gemm" and draw(st.booleans()):
        hidden = g.op("Gemm", flat, g.random(6, features), g.random(6), transB=1)
        flat, features = str(g.norm(hidden, 6)), 6
    if kind == "MatMul":
        return str(g.op("Add", g.op("MatMul", flat, g.random(features, 5)), g.random(5)))
    return str(g.op("Gemm", flat, g.random(features, 5), g.random(5)))


@st.composite
def networks(draw: st.DrawFn, graph: Any) -> ir.Model:
    g = graph((2, 6, 6), opset=draw(st.sampled_from([9, 13, 18, 21])), batch=draw(st.sampled_from(["n", 1, 2])))
    channels = draw(st.sampled_from([2, 4]))
    stride = draw(st.sampled_from([1, 2]))
    data = _conv(draw, g, "x", 2, channels, stride)
    for _ in range(draw(st.integers(0, 2))):
        data = _block(draw, g, data, channels)
    size = 6 // stride
    if draw(st.booleans()):
        data, size = g.op("GlobalAveragePool", data), 1
    logits = _head(draw, g, data, channels * size * size)
    model: ir.Model = g.model(logits)
    return model


@settings(max_examples=60)
@given(data=st.data())
def test_random_networks_survive(data: st.DataObject, graph: Any, run: Run) -> None:
    model = data.draw(networks(graph))
    before = ir.serde.serialize_model(model).SerializeToString()
    prepared = prepare(model)
    images = random_images((2, 6, 6), 4, seed=7)
    shape = model.graph.inputs[0].shape
    assert shape is not None
    taken = shape[0] if isinstance(shape[0], int) else 4
    expected = np.concatenate([run(model, images[i : i + taken]) for i in range(0, 4, taken)])
    assert prepared.batch is None
    assert difference(run(prepared.model, images), expected) <= TOLERANCE
    with torch.no_grad():
        assert difference(build_twin(prepared)(torch.from_numpy(images)).numpy(), expected) <= TOLERANCE
    assert ir.serde.serialize_model(model).SerializeToString() == before


@settings(max_examples=15)
@given(data=st.data())
def test_preparing_twice_changes_nothing(data: st.DataObject, graph: Any) -> None:
    prepared = prepare(data.draw(networks(graph)))
    again = prepare(prepared.model)
    assert again.digest == prepared.digest
    assert [layer.name for layer in again.layers] == [layer.name for layer in prepared.layers]
    assert again.layers == prepared.layers
    assert len(again.model.graph) == len(prepared.model.graph)
