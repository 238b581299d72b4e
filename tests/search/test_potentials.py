"""Potentials against the enumeration of all paths, and the two statements of convexity that the solver lives on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import PlanError
from qopt.search import potentials as module
from qopt.search.potentials import Edge, Node, Potentials, entropy

logarithms = st.floats(-3, 3)


@st.composite
def graphs(draw: st.DrawFn, powers: tuple[int, ...] = (1, 2)) -> Potentials:
    """Up to seven nodes, up to three edges each; a layer may stand on several edges."""
    count = draw(st.integers(2, 7))
    names = [f"l{i}" for i in range(draw(st.integers(1, 5)))]
    nodes = [Node("image")]
    for place in range(1, count):
        edges = tuple(
            Edge(draw(st.integers(0, place - 1)), draw(logarithms), draw(st.sampled_from([*names, None])))
            for _ in range(draw(st.integers(1, 3)))
        )
        nodes.append(Node(f"n{place}", edges, draw(st.sampled_from(powers))))
    return Potentials(tuple(nodes))


def norms(draw: st.DrawFn | Any, graph: Potentials) -> dict[str, float]:
    return {name: draw(logarithms) for name in graph.layers}


def paths(graph: Potentials, logs: Mapping[str, float]) -> list[float]:
    """The product along every path from the image to the last node."""

    def to(place: int) -> list[float]:
        if place == 0:
            return [1.0]
        return [
            head * math.exp(edge.offset + (logs[edge.layer] if edge.layer else 0.0))
            for edge in graph.nodes[place].edges
            for head in to(edge.source)
        ]

    return to(len(graph.nodes) - 1)


@settings(max_examples=200)
@given(data=st.data(), graph=graphs(powers=(1,)))
def test_sums_are_the_sum_over_all_paths(data: st.DataObject, graph: Potentials) -> None:
    logs = norms(data.draw, graph)
    products = paths(graph, logs)
    value = graph.values(logs)[-1]
    assert value == pytest.approx(math.log(math.fsum(products)), abs=1e-9)
    assert value >= math.log(max(products)) - 1e-9, "below the longest path"


def literal(graph: Potentials, logs: Mapping[str, float]) -> float:
    """Node by node, no logarithms."""
    found = [1.0]
    for node in graph.nodes[1:]:
        terms = [found[e.source] * math.exp(e.offset) * (math.exp(logs[e.layer]) if e.layer else 1) for e in node.edges]
        found.append(sum(terms) if node.power == 1 else math.hypot(*terms))
    return found[-1]


@settings(max_examples=200)
@given(data=st.data(), graph=graphs())
def test_any_graph_against_the_plain_recursion(data: st.DataObject, graph: Potentials) -> None:
    logs = norms(data.draw, graph)
    assert graph.values(logs)[-1] == pytest.approx(math.log(literal(graph, logs)), abs=1e-9)


@settings(max_examples=200)
@given(data=st.data(), graph=graphs())
def test_slopes_are_derivatives_and_the_tangent_lies_below(data: st.DataObject, graph: Potentials) -> None:
    at, away = norms(data.draw, graph), norms(data.draw, graph)
    slopes, here = graph.slopes(at), graph.values(at)[-1]
    for name, slope in slopes.items():
        step = 1e-5
        ends = [graph.values({**at, name: at[name] + sign * step})[-1] for sign in (-1, 1)]
        assert slope == pytest.approx((ends[1] - ends[0]) / (2 * step), abs=1e-4)
    tangent = here + sum(slopes[name] * (away[name] - at[name]) for name in slopes)
    assert tangent <= graph.values(away)[-1] + 1e-9


@settings(max_examples=200)
@given(data=st.data(), graph=graphs())
def test_any_shares_bound_a_node_from_below_and_its_own_are_equal(data: st.DataObject, graph: Potentials) -> None:
    logs = norms(data.draw, graph)
    values, own = graph.values(logs), graph.shares(logs)
    for place, node in enumerate(graph.nodes[1:], 1):
        reached = graph.reached(node, values, logs)
        assert sum(own[place]) == pytest.approx(1.0)
        exact = sum(s * r for s, r in zip(own[place], reached, strict=True)) + entropy(own[place]) / node.power
        assert exact == pytest.approx(values[place], abs=1e-9)
        raw = [data.draw(st.floats(0.01, 1)) for _ in reached]
        other = [share / sum(raw) for share in raw]
        bound = sum(s * r for s, r in zip(other, reached, strict=True)) + entropy(other) / node.power
        assert bound <= values[place] + 1e-9
        assert max(reached) <= values[place] + 1e-12


def test_a_chain_is_the_sum_of_its_logarithms() -> None:
    chain = Potentials((Node("x"), Node("a", (Edge(0, 0.5, "a"),)), Node("b", (Edge(1, 0.0, "b"),))))
    assert chain.values({"a": 1.0, "b": 2.0}) == [0.0, 1.5, 3.5]
    assert chain.slopes({"a": 1.0, "b": 2.0}) == {"a": 1.0, "b": 1.0}


def test_a_residual_block_adds_one() -> None:
    block = Potentials((Node("x"), Node("a", (Edge(0, 0.0, "a"),)), Node("y", (Edge(1), Edge(0)))))
    assert block.values({"a": math.log(3.0)})[-1] == pytest.approx(math.log(4.0))
    assert block.slopes({"a": math.log(3.0)})["a"] == pytest.approx(0.75)


def test_a_concatenation_is_the_root_of_squares() -> None:
    both = Potentials((Node("x"), Node("a", (Edge(0, 0.0, "a"),)), Node("y", (Edge(1), Edge(0, math.log(4.0))), 2)))
    assert both.values({"a": math.log(3.0)})[-1] == pytest.approx(math.log(5.0))


def test_a_shared_layer_counts_wherever_it_is_used() -> None:
    twice = Potentials((Node("x"), Node("a", (Edge(0, 0.0, "a"),)), Node("b", (Edge(1, 0.0, "a"),))))
    assert twice.layers == ("a",)
    assert twice.slopes({"a": 0.7}) == {"a": 2.0}


def test_a_layer_off_every_path_has_no_slope() -> None:
    graph = Potentials((Node("x"), Node("dead", (Edge(0, 0.0, "d"),)), Node("y", (Edge(0, 0.0, "a"),))))
    assert graph.slopes({"d": 5.0, "a": 1.0}) == {"d": 0.0, "a": 1.0}


def test_huge_constants_do_not_overflow() -> None:
    nodes = (Node(f"n{place}", (Edge(place, 3.0), Edge(place, 2.0))) for place in range(400))
    assert Potentials((Node("x"), *nodes)).values({})[-1] == pytest.approx(400 * math.log(math.exp(3) + math.exp(2)))


WRONG: list[tuple[Node, ...]] = [
    (Node("x", (Edge(0),)),),
    (Node("x"), Node("y", (Edge(1),))),
    (Node("x"), Node("y", (Edge(2),)), Node("z", (Edge(0),))),
    (Node("x"), Node("y", (Edge(-1),))),
    (Node("x"), Node("y")),
]


@pytest.mark.parametrize("nodes", WRONG)
def test_graphs_out_of_order_are_refused(nodes: tuple[Node, ...]) -> None:
    with pytest.raises(PlanError, match="no order of potentials"):
        Potentials(nodes)


def only_longest(reached: list[float], power: int) -> float:
    return max(reached)


def no_root(reached: list[float], power: int) -> float:
    return max(reached) + math.log(sum(math.exp(power * (r - max(reached))) for r in reached))


def always_sums(reached: list[float], power: int) -> float:
    return max(reached) + math.log(sum(math.exp(r - max(reached)) for r in reached))


@pytest.mark.parametrize("mistake", [only_longest, no_root, always_sums])
def test_planted_joins_are_caught(monkeypatch: pytest.MonkeyPatch, mistake: Any) -> None:
    monkeypatch.setattr(module, "_joined", mistake)
    with pytest.raises(AssertionError):
        test_any_graph_against_the_plain_recursion()
