"""What qopt says will run on integers is what ONNX Runtime runs on integers: its optimised graph is the oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qopt.emit import emit, integer_layers, runs_on_integers
from qopt.graph.model import Prepared
from qopt.graph.quantized import Quantized
from qopt.quant import AffineRange
from qopt.runtime.kernels import Kernels, count_kernels
from qopt.runtime.session import to_bytes

OPS = [
    "Conv", "grouped", "depthwise", "Conv1d", "ConvTranspose", "Gemm", "Gemm_t", "Gemm_row", "MatMul", "MatMul_left",
    "MatMul_3d",
]  # fmt: skip
AFTER = ["none", "Relu", "relu_twice", "clip6", "Sigmoid", "relu_logits"]
PACKING = {"Cast", "Gather", "Slice", "ConstantOfShape", "Div", "Mod", "ReduceSum"}


def kernels(prepared: Prepared, quantized: Quantized) -> Kernels:
    return count_kernels(to_bytes(emit(prepared, quantized)))


def check(prepared: Prepared, quantized: Quantized) -> bool:
    """Prediction and runtime agree, and no weight is dequantized in every run; returns what they agree on."""
    found = kernels(prepared, quantized)
    predicted = integer_layers(prepared, quantized)
    assert found.integer == len(predicted)
    assert found.integer + found.float_ == 1
    assert not PACKING & set(found.counts)
    # what stays are the activations' own, for float operators that read them, and the bias that keeps a weight float
    graph = prepared.model.graph
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    reads = sum(len(value.uses()) for value in values if value.name in quantized.activations)
    assert found.counts.get("DequantizeLinear", 0) <= reads + (not predicted)
    return bool(predicted)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("op", OPS)
def test_prediction_and_runtime_agree(
    op: str, after: str, one_layer: Callable[..., Prepared], codes_of: Callable[..., Any]
) -> None:
    """Every operator, with and without bias, before every kind of activation, in 8 and 4 bits, ranges fit or not."""
    if after == "relu_logits" and op not in ("Gemm", "Gemm_t", "Gemm_row", "MatMul", "MatMul_left"):
        return  # logits are rows
    fused = 0
    for bias in (True, False):
        prepared = one_layer(op, bias=bias, after=after)
        weights = codes_of(prepared, "int4")
        outputs: list[dict[str, AffineRange]] = [{}]
        for bits in (8, 4):
            outputs += [{"y": AffineRange.from_bounds(-4, 4, bits)}, {"r": AffineRange.from_bounds(0, 3, bits)}]
            outputs += [{"r": AffineRange.from_bounds(-1, 3, bits)}, {"r": AffineRange.from_bounds(0, 9, bits)}]
        for output in outputs:
            if "r" in output and after in ("none", "relu_logits"):
                continue
            activations = {"x": AffineRange.from_bounds(-1, 1, 8), **output}
            fused += check(prepared, Quantized(weights, {}, activations))
    assert (fused > 0) == (op != "ConvTranspose")


@pytest.mark.parametrize(
    ("op", "bias", "written", "kernel"),
    [
        ("Conv", True, True, "QLinearConv"), ("Conv", False, True, "QLinearConv"),
        ("grouped", True, True, "QLinearConv"), ("depthwise", True, True, "QLinearConv"),
        ("Conv1d", True, True, "QLinearConv"),
        ("Gemm", True, True, "QGemm"), ("Gemm", True, False, "QGemm"), ("Gemm_t", False, False, "QGemm"),
        ("MatMul", True, False, "QGemm"), ("MatMul", True, True, "QGemm"),
        ("MatMul", False, True, "QLinearMatMul"), ("MatMul", False, False, "MatMulIntegerToFloat"),
        ("MatMul_3d", False, True, "QLinearMatMul"), ("MatMul_3d", True, True, "MatMulIntegerToFloat"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "spec",
    ["int1", "ternary", "int2", "int3", "int3:full", "int3:mid", "int4:tensor", "int4:mid", "int8", "log2",
     "log3:tensor", "log4"],
)  # fmt: skip
def test_kernels_by_name(
    spec: str, op: str, bias: bool, written: bool, kernel: str, one_layer: Callable[..., Prepared],
    codes_of: Callable[..., Any],
) -> None:  # fmt: skip
    prepared = one_layer(op, bias=bias)
    activations = {"x": AffineRange.from_bounds(-1, 1, 8)}
    activations |= {"y": AffineRange.from_bounds(-4, 4, 8)} if written else {}
    found = kernels(prepared, Quantized(codes_of(prepared, spec), {}, activations))
    assert found.counts[kernel] == found.integer == 1
    assert found.float_ == 0


@pytest.mark.parametrize("bits", range(1, 9))
def test_few_bits_fuse_like_eight(bits: int, one_layer: Callable[..., Prepared], codes_of: Callable[..., Any]) -> None:
    """The clip is on the codes, behind QuantizeLinear, where it breaks no pattern."""
    for op, after, kernel in (
        ("Conv", "Relu", "QLinearConv"),
        ("Conv", "clip6", "QLinearConv"),
        ("Gemm", "Relu", "QGemm"),
    ):
        prepared = one_layer(op, after=after)
        activations = {"x": AffineRange.from_bounds(-1, 1, bits), "r": AffineRange.from_bounds(0, 3, bits)}
        found = kernels(prepared, Quantized(codes_of(prepared, "int4"), {}, activations))
        assert found.counts[kernel] == 1
        assert found.counts.get("Clip", 0) == (2 if bits < 8 else 0)
        assert not {"Relu", "FusedConv", "FusedGemm"} & set(found.counts)


def test_dequantize_linear_of_a_transposed_convolution_would_stay(one_layer: Callable[..., Prepared]) -> None:
    """The measurement behind the exception for ConvTranspose, taken on the pattern that the emitter avoids."""
    constants = {"s": np.float32(0.1), "z": np.uint8(0), "c": np.ones((4, 6, 3, 3), np.int8)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["c", "s"], ["w"]),
        helper.make_node("ConvTranspose", ["d", "w"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["out"]),
    ]
    info = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", c, None, None]) for n, c in (("x", 4), ("out", 6))
    ]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], stored),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    found = count_kernels(proto.SerializeToString())
    assert (found.integer, found.float_) == (0, 1)
    assert found.counts["DequantizeLinear"] == 3
    prepared = one_layer("ConvTranspose")
    codes = {"x": AffineRange.from_bounds(-1, 1, 8), "y": AffineRange.from_bounds(-1, 1, 8)}
    assert not runs_on_integers(prepared.layers[0], Quantized({}, {}, codes))


def test_what_the_layer_alone_tells(one_layer: Callable[..., Prepared], codes_of: Callable[..., Any]) -> None:
    prepared = one_layer("Conv")
    layer = prepared.layers[0]
    codes = {"x": AffineRange.from_bounds(-1, 1, 8)}
    assert runs_on_integers(layer, Quantized(codes_of(prepared, "log4"), {}, codes))
    assert not runs_on_integers(layer, Quantized(codes_of(prepared, "log5"), {}, codes))  # float levels
    assert not runs_on_integers(layer, Quantized(codes_of(prepared, "int4"), {}, {}))
    assert not runs_on_integers(layer, Quantized({}, {}, codes))
    transposed = one_layer("ConvTranspose")
    assert not runs_on_integers(transposed.layers[0], Quantized(codes_of(transposed, "int4"), {}, codes))
    # the convolution writes float, so although the layer alone would do, the network does not fuse
    assert not integer_layers(prepared, Quantized(codes_of(prepared, "int4"), {}, codes))


def test_a_constant_that_is_no_bias(graph: Any, codes_of: Callable[..., Any]) -> None:
    """A row (1, n) behind a MatMul is not the layer's bias, but ONNX Runtime makes a Gemm of it that cannot fuse."""
    g = graph((16,))
    g.op("MatMul", ["x", g.random("l.weight", 16, 10)], "y")
    g.op("Add", ["y", g.random("row", 1, 10)], "shifted")
    g.head("shifted")
    prepared = g.prepared()
    assert prepared.layers[0].uses[0].bias is None
    codes = {"x": AffineRange.from_bounds(-1, 1, 8)}
    assert not check(prepared, Quantized(codes_of(prepared, "int4"), {}, codes))
    assert check(prepared, Quantized(codes_of(prepared, "int4"), {}, codes | {"y": AffineRange.from_bounds(-4, 4, 8)}))


