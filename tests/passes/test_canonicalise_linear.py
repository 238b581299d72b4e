"""Matrix products become linear calls that compute the same, with the bias where `Use.bias` says it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule, Node
from torch.nn import functional

from qopt.graph.model import Prepared
from qopt.graph.twin import build_twin
from qopt.passes.base import Pipeline, relative_change
from qopt.passes.canonicalise_linear import CanonicaliseLinear
from qopt.passes.nodes import bias_source, constant_of, is_layer, weight_source

Network = Callable[[str], Prepared]

TAIL = "g = ReduceMean <keepdims = 0> (h, axis)\n y = Gemm <transB = 1> (g, w2)"
CASES = {
    "with bias": (
        "(float[n,6] x, float[6,4] w, float[4] b) => (float[n,4] y) { m = MatMul (x, w) y = Add (m, b) }",
        "b",
    ),
    "bias on the left": (
        "(float[n,6] x, float[6,4] w, float[4] b) => (float[n,4] y) { m = MatMul (x, w) y = Add (b, m) }",
        "b",
    ),
    "without bias": ("(float[n,6] x, float[6,4] w) => (float[n,4] y) { y = MatMul (x, w) }", None),
    "three axes, with bias": (
        f"""(float[n,5,6] x, float[6,4] w, float[4] b, float[3,4] w2) => (float[n,3] y) <int64[1] axis = {{1}}> {{
            m = MatMul (x, w)
            h = Add (m, b)
            {TAIL}
        }}""",
        "b",
    ),
    "three axes, without bias": (
        f"""(float[n,5,6] x, float[6,4] w, float[3,4] w2) => (float[n,3] y) <int64[1] axis = {{1}}> {{
            m = MatMul (x, w)
            h = Relu (m)
            {TAIL}
        }}""",
        None,
    ),
    "four axes": (
        """(float[n,2,5,6] x, float[6,4] w, float[4] b) => (float[n,4] y) <int64[2] axis = {1, 2}> {
            m = MatMul (x, w)
            h = Add (m, b)
            y = ReduceMean <keepdims = 0> (h, axis)
        }""",
        "b",
    ),
    "one output channel": (
        """(float[n,6] x, float[6,1] w, float[1] b, float[1,2] w2) => (float[n,2] y) {
            m = MatMul (x, w)
            h = Add (m, b)
            y = MatMul (h, w2)
        }""",
        "b",
    ),
    "a scalar is no bias": (
        "(float[n,6] x, float[6,4] w, float[1] k) => (float[n,4] y) { m = MatMul (x, w) y = Add (m, k) }",
        None,
    ),
    "a matrix is no bias": (
        "(float[n,6] x, float[6,4] w, float[1,4] k) => (float[n,4] y) { m = MatMul (x, w) y = Add (m, k) }",
        None,
    ),
    "positions are no channels": (
        f"""(float[n,4,6] x, float[6,4] w, float[4,1] k, float[3,4] w2) => (float[n,3] y) <int64[1] axis = {{1}}> {{
            m = MatMul (x, w)
            h = Add (m, k)
            {TAIL}
        }}""",
        None,
    ),
    "a product that two nodes read has no bias": (
        """(float[n,6] x, float[6,4] w, float[4] k) => (float[n,4] y) {
            m = MatMul (x, w)
            a = Add (m, k)
            y = Mul (a, m)
        }""",
        None,
    ),
    "an addition to itself is no bias": (
        "(float[n,6] x, float[6,4] w) => (float[n,4] y) { m = MatMul (x, w) y = Add (m, m) }",
        None,
    ),
}


def _first_layer(twin: GraphModule) -> Node:
    found = next(node for node in twin.graph.nodes if is_layer(node))
    assert isinstance(found, Node)
    return found


@pytest.mark.parametrize("case", CASES)
def test_it_computes_the_same_and_agrees_with_the_facts(
    case: str, network: Network, images: Callable[..., torch.Tensor]
) -> None:
    text, bias = CASES[case]
    prepared = network(text)
    twin, sample = build_twin(prepared), images(prepared, 7)
    before = twin(sample)
    result = CanonicaliseLinear()(twin)
    assert result.modified
    assert relative_change(before, twin(sample)) <= 1e-6

    node, layer = _first_layer(twin), prepared.layers[0]
    assert node.target is functional.linear
    assert (node.meta["layer"], node.meta["use"]) == (layer.name, 0)
    assert node.meta["value"] == layer.uses[0].output
    source = bias_source(node)
    assert (source.meta["value"] if source is not None else None) == layer.uses[0].bias == bias
    assert tuple(constant_of(twin, weight_source(node)).shape) == layer.shape


@settings(max_examples=25)
@given(
    batch=st.integers(1, 4),
    rows=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    bias=st.booleans(),
)
def test_any_shape(batch: int, rows: list[int], inputs: int, outputs: int, bias: bool) -> None:
    """On a graph made by hand: the same to 1e-6 as float64 arithmetic."""
    generator = torch.Generator().manual_seed(batch + 10 * inputs + 100 * outputs)
    root = torch.nn.Module()
    root.register_buffer("w", torch.randn(inputs, outputs, generator=generator))
    root.register_buffer("b", torch.randn(outputs, generator=generator))
    graph = torch.fx.Graph()
    product = graph.call_function(torch.matmul, (graph.placeholder("x"), graph.get_attr("w")))
    product.meta.update(op="MatMul", layer="w", use=0, value="m")
    last = graph.call_function(torch.add, (product, graph.get_attr("b"))) if bias else product
    last.meta.setdefault("value", "y")
    graph.output(last)
    twin = torch.fx.GraphModule(root, graph)
    assert CanonicaliseLinear()(twin).modified
    x = torch.randn(batch, *rows, inputs, generator=generator)
    expected = x.double() @ twin.get_buffer("w").double() + (twin.get_buffer("b").double() if bias else 0.0)
    assert relative_change(expected, twin(x).double()) <= 1e-6


@pytest.mark.parametrize(("name", "products"), [("plain", 0), ("mlp", 3), ("depthwise", 0)])
def test_only_products_with_a_weight_change(
    name: str, products: int, networks: dict[str, Prepared], images: Callable[..., torch.Tensor]
) -> None:
    twin = build_twin(networks[name])
    pipeline = Pipeline((CanonicaliseLinear(), CanonicaliseLinear()), images(networks[name], 2))
    pipeline(twin)
    assert pipeline.notes == ([f"{products} matrix products written as linear"] if products else [])
    assert not any(node.target is torch.matmul for node in twin.graph.nodes)


def test_a_product_of_two_computed_tensors_stays(network: Network, images: Callable[..., torch.Tensor]) -> None:
    prepared = network(
        """(float[n,4,4] x, float[4,4] w, float[3,16] w2) => (float[n,3] y) {
            q = MatMul (x, w)
            s = MatMul (q, x)
            f = Flatten (s)
            y = Gemm <transB = 1> (f, w2)
        }"""
    )
    twin = Pipeline((CanonicaliseLinear(),), images(prepared, 3))(build_twin(prepared))
    assert [node.meta["value"] for node in twin.graph.nodes if node.target is torch.matmul] == ["s"]


def test_a_shared_weight_keeps_both_uses(network: Network, images: Callable[..., torch.Tensor]) -> None:
    prepared = network(
        """(float[n,4] x, float[4,4] w, float[4] b) => (float[n,4] y) {
            m = MatMul (x, w)
            a = Add (m, b)
            r = Relu (a)
            y = MatMul (r, w)
        }"""
    )
    twin = Pipeline((CanonicaliseLinear(),), images(prepared, 3))(build_twin(prepared))
    calls = [node for node in twin.graph.nodes if is_layer(node)]
    assert [(node.meta["use"], node.meta["value"]) for node in calls] == [(0, "a"), (1, "y")]
    assert [bias_source(node) is None for node in calls] == [False, True]
