"""Small networks written as ONNX text, float and quantized, and attacks that try to break every bound on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper, parser
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from qopt.graph.prepare import prepare
from qopt.plan import Defaults, Plan
from qopt.quantize import Quantizer
from qopt.threat import ThreatModel

HEADER = '<ir_version: 10, opset_import: ["": 21]>\nnet '

NETWORKS = {
    "plain": """(float[n,2,6,6] x, float[4,2,3,3] w1, float[4] b1, float[5,4,3,3] w2, float[5] b2,
            float[4,45] w3, float[4] b3) => (float[n,4] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r1 = Relu (c1)
        c2 = Conv <pads = [1,1,0,0], strides = [2,2]> (r1, w2, b2)
        r2 = Relu (c2)
        f = Flatten (r2)
        y = Gemm <transB = 1> (f, w3, b3)
    }""",
    "residual": """(float[n,2,5,5] x, float[4,2,3,3] w1, float[4] b1, float[4,4,3,3] w2, float[4] b2,
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
    "concat": """(float[n,2,4,4] x, float[3,2,1,1] w1, float[2,2,3,3] w2, float[2] b2, float[4,5,3,3] w3, float[4] b3,
            float[3,16] w4) => (float[n,3] y) {
        c1 = Conv (x, w1)
        c2 = Conv <pads = [1,1,1,1]> (x, w2, b2)
        r2 = Relu (c2)
        j = Concat <axis = 1> (c1, r2)
        c3 = Conv (j, w3, b3)
        r3 = Relu (c3)
        f = Flatten (r3)
        y = Gemm <transB = 1> (f, w4)
    }""",
    "overlap": """(float[n,1,7,7] x, float[3,1,3,3] w1, float[3] b1, float[3,3,3,3] w2, float[3] b2, float[3,12] w3)
            => (float[n,3] y) {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r1 = Relu (c1)
        p1 = MaxPool <kernel_shape = [3,3], strides = [2,2], pads = [1,1,1,1]> (r1)
        c2 = Conv <pads = [1,1,1,1]> (p1, w2, b2)
        r2 = Relu (c2)
        p2 = AveragePool <kernel_shape = [2,2], strides = [2,2]> (r2)
        f = Flatten (p2)
        y = Gemm <transB = 1> (f, w3)
    }""",
    "norm": """(float[n,2,4,4] x, float[3,2,3,3] w1, float[3] b1, float[3] s, float[3] t, float[3] m, float[3,3,1,1] w2,
            float[3,48] w3, float[3] b3) => (float[n,3] y) <float[3] v = {0.3, 1.2, 0.05}> {
        c1 = Conv <pads = [1,1,1,1]> (x, w1, b1)
        r1 = Relu (c1)
        h = BatchNormalization (r1, s, t, m, v)
        r2 = Relu (h)
        a = Add (r1, r2)
        c2 = Conv (a, w2)
        f = Flatten (c2)
        y = Gemm <transB = 1> (f, w3, b3)
    }""",
    "clipped": """(float[n,4,4,4] x, float[4,1,3,3] w1, float[4] b1, float[6,4,1,1] w2, float[6,4] w3, float[4] b3)
            => (float[n,4] y) <float low = {0}, float high = {0.5}, float[1,4,1,1] mu = {0.4, 0.5, 0.6, 0.5},
            float[1,4,1,1] sd = {0.2, 0.3, 0.25, 0.2}> {
        d = Sub (x, mu)
        e = Div (d, sd)
        c1 = Conv <pads = [1,1,1,1], group = 4> (e, w1, b1)
        r1 = Clip (c1, low, high)
        c2 = Conv (r1, w2)
        r2 = LeakyRelu <alpha = 0.2> (c2)
        g = GlobalAveragePool (r2)
        f = Flatten (g)
        y = Gemm (f, w3, b3)
    }""",
    "smooth": """(float[n,2,3,3] x, float[18,10] w1, float[10] b1, float[10,8] w2, float[8,3] w3, float[3] b3)
            => (float[n,3] y) {
        f = Flatten (x)
        m1 = MatMul (f, w1)
        a1 = Add (m1, b1)
        r1 = Tanh (a1)
        m2 = MatMul (r1, w2)
        r2 = Sigmoid (m2)
        m3 = MatMul (r2, w3)
        y = Add (b3, m3)
    }""",
    "moves": """(float[n,2,4,4] x, float[2,2,3,3] w1, float[2] b1, float[3,16] w2) => (float[n,3] y)
            <int64[8] pads = {0,0,1,0,0,0,1,2}, float fill = {0.25}, int64[1] start = {1}, int64[1] end = {5},
            int64[1] axis = {3}, int64[2] parts = {1,1}> {
        p = Pad (x, pads, fill)
        s = Slice (p, start, end, axis)
        t = Transpose <perm = [0,1,3,2]> (s)
        c = Conv (t, w1, b1)
        u, v = Split <axis = 1> (c, parts)
        k = Sub (v, u)
        r = Relu (k)
        n1 = Neg (r)
        j = Concat <axis = 1> (r, n1)
        f = Flatten (j)
        y = Gemm <transB = 1> (f, w2)
    }""",
}

