from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from qopt.graph.prepare import prepare
from qopt.graph.text import show


def test_golden(graph: Any) -> None:
    g = graph()
    conv = g.op("Conv", "x", g.random(16, 3, 3, 3, name="net.conv1.weight"), pads=[1] * 4)
    flat = g.op("Flatten", g.op("Relu", conv))
    logits = g.op("Gemm", flat, g.random(10, 1024, name="fc.weight"), transB=1)
    assert show(prepare(g.model(logits))) == (
        "net.conv1.weight  Conv  16x3x3x3  macs 27,648  x -> v2\n"
        "fc.weight         Gemm  10x1024   macs 10,240  v4 -> v6\n"
    )


def test_shared_weights_list_every_use(graph: Any) -> None:
    g = graph()
    weight = g.random(3, 3, 1, 1, name="w")
    twice = g.op("Conv", g.op("Relu", g.op("Conv", "x", weight)), weight)
    assert show(prepare(g.model(g.op("Flatten", twice)))) == "w  Conv  3x3x1x1  macs 1,152  x -> v2, v3 -> v4\n"


def test_a_network_without_layers(graph: Any) -> None:
    g = graph()
    assert show(prepare(g.model(g.op("Flatten", "x")))) == ""


def test_one_line_per_layer(small_cnn: Callable[..., ir.Model]) -> None:
    prepared = prepare(small_cnn())
    lines = show(prepared).splitlines()
    assert [line.split()[0] for line in lines] == [layer.name for layer in prepared.layers]
