"""What has no C code is refused by name, and sums that 32 bits do not hold are found before they happen."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from qopt.emit.c import emit_c
from qopt.emit.c.network import read_network
from qopt.errors import ModelError, UnsupportedModelError, UsageError
from qopt.quant import AffineRange, QuantizedWeight, quantize_weight
from qopt.spec import WeightSpec


def one(g: Any, kind: str, **attributes: Any) -> Any:
    """An operator behind a convolution."""
    g.op("Relu", [g.conv("x", "a", 4, 4, 3, 3, pads=[1] * 4)], "ar")
    return g.head(g.op(kind, ["ar"], "y", **attributes)).prepared()


@pytest.mark.parametrize(("kind", "attributes", "word"), [
    ("Sigmoid", {}, "node 'node_y': Sigmoid is not in C code"),
    ("Softmax", {"axis": 1}, "Softmax is not in C code"),
    ("Transpose", {"perm": [0, 2, 3, 1]}, "Transpose that moves elements"),
    ("AveragePool", {"kernel_shape": [3, 3], "ceil_mode": 1, "strides": [2, 2]}, "AveragePool with ceil_mode"),
])  # fmt: skip
def test_operators_by_name(kind: str, attributes: dict[str, Any], word: str, graph: Any, quantized: Any) -> None:
    prepared = one(graph(4, 8, 8), kind, **attributes)
    codes = quantized(prepared, "int8")
    everything = {str(v.name): AffineRange(0.015625, 0, 8) for n in prepared.model.graph for v in n.outputs[:1]}
    del everything["logits"]
    codes = replace(codes, activations={**everything, **codes.activations})
    with pytest.raises(UnsupportedModelError, match=word) as caught:
        emit_c(prepared, codes, name="net")
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, ModelError)


def test_other_networks(graph: Any, quantized: Any) -> None:
    g = graph(4, 8, 8)
    g.op("ConvTranspose", ["x", g.random("a.weight", 4, 3, 2, 2)], "a")
    transposed = g.head("a").prepared()
    g = graph(4, 8, 8)
    g.op("Add", ["x", g.random("shift", 4, 1, 1)], "a")
    shifted = g.head(g.conv("a", "b", 3, 4, 3, 3)).prepared()
    g = graph(4, 8, 8)
    g.op("Add", [g.conv("x", "a", 4, 4, 3, 3), g.conv("x", "b", 1, 4, 3, 3)], "c")
    broadcast = g.head("c").prepared()
    g = graph(4, 8, 8)
    g.op("ReduceMean", [g.conv("x", "a", 4, 4, 3, 3), g.constant("axes", np.array([1, 2]))], "m")
    channels = g.head("m").prepared()
    for prepared, word in (
        (transposed, "node_a.*ConvTranspose"), (shifted, "node_a.*Add of the constant 'shift'"),
        (broadcast, "node_c.*Add of shapes"), (channels, "node_m.*behind"),
    ):  # fmt: skip
        names = [str(v.name) for n in prepared.model.graph for v in n.outputs if v.name not in ("logits", "flat")]
        codes = quantized(prepared, "int8")
        all_codes = dict.fromkeys([*names, "x"], AffineRange(0.015625, 0, 8))
        with pytest.raises(UnsupportedModelError, match=word):
            read_network(prepared, replace(codes, activations=all_codes))


@pytest.mark.parametrize("missing", ["x", "ar", "b", "sum", "mean"])
def test_every_activation_must_be_quantized(missing: str, graph: Any, quantized: Any) -> None:
    g = graph(4, 8, 8)
    g.op("Relu", [g.conv("x", "a", 4, 4, 3, 3, pads=[1] * 4)], "ar")
    g.op("Add", [g.conv("ar", "b", 4, 4, 3, 3, pads=[1] * 4), "ar"], "sum")
    g.op("GlobalAveragePool", ["sum"], "mean")
    prepared = g.head("mean").prepared()
    codes = quantized(prepared, "int8")
    left = {name: code for name, code in codes.activations.items() if name != missing}
    with pytest.raises(UnsupportedModelError, match=f"tensor '{missing}'.*quantize activations"):
        emit_c(prepared, replace(codes, activations=left), name="net")


def test_every_weight_must_be_quantized(graph: Any, quantized: Any) -> None:
    prepared = one(graph(4, 8, 8), "Identity")
    codes = quantized(prepared, "int8")
    left = {name: weight for name, weight in codes.weights.items() if name != "a.weight"}
    with pytest.raises(UnsupportedModelError, match=r"a\.weight: the weight is not quantized"):
        emit_c(prepared, replace(codes, weights=left), name="net")


def with_weight(prepared: Any, codes: Any, weight: Any) -> Any:
    return replace(codes, weights={**codes.weights, "logits.weight": weight})


def test_sums_that_overflow(graph: Any, quantized: Any) -> None:
    """127 * 255 * 70000 is above 2**31 and 127 * 255 * 60000 is not; 1-bit codes leave room."""
    for taps, bits, fits in ((60_000, 8, True), (70_000, 8, False), (70_000, 7, True), (70_000, 1, True)):
        g = graph(taps)
        g.op("Gemm", ["x", g.constant("w", np.full((2, taps), 0.5, np.float32))], "logits", transB=1)
        prepared = g.prepared()
        name = prepared.layers[0].name
        weights = {name: quantize_weight(torch.full((2, taps), 0.5), WeightSpec.parse("int8:max"))}
        codes = replace(quantized(prepared, "int8"), weights=weights, activations={"x": AffineRange(0.5, 0, bits)})
        if fits:
            assert read_network(prepared, codes).output.code.wide
        else:
            with pytest.raises(UnsupportedModelError, match=r"32-bit accumulator.*got 22669\d{5}.*fewer bits"):
                read_network(prepared, codes)


def test_zero_points_count_in_sums(graph: Any, quantized: Any) -> None:
    """The bias holds the zero point: with both halves of the range in use, sums are still proved."""
    g = graph(40_000)
    weight = np.where(np.arange(40_000) < 20_000, 0.5, -0.5).astype(np.float32) * np.ones((1, 1), np.float32)
    g.op("Gemm", ["x", g.constant("w", np.repeat(weight, 2, 0))], "logits", transB=1)
    prepared = g.prepared()
    codes = replace(quantized(prepared, "int8:max"), activations={"x": AffineRange(0.5, 128, 8)})
    (step,) = read_network(prepared, codes).steps
    sums = [127 * 20_000 * 255, -127 * 20_000 * 255]
    (part,) = getattr(step, "parts")  # noqa: B009
    assert (part.bias == 0).all()
    assert part.levels[0].sum() == 0
    assert max(sums) < 2**31


def test_log_levels_that_need_more_than_shifts(graph: Any, quantized: Any) -> None:
    prepared = one(graph(4, 8, 8), "Identity")
    codes = quantized(prepared, "int8")
    weight = torch.from_numpy(prepared.initializer("logits.weight").copy())
    weight[0, 0], weight[0, 1] = 1.0, 2.0**-40
    too_far = quantize_weight(weight, WeightSpec.parse("log8:max"))
    assert isinstance(too_far, QuantizedWeight)
    with pytest.raises(UnsupportedModelError, match=r"logits\.weight.*shifts in 32 bits.*log8.*use log4"):
        emit_c(prepared, with_weight(prepared, codes, too_far), name="net")
    weight[0, 1] = 2.0**-20
    near = quantize_weight(weight, WeightSpec.parse("log8:max"))
    with pytest.raises(UnsupportedModelError, match=r"logits\.weight.*32-bit accumulator"):
        emit_c(prepared, with_weight(prepared, codes, near), name="net")


@pytest.mark.parametrize("name", ["", "Net", "1net", "my net", "net-2", "nét", "a" * 32, "net;", "../net"])
def test_names(name: str, graph: Any, quantized: Any) -> None:
    prepared = one(graph(4, 8, 8), "Identity")
    with pytest.raises(UsageError, match="not a name for C code"):
        emit_c(prepared, quantized(prepared, "int8"), name=name)
