"""Which tensors may be quantized: the exact table for every kind of network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import fx

from qopt.graph.model import Prepared
from qopt.graph.twin import build_twin
from qopt.passes.annotate import Annotate, quantizable
from qopt.passes.base import Pipeline
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.passes.nodes import activation_nodes

Network = Callable[[str], Prepared]


def table(prepared: Prepared) -> str:
    """One line per tensor with a range of its own: its name, then the values that carry its codes."""
    twin = build_twin(prepared)
    CanonicaliseLinear()(twin)
    Annotate()(twin)
    return "\n".join(": ".join((root, " ".join(values))) for root, values in quantizable(twin).items())


GOLDEN = {
    "tokens": """
        x: x
        g: g
        r: r""",
    "plain": """
        x: x
        r1: r1
        r2: r2 f""",
    "residual": """
        x: x
        r1: r1
        c2: c2
        s: s
        r2: r2
        g: g f""",
    "concat": """
        x: x
        c1: c1
        r2: r2
        j: j
        r3: r3 f""",
    "depthwise": """
        x: x
        r1: r1
        c2: c2
        g: g f""",
    "mlp": """
        x: x f
        r1: r1
        r2: r2""",
    "pool": """
        x: x
        c1: c1 p1
        r1: r1
        r2: r2
        p2: p2 f""",
    "shared": """
        x: x
        r1: r1
        c2: c2 f""",
    "static": """
        bound: bound
        r: r f""",
}


def _lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


@pytest.mark.parametrize("name", GOLDEN)
def test_the_tensors_of_whole_networks(name: str, networks: dict[str, Prepared]) -> None:
    assert table(networks[name]) == _lines(GOLDEN[name])


CASES = {
    "a ReLU that is not alone is not absorbed": (
        """(float[n,2,4,4] x, float[2,2,1,1] w1, float[2,2,1,1] w2) => (float[n,32] y) {
            c = Conv (x, w1)
            r = Relu (c)
            d = Conv (r, w2)
            a = Add (c, d)
            y = Flatten (a)
        }""",
        "x: x\nc: c\nr: r\nd: d\na: a",
    ),
    "a sigmoid is not absorbed": (
        """(float[n,2,4,4] x, float[2,2,1,1] w1, float[2,2,1,1] w2) => (float[n,32] y) {
            c = Conv (x, w1)
            s = Sigmoid (c)
            d = Conv (s, w2)
            y = Flatten (d)
        }""",
        "x: x\nc: c\ns: s\nd: d",
    ),
    "logits stay float": (
        """(float[n,2,1,1] x, float[3,2,1,1] w1, float[3,3] w2) => (float[n,3] y) <int64[2] s = {0, 3}> {
            c = Conv (x, w1)
            f = Reshape (c, s)
            y = MatMul (f, w2)
        }""",
        "x: x\nc: c f",
    ),
    "an addition whose ReLU gives the logits stays float": (
        """(float[n,3,1,1] x, float[3,3,1,1] w) => (float[n,3] y) {
            c = Conv (x, w)
            f = Flatten (c)
            g = Flatten (x)
            a = Add (f, g)
            y = Relu (a)
        }""",
        "x: x g\nc: c f",
    ),
    "arithmetic before the first layer: its result is what the layer reads": (
        """(float[n,2,4,4] x, float[2,1,1] mean, float[2,2,1,1] w) => (float[n,32] y) {
            d = Sub (x, mean)
            c = Conv (d, w)
            y = Flatten (c)
        }""",
        "d: d\nc: c",
    ),
    "adding a constant joins nothing": (
        """(float[n,2,4,4] x, float[2,2,1,1] w1, float[2,4,4] k, float[3,32] w2) => (float[n,3] y) {
            c = Conv (x, w1)
            a = Add (c, k)
            s = Sigmoid (a)
            f = Flatten (s)
            y = Gemm <transB = 1> (f, w2)
        }""",
        "x: x\nc: c\ns: s f",
    ),
    "twice the same tensor joins": (
        """(float[n,2,4,4] x, float[2,2,1,1] w1) => (float[n,32] y) {
            c = Conv (x, w1)
            a = Add (c, c)
            r = Relu (a)
            y = Flatten (r)
        }""",
        "x: x\nc: c\nr: r",
    ),
    "an addition of one tensor with codes and one without joins nothing": (
        """(float[n,2,4,4] x, float[2,2,1,1] w1) => (float[n,32] y) {
            c = Conv (x, w1)
            s = Sigmoid (c)
            a = Add (c, s)
            y = Flatten (a)
        }""",
        "x: x\nc: c",
    ),
    "zero padding is a view": (
        """(float[n,2,4,4] x, float[2,2,1,1] w) => (float[n,72] y) <int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}> {
            b = Pad (x, p)
            c = Conv (b, w)
            y = Flatten (c)
        }""",
        "x: x b\nc: c",
    ),
    "padding by another number is none": (
        """(float[n,2,4,4] x, float[2,2,1,1] w) => (float[n,72] y)
            <int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}, float one = {1}> {
            b = Pad (x, p, one)
            c = Conv (b, w)
            y = Flatten (c)
        }""",
        "b: b\nc: c",
    ),
    "mirrored padding is none": (
        """(float[n,2,4,4] x, float[2,2,1,1] w) => (float[n,72] y) <int64[8] p = {0, 0, 1, 1, 0, 0, 1, 1}> {
            b = Pad <mode = "reflect"> (x, p)
            c = Conv (b, w)
            y = Flatten (c)
        }""",
        "b: b\nc: c",
    ),
    "a view of a view": (
        """(float[n,2,4,4] x, float[4,2,1,1] w) => (float[n,32] y)
            <int64[1] a = {0}, int64[1] b = {2}, int64[1] axis = {3}> {
            t = Transpose <perm = [0, 1, 3, 2]> (x)
            u = Slice (t, a, b, axis)
            c = Conv (u, w)
            y = Flatten (c)
        }""",
        "x: x t u\nc: c",
    ),
    "the parts of a split are views, its tuple is nothing": (
        """(float[n,4,4,4] x, float[2,2,1,1] w1, float[2,2,1,1] w2) => (float[n,64] y) <int64[2] s = {2, 2}> {
            a, b = Split <axis = 1> (x, s)
            c = Conv (a, w1)
            d = Conv (b, w2)
            j = Concat <axis = 1> (c, d)
            y = Flatten (j)
        }""",
        "x: x a b\nc: c\nd: d\nj: j",
    ),
    "a reshape to a computed shape is a view": (
        """(float[n,2,4,4] x, float[4,2,1,1] w1, float[3,64] w2) => (float[n,3] y)
            <int64 zero = {0}, int64[1] rest = {64}, int64[1] first = {0}> {
            c = Conv (x, w1)
            r = Relu (c)
            shape = Shape (x)
            n = Gather <axis = 0> (shape, zero)
            n1 = Unsqueeze (n, first)
            target = Concat <axis = 0> (n1, rest)
            f = Reshape (r, target)
            y = Gemm <transB = 1> (f, w2)
        }""",
        "x: x\nr: r f",
    ),
    "no layer, no tensor": (
        """(float[n,2,4,4] x) => (float[n,32] y) {
            r = Relu (x)
            y = Flatten (r)
        }""",
        "",
    ),
    "a product with its bias reads codes and writes float": (
        """(float[n,6] x, float[6,5] w1, float[5] b, float[5,3] w2) => (float[n,3] y) {
            m = MatMul (x, w1)
            a = Add (m, b)
            y = MatMul (a, w2)
        }""",
        "x: x\na: a",
    ),
    "a transposed convolution writes codes": (
        """(float[n,2,4,4] x, float[2,3,2,2] w1) => (float[n,192] y) {
            c = ConvTranspose <strides = [2, 2]> (x, w1)
            r = Relu (c)
            y = Flatten (r)
        }""",
        "x: x\nr: r",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_single_rules(case: str, network: Network) -> None:
    text, expected = CASES[case]
    assert table(network(text)) == expected


@pytest.mark.parametrize("name", GOLDEN)
def test_marking_twice_marks_the_same_and_computes_the_same(
    name: str, networks: dict[str, Prepared], images: Callable[..., torch.Tensor]
) -> None:
    twin = build_twin(networks[name])
    pipeline = Pipeline((CanonicaliseLinear(), Annotate(), Annotate()), images(networks[name], 2))
    pipeline(twin)
    once = quantizable(twin)
    Annotate()(twin)
    assert quantizable(twin) == once
    assert pipeline.notes[-1] == f"{len(once)} activation tensors can be quantized"


def test_marks_do_not_outlive_what_justified_them(networks: dict[str, Prepared]) -> None:
    twin = build_twin(networks["plain"])
    Annotate()(twin)
    for node in twin.graph.nodes:
        node.meta.pop("layer", None)
    Annotate()(twin)
    assert quantizable(twin) == {}


def test_very_deep_networks() -> None:
    """No recursion along the graph, and time that grows with its length and not its square."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["value"] = "x"
    for index in range(5000):
        node = graph.call_function(torch.flatten, (node, 1))
        node.meta.update(op="Flatten", value=f"v{index}")
    root = torch.nn.Module()
    root.register_buffer("w", torch.eye(4))
    layer = graph.call_function(torch.nn.functional.linear, (node, graph.get_attr("w"), None))
    layer.meta.update(op="Gemm", value="y", layer="w", use=0)
    graph.output(layer)
    twin = fx.GraphModule(root, graph)
    Annotate()(twin)
    assert {root: len(values) for root, values in quantizable(twin).items()} == {"x": 5001}


def test_parameters_carry_no_activations(networks: dict[str, Prepared]) -> None:
    twin = build_twin(networks["mlp"])
    CanonicaliseLinear()(twin)
    rest = {node.name for node in twin.graph.nodes} - {node.name for node in activation_nodes(twin)}
    assert rest == {"w1", "w2", "w3", "b1", "b3", "t", "t_1", "t_2"}