FORMATS = {"float": ("float", "float"), "w4": ("int4", "float"), "w4a3": ("int4", "int3"), "w8a8": ("int8", "int8")}


@dataclass(frozen=True)
class Case:
    """A network in one format, beside its float twin."""

    name: str
    twin: GraphModule
    float_twin: GraphModule
    shape: tuple[int, ...]
    classes: int

    def images(self, count: int, seed: int = 0) -> Tensor:
        return torch.rand(count, *self.shape, generator=torch.Generator().manual_seed(seed))


def parse(text: str, seed: int = 0, size: float = 1.5, **arrays: Any) -> ir.Model:
    """ONNX text to a model; inputs after the first are weights, random unless ``arrays`` holds them."""
    proto = parser.parse_model(HEADER + text)
    generator = np.random.default_rng(seed)
    for value in list(proto.graph.input)[1:]:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        fan_in = float(np.prod(shape[1:])) if len(shape) > 1 else 4.0
        array = (size * generator.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(arrays.get(value.name, array), value.name))
        proto.graph.input.remove(value)
    return ir.serde.deserialize_model(proto)


@cache
def case(name: str, fmt: str = "float", seed: int = 0) -> Case:
    prepared = prepare(parse(NETWORKS[name], seed))
    images = torch.rand(16, *prepared.input_shape, generator=torch.Generator().manual_seed(5))
    quantizer = Quantizer(prepared, images)
    weights, activations = FORMATS[fmt]
    applied = quantizer.apply(Plan(defaults=Defaults(weights=weights, activations=activations)))
    return Case(f"{name} {fmt}", applied.graph, quantizer.float_graph, prepared.input_shape, prepared.classes)


@pytest.fixture(scope="session")
def cases() -> Callable[..., Case]:
    """The network called so, in a format."""
    return case


class _Recorder(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


@torch.no_grad()
def values_of(twin: GraphModule, images: Tensor) -> dict[str, Any]:
    """What every node computes, by name."""
    recorder = _Recorder(twin)
    recorder.run(images)
    return recorder.seen


def project(x: Tensor, images: Tensor, threat: ThreatModel) -> Tensor:
    moved = x - images
    if threat.norm == "linf":
        moved = moved.clamp(-threat.eps, threat.eps)
    else:
        length = moved.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, *[1] * (images.ndim - 1))
        moved = moved * (threat.eps / length).clamp(max=1.0)
    return (images + moved).clamp(0, 1)


def scattered(images: Tensor, threat: ThreatModel, count: int, seed: int = 0) -> Tensor:
    """Points of each ball, (count, n, ...): corners of the cube, and directions at full length."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, *images.shape, generator=generator)
    step = noise.sign() if threat.norm == "linf" else noise
    return torch.stack([project(images + 1e3 * s, images, threat) for s in step])


def along(model: Callable[[Tensor], Tensor], row: Tensor, sign: float = 1.0) -> Callable[[Tensor], Tensor]:
    """The objective ``sign * row . model(x)``."""

    def objective(x: Tensor) -> Tensor:
        value: Tensor = sign * (model(x) * row).sum(1)
        return value

    return objective


def ascend(objective: Callable[[Tensor], Tensor], images: Tensor, threat: ThreatModel, steps: int = 25) -> Tensor:
    """Points that make ``objective`` (n,) large, by projected gradients; the best ones met."""
    x = scattered(images, threat, 1, seed=9)[0]
    best, points = torch.full((len(images),), -torch.inf), images.clone()
    for index in range(steps):
        x = x.detach().requires_grad_()
        value = objective(x)
        take = value.detach() > best
        best, points[take] = torch.where(take, value.detach(), best), x.detach()[take]
        (slope,) = torch.autograd.grad(value.sum(), x)
        if threat.norm == "linf":
            slope = slope.sign()
        else:
            slope = slope / slope.flatten(1).norm(dim=1).clamp(min=1e-12).reshape(-1, *[1] * (x.ndim - 1))
        x = project(x + threat.eps * (0.5 if index < steps // 2 else 0.1) * slope, images, threat)
    return points


THREATS = [ThreatModel("linf", 0.03), ThreatModel("linf", 0.15), ThreatModel("l2", 0.3)]
