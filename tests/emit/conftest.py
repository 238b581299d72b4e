from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare
from qopt.quant import quantize_weight
from qopt.runtime.session import to_bytes
from qopt.spec import WeightSpec

Array = NDArray[Any]


class Graph:
    """A small ONNX graph under construction, one image input called ``x`` and one output called ``logits``."""

    def __init__(self, shape: tuple[int, ...], seed: int = 0) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.generator = np.random.default_rng(seed)

    def random(self, name: str, *shape: int, scale: float = 0.3) -> str:
        return self.constant(name, (self.generator.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def op(self, kind: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name or f"node_{output}", **attributes))
        return output

    def head(self, value: str) -> None:
        """Features to logits without another layer: their flattened double."""
        self.op("Flatten", [value], "flat")
        self.op("Mul", ["flat", self.constant("two", np.float32(2))], "logits")

    def proto(self, batch: int | str = "n") -> onnx.ModelProto:
        image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, *self.shape])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "user", [image], [logits], initializer=self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)

    def prepared(self) -> Prepared:
        return prepare(ir.serde.deserialize_model(self.proto()))


SHAPES = {
    "Conv": (4, 8, 8), "grouped": (4, 8, 8), "depthwise": (4, 8, 8), "Conv1d": (4, 16), "ConvTranspose": (4, 8, 8),
    "Gemm": (16,), "Gemm_t": (16,), "Gemm_row": (16,), "MatMul": (16,), "MatMul_left": (16,), "MatMul_3d": (5, 16),
}  # fmt: skip


def layer(g: Graph, op: str, bias: bool) -> None:
    """A layer ``l.weight`` from ``x`` to ``y``: 6 channels in convolutions, 10 in products (4 where depthwise)."""

    def convolution(kind: str, weight: tuple[int, ...], channels: int, **attributes: Any) -> None:
        inputs = ["x", g.random("l.weight", *weight)] + ([g.random("l.bias", channels)] if bias else [])
        g.op(kind, inputs, "y", name="l", **attributes)

    if op == "Conv":
        convolution("Conv", (6, 4, 3, 3), 6, pads=[1] * 4)
    elif op == "grouped":
        convolution("Conv", (6, 2, 3, 3), 6, group=2, strides=[2, 2])
    elif op == "depthwise":
        convolution("Conv", (4, 1, 3, 3), 4, group=4)
    elif op == "Conv1d":
        convolution("Conv", (6, 4, 3), 6)
    elif op == "ConvTranspose":
        convolution("ConvTranspose", (4, 6, 3, 3), 6, strides=[2, 2])
    elif op.startswith("Gemm"):
        shape, extra = ((10, 16), {"transB": 1}) if op == "Gemm_t" else ((16, 10), {})
        row = (1, 10) if op == "Gemm_row" else (10,)
        inputs = ["x", g.random("l.weight", *shape)] + ([g.random("l.bias", *row)] if bias else [])
        g.op("Gemm", inputs, "y", name="l", **extra)
    else:
        g.op("MatMul", ["x", g.random("l.weight", 16, 10)], "product" if bias else "y", name="l")
        if bias:
            terms = ["product", g.random("l.bias", 10)]
            g.op("Add", terms[::-1] if op == "MatMul_left" else terms, "y", name="l_add")


def tail(g: Graph, kind: str) -> None:
    """What follows ``y``; an activation's output is ``r``."""
    if kind == "none":
        g.head("y")
    elif kind == "relu_logits":
        g.op("Relu", ["y"], "logits")
    elif kind == "relu_twice":
        g.op("Relu", ["y"], "r")
        g.head(g.op("Add", ["r", "r"], "both"))
    elif kind == "clip6":
        bounds = [g.constant("six_low", np.float32(0)), g.constant("six_high", np.float32(6))]
        g.head(g.op("Clip", ["y", *bounds], "r"))
    else:
        g.head(g.op(kind, ["y"], "r"))


def one_layer_network(op: str, *, bias: bool = True, after: str = "none", seed: int = 0) -> Prepared:
    g = Graph(SHAPES[op], seed)
    layer(g, op, bias)
    tail(g, after)
    return g.prepared()


@pytest.fixture(scope="session")
def graph() -> type[Graph]:
    return Graph


@pytest.fixture(scope="session")
def one_layer() -> Callable[..., Prepared]:
    """A network of one layer ``l.weight`` (see `layer`) and an activation behind it (see `tail`)."""
    made: dict[tuple[Any, ...], Prepared] = {}

    def get(op: str, *, bias: bool = True, after: str = "none", seed: int = 0) -> Prepared:
        key = (op, bias, after, seed)
        if key not in made:
            made[key] = one_layer_network(op, bias=bias, after=after, seed=seed)
        return made[key]

    return get


@pytest.fixture(scope="session")
def codes_of() -> Callable[..., dict[str, Any]]:
    """Every layer of a network, or those named, in one format."""

    def quantize(prepared: Prepared, spec: str, *names: str) -> dict[str, Any]:
        return {
            layer.name: quantize_weight(
                torch.from_numpy(prepared.initializer(layer.initializer).copy()),
                WeightSpec.parse(spec),
                layer.channel_axis,
            )
            for layer in prepared.layers
            if not names or layer.name in names
        }

    return quantize


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., Array]:
    """An oracle without qopt: any value of a graph in ONNX Runtime, by default unoptimised, or in the reference."""

    def run(model: ir.Model, feed: Mapping[str, Array], value: str, how: str = "plain") -> Array:
        proto = onnx.load_from_string(to_bytes(model))
        if value not in [o.name for o in proto.graph.output]:
            proto.graph.output.append(onnx.ValueInfoProto(name=value))
        if how == "reference":
            kind = next(n.op_type for n in proto.graph.node if value in n.output)
            dtype = TensorProto.UINT8 if kind == "QuantizeLinear" else TensorProto.FLOAT
            proto.graph.output[-1].CopyFrom(helper.make_tensor_value_info(value, dtype, None))
            evaluator = onnx.reference.ReferenceEvaluator(proto)
            result: Array = np.asarray(evaluator.run([value], dict(feed))[0])  # type: ignore[index]
            return result
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        if how == "plain":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found: Array = session.run([value], dict(feed))[0]
        return found

    return run


@pytest.fixture(scope="session")
def images() -> Callable[..., NDArray[np.float32]]:
    """Images for a network, uniform in [low, high]."""

    def make(prepared: Prepared, count: int = 3, low: float = -1.0, high: float = 1.0) -> NDArray[np.float32]:
        generator = np.random.default_rng(1)
        return generator.uniform(low, high, (count, *prepared.input_shape)).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def three_layers(graph: Any) -> Prepared:
    """Sizes that fill their last byte and sizes that do not, and no initializer besides weights."""
    g = graph((3, 6, 6))
    g.op("Conv", ["x", g.random("a.weight", 5, 3, 3, 3)], "a")
    g.op("Relu", ["a"], "ar")
    g.op("ConvTranspose", ["ar", g.random("b.weight", 5, 3, 1, 1)], "b")
    g.op("Flatten", ["b"], "flat")
    g.op("Gemm", ["flat", g.random("c.weight", 48, 7)], "logits")
    prepared: Prepared = g.prepared()
    return prepared
