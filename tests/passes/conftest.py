"""Small networks written as ONNX text, and oracles on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper, parser
from torch.fx import GraphModule, Interpreter, Node

from qopt.graph.model import Prepared
from qopt.graph.prepare import prepare

HEADER = '<ir_version: 10, opset_import: ["": 21]>\nnet '


def _network(text: str, constants: Mapping[str, NDArray[Any]] | None = None) -> Prepared:
    """Prepare ``text``: all inputs after the first are weights, random unless ``constants`` holds them."""
    proto = parser.parse_model(HEADER + text)
    generator = np.random.default_rng(0)
    for value in list(proto.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        fan_in = float(np.prod(shape[1:])) if len(shape) > 1 else 16.0
        array = generator.standard_normal(shape).astype(np.float32) / np.float32(np.sqrt(fan_in))
        array = (constants or {}).get(value.name, array)
        proto.graph.initializer.append(numpy_helper.from_array(array, value.name))
        proto.graph.input.remove(value)
    return prepare(ir.serde.deserialize_model(proto))


@pytest.fixture(scope="session")
def network() -> Callable[..., Prepared]:
    """From ONNX text to a prepared network."""
    return _network


NETWORKS = {
    "plain": """(float[n,3,8,8] x, float[4,3,3,3] w1, float[4] b1, float[6,4,3,3] w2, float[6] b2,
            float[5,96] w3, float[5] b3) => (float[n,5] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,1,1], strides = [2,2]> (r1, w2, b2)
        r2 = Relu (c2)
        f = Flatten (r2)
        y = Gemm <transB = 1> (f, w3, b3)
    }""",
    "residual": """(float[n,2,6,6] x, float[4,2,3,3] w1, float[4] b1, float[4,4,3,3] w2, float[4] b2,
            float[4,2,1,1] w3, float[3,4] w4, float[3] b4) => (float[n,3] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
        s = Conv (x, w3)
        a = Add (c2, s)
        r2 = Relu (a)
        g = GlobalAveragePool (r2)
        f = Flatten (g)
        y = Gemm <transB = 1> (f, w4, b4)
    }""",
    "concat": """(float[n,2,6,6] x, float[3,2,1,1] w1, float[2,2,3,3] w2, float[2] b2, float[4,5,3,3] w3, float[4] b3,
            float[3,64] w4) => (float[n,3] y) {
        c1 = Conv (x, w1)
        c2 = Conv <pads = [1,1,1,1]> (x, w2, b2)
        r2 = Relu (c2)
        j = Concat <axis = 1> (c1, r2)
        c3 = Conv (j, w3, b3)
        r3 = Relu (c3)
        f = Flatten (r3)
        y = Gemm <transB = 1> (f, w4)
    }""",
    "depthwise": """(float[n,4,6,6] x, float[4,1,3,3] w1, float[4] b1, float[6,4,1,1] w2, float[6,6] w3, float[6] b3)
            => (float[n,6] y) <float low = {0}, float high = {6}> {
        c1 = Conv <pads = [1,1,1,1], group = 4> (x, w1, b1)
        r1 = Clip (c1, low, high)
        c2 = Conv (r1, w2)
        g = GlobalAveragePool (c2)
        f = Flatten (g)
        y = Gemm (f, w3, b3)
    }""",
    "mlp": """(float[n,2,4,4] x, float[32,12] w1, float[12] b1, float[12,8] w2, float[8,4] w3, float[4] b3)
            => (float[n,4] y) {
        f = Flatten (x)
        m1 = MatMul (f, w1)
        a1 = Add (m1, b1)
        r1 = Relu (a1)
        m2 = MatMul (r1, w2)
        r2 = Relu (m2)
        m3 = MatMul (r2, w3)
        y = Add (b3, m3)
    }""",
    "pool": """(float[n,2,8,8] x, float[4,2,3,3] w1, float[4] b1, float[4,4,3,3] w2, float[4] b2, float[3,16] w3)
            => (float[n,3] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        p1 = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c1)
        r1 = Relu (p1)
        c2 = Conv <pads = [1,1,1,1]> (r1, w2, b2)
        r2 = Relu (c2)
        p2 = AveragePool <kernel_shape = [2,2], strides = [2,2]> (r2)
        f = Flatten (p2)
        y = Gemm <transB = 1> (f, w3)
    }""",
    "tokens": """(float[n,5,6] x, float[6,8] w1, float[8] b1, float[8,6] w2, float[6,4] w3, float[4] b3)
            => (float[n,4] y) <int64[1] axis = {1}> {
        m1 = MatMul (x, w1)
        a1 = Add (m1, b1)
        g = Sigmoid (a1)
        m2 = MatMul (g, w2)
        r = ReduceMean <keepdims = 0> (m2, axis)
        m3 = MatMul (r, w3)
        y = Add (m3, b3)
    }""",
    "shared": """(float[n,3,6,6] x, float[3,3,3,3] w, float[3] b, float[4,108] w2) => (float[n,4] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w, b)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,1,1]> (r1, w, b)
        f = Flatten (c2)
        y = Gemm <transB = 1> (f, w2)
    }""",
    "static": """(float[2,2,5,5] x, float[2,2,5,5] same, float[3,2,3,3] w1, float[3] b1, float[4,27] w2, float[4] b2)
            => (float[2,4] y) {
        bound = Add (x, same)
        c = Conv (bound, w1, b1)
        r = Relu (c)
        f = Flatten (r)
        y = Gemm <transB = 1> (f, w2, b2)
    }""",
}
"""Networks by name; ``static`` takes two images at a time, and each row of its logits depends on its image only."""


@pytest.fixture(scope="session")
def networks() -> dict[str, Prepared]:
    """All `NETWORKS`, prepared; tests must not change them."""
    same = np.tile(np.random.default_rng(5).standard_normal((1, 2, 5, 5)).astype(np.float32), (2, 1, 1, 1))
    return {name: _network(text, {"same": same}) for name, text in NETWORKS.items()}


def _images(prepared: Prepared, count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, *prepared.input_shape, generator=generator)


@pytest.fixture(scope="session")
def images() -> Callable[..., torch.Tensor]:
    """Random images that a prepared network takes."""
    return _images


class _Recorder(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def _record(graph: GraphModule, images: torch.Tensor) -> dict[Node, Any]:
    recorder = _Recorder(graph)
    with torch.no_grad():
        recorder.run(images)
    return recorder.seen


@pytest.fixture(scope="session")
def record() -> Callable[[GraphModule, torch.Tensor], dict[Node, Any]]:
    """What every node of a twin computes for one batch."""
    return _record


def _onnx_values(
    model: ir.Model, names: list[str], images: torch.Tensor, *, optimize: bool = False
) -> dict[str, NDArray[np.float32]]:
    import onnxruntime

    proto = ir.serde.serialize_model(model)
    for name in names:
        if name not in {output.name for output in proto.graph.output}:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    feeds = {session.get_inputs()[0].name: images.numpy()}
    asked = [name for name in names if name != session.get_inputs()[0].name]
    found = dict(zip(asked, session.run(asked, feeds), strict=True))
    return {name: found.get(name, images.numpy()) for name in names}


@pytest.fixture(scope="session")
def onnx_values() -> Callable[..., dict[str, NDArray[np.float32]]]:
    """An oracle that shares no code with qopt: what ONNX Runtime computes for named values of a graph."""
    return _onnx_values