def test_computed_clip_bounds_are_not_trusted(graph: Any, codes_of: Callable[..., Any]) -> None:
    g = graph((16,))
    g.op("Gemm", ["x", g.random("l.weight", 16, 10)], "y")
    g.op("ReduceMax", ["y"], "top", keepdims=0)
    g.op("Clip", ["y", g.constant("zero", np.float32(0)), "top"], "r")
    g.head("r")
    prepared = g.prepared()
    codes = {"x": AffineRange.from_bounds(-1, 1, 8), "r": AffineRange.from_bounds(0, 3, 4)}
    check(prepared, Quantized(codes_of(prepared, "int4"), {}, codes))
    assert "Clip" in [n.op_type for n in emit(prepared, Quantized({}, {}, codes)).graph]


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul_3d"])
def test_a_value_that_leaves_the_graph_blocks_fusion(op: str, graph: Any, codes_of: Callable[..., Any]) -> None:
    """An output of the layer that is also an output of the graph must be float there."""
    g = graph((4, 8, 8) if op == "Conv" else (5, 16) if op == "MatMul_3d" else (16,))
    if op == "Conv":
        g.op("Conv", ["x", g.random("l.weight", 6, 4, 3, 3)], "y")
    else:
        g.op(op.removesuffix("_3d"), ["x", g.random("l.weight", 16, 10)], "y")
    g.head("y")
    prepared = g.prepared()
    codes = {"x": AffineRange.from_bounds(-1, 1, 8), "y": AffineRange.from_bounds(-4, 4, 8)}
    quantized = Quantized(codes_of(prepared, "int4"), {}, codes)
    assert integer_layers(prepared, quantized) == {"l.weight"}
    prepared.model.graph.outputs.append(prepared.model.graph[0].outputs[0])
    assert integer_layers(prepared, quantized) == frozenset()
    found = kernels(prepared, quantized)
    assert (found.integer, found.float_) == (0, 1)
