"""A limit on the Lipschitz constant beside additive ones, against the enumeration of all plans, in every strategy."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import InfeasibleError, PlanError, UsageError
from qopt.limits import Limit
from qopt.lipschitz import NormBound
from qopt.search import greedy
from qopt.search.ceiling import Ceiling, build_ceiling, with_tangent
from qopt.search.exact import ExactSearch
from qopt.search.feasible import a_plan, feasible, readable
from qopt.search.greedy import GreedySearch, lower_bound
from qopt.search.items import FULL, build_items, spending, total
from qopt.search.lipschitz import LipschitzSearch
from qopt.search.potentials import Edge, Node, Potentials
from qopt.search.solver import gentlest_plan, minimise
from qopt.search.space import Candidate, LayerSpace, Outcome, Space, costs
from qopt.search.thresholds import Thresholds, apply_thresholds
from qopt.search.uniform import UniformSearch
from qopt.size import Stored
from qopt.spec import WeightSpec

ONE = NormBound(1.0, 1.0, "given")
FORMATS = ("int2", "int4", "int8")

CHAIN = Potentials((Node("x"), *(Node(f"n{i}", (Edge(i, 0.1, f"l{i}"),)) for i in range(4))))
RESIDUAL = Potentials(
    (
        Node("x"),
        Node("a", (Edge(0, 0.0, "l0"),)),
        Node("b", (Edge(1, 0.0, "l1"),)),
        Node("sum", (Edge(2, 0.0, "l2"), Edge(1))),
        Node("y", (Edge(3, -0.5, "l3"),)),
    )
)
CONCAT = Potentials(
    (
        Node("x"),
        Node("a", (Edge(0, 0.0, "l0"),)),
        Node("b", (Edge(0, 0.2, "l1"),)),
        Node("both", (Edge(1, 0.0, "l2"), Edge(2), Edge(0, 0.4)), 2),
        Node("y", (Edge(3, 0.0, "l3"), Edge(1, 0.3))),
    )
)
GRAPHS = {"chain": CHAIN, "residual": RESIDUAL, "concat": CONCAT}


def layer(name: str, weights: int, formats: dict[str, tuple[float, float]]) -> LayerSpace:
    """Format to (sensitivity, operator norm)."""
    candidates = []
    for text, (sensitivity, norm) in formats.items():
        spec = WeightSpec.parse(text)
        stored = Stored(weights, 1, spec)
        operator = NormBound(norm / 2, norm, "given")
        bits = weights * spec.container_bits
        candidates.append(Candidate(spec, bits, stored.bytes, ONE, ONE, ONE, None, sensitivity, operator))
    return LayerSpace(name, weights, ONE, ONE, tuple(candidates))


def random_space(seed: int, graph: str, bits: float | None, ties: bool) -> Space:
    """Four layers whose norms go their own way; no limit on the constant yet."""
    rng = np.random.default_rng(seed)
    layers = []
    for i in range(4):
        formats = {t: (float(rng.uniform(0.2, 1) * 4.0 ** -int(t[3:])), float(rng.uniform(0.5, 4))) for t in FORMATS}
        layers.append(layer(f"l{i}", int(rng.integers(1, 400)), formats))
    limits = () if bits is None else (Limit("bits", bits),)
    return Space(tuple(layers), limits, (("l1", "l3"),) if ties else (), GRAPHS[graph])


Plan = dict[str, Candidate]


def all_plans(space: Space) -> list[Plan]:
    names = [layer.layer for layer in space.layers]
    plans = [dict(zip(names, picks, strict=True)) for picks in product(*(x.candidates for x in space.layers))]
    plans = [p for p in plans if all(len({p[n].spec for n in group}) == 1 for group in space.ties)]
    return [p for p in plans if all(spent(space, p, limit) <= limit.bound * (1 + 1e-9) for limit in space.additive)]


def spent(space: Space, plan: Plan, limit: Limit) -> float:
    column = "code_bits" if limit.quantity == "bits" else "bytes"
    extra = 0 if limit.quantity == "bits" else space.table_bytes
    found = sum(costs(c)[column] for c in plan.values()) + extra
    return found / space.weights if limit.quantity == "bits" else found


def constant(space: Space, plan: Plan) -> float:
    """Node by node without logarithms, as the calculus computes it."""
    assert space.potentials is not None
    found = [1.0]
    for node in space.potentials.nodes[1:]:
        terms = []
        for edge in node.edges:
            norm = plan[edge.layer].operator if edge.layer else None
            terms.append(found[edge.source] * math.exp(edge.offset) * (norm.upper if norm else 1.0))
        found.append(sum(terms) if node.power == 1 else math.hypot(*terms))
    return found[-1]


def limited(space: Space, bound: float) -> Space:
    return replace(space, limits=(*space.limits, Limit("lipschitz", bound)))


def between(space: Space, share: float) -> Space:
    """With a limit that lies between the constants of two plans, that share of the way up."""
    constants = sorted({constant(space, plan) for plan in all_plans(space)})
    place = min(int(share * len(constants)), len(constants) - 1)
    if place == 0:
        return limited(space, constants[0] * 0.99)
    return limited(space, math.sqrt(constants[place - 1] * constants[place]))


def value(plan: Plan) -> float:
    return sum(c.sensitivity for c in plan.values())


def chosen(space: Space, outcome: Outcome) -> Plan:
    return {x.layer: x.candidate(outcome.specs[x.layer]) for x in space.layers}


def check(space: Space) -> float | None:
    """Everything that must hold of both solvers; by what share greedy misses the optimum."""
    limit = space.lipschitz
    assert limit is not None
    kept = [plan for plan in all_plans(space) if constant(space, plan) <= limit]
    assert feasible(space) == bool(kept)
    if not kept:
        for strategy in (GreedySearch(), ExactSearch()):
            with pytest.raises(InfeasibleError):
                strategy(space)
        return None
    best = min(map(value, kept))
    items = build_items(space)
    assert greedy.solve(items, build_ceiling(space, items))[1] <= best + 1e-9, "the bound is above the optimum"
    for strategy in (GreedySearch(), ExactSearch()):
        outcome = strategy(space)
        plan = chosen(space, outcome)
        assert constant(space, plan) <= limit * (1 + 1e-9), f"{strategy.name} broke the limit"
        assert all(spent(space, plan, one) <= one.bound * (1 + 1e-9) for one in space.additive)
        assert all(len({outcome.specs[name] for name in group}) == 1 for group in space.ties)
        assert outcome.gap is not None
        missed = (value(plan) - best) / value(plan)
        assert outcome.gap >= missed - 1e-9, "the printed gap is below the true one"
        if strategy.name == "exact":
            assert missed == pytest.approx(0.0, abs=1e-9)
            return float((value(chosen(space, GreedySearch()(space))) - best) / best)
    raise AssertionError


CASES = [(graph, bits, ties) for graph in GRAPHS for bits in (None, 5.0, 3.2) for ties in (False, True)]


@pytest.mark.parametrize(("graph", "bits", "ties"), CASES)
def test_every_plan_enumerated(graph: str, bits: float | None, ties: bool) -> None:
    missed, seen = [], 0
    for seed in range(3):
        space = random_space(seed, graph, bits, ties)
        if not all_plans(space):
            continue
        for share in (0.0, 0.1, 0.5, 0.9):
            found = check(between(space, share))
            seen += 1
            missed += [] if found is None else [found]
    assert seen >= 4
    assert not missed or float(np.median(missed)) <= 0.05


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6), graph=st.sampled_from(sorted(GRAPHS)), ties=st.booleans(), share=st.floats(0, 0.99),
    bits=st.sampled_from([None, 2.5, 4.0, 6.0]), size=st.one_of(st.none(), st.floats(1.0, 2.0)),
)  # fmt: skip
def test_any_space(seed: int, graph: str, ties: bool, share: float, bits: float | None, size: float | None) -> None:
    space = random_space(seed, graph, bits, ties)
    if size is not None:
        least = sum(min(c.bytes for c in x.candidates) for x in space.layers) + space.table_bytes
        space = replace(space, limits=(*space.limits, Limit("size", float(int(least * size)))))
    if all_plans(space):
        check(between(space, share))


def ceiling_of(space: Space) -> Ceiling:
    found = build_ceiling(space, build_items(space))
    assert found is not None
    return found


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_tangent_is_a_budget_that_every_plan_below_the_ceiling_keeps(graph: str) -> None:
    space = between(random_space(5, graph, None, True), 0.5)
    items, ceiling = build_items(space), ceiling_of(space)
    plans = list(product(*(range(len(item.specs)) for item in items)))
    for at in plans[::7]:
        tight = with_tangent(items, ceiling, at)
        for plan in plans:
            if ceiling.keeps(plan):
                assert spending(tight, plan)[-1] <= FULL
        best = min((total(items, p) for p in plans if ceiling.keeps(p)), default=None)
        assert best is not None
        assert lower_bound(tight) <= best + 1e-9


@pytest.mark.parametrize("graph", GRAPHS)
def test_rises_are_zero_at_the_plan_and_below_the_truth_elsewhere(graph: str) -> None:
    space = between(random_space(2, graph, None, False), 0.5)
    items, ceiling = build_items(space), ceiling_of(space)
    for picks in [(0, 0, 0, 0), (1, 2, 0, 1), (2, 2, 2, 2)]:
        here = ceiling.constant(picks)
        rises = ceiling.rises(picks)
        assert all(rise[p] == 0 for rise, p in zip(rises, picks, strict=True))
        for index, item in enumerate(items):
            for choice in range(len(item.specs)):
                other = [*picks[:index], choice, *picks[index + 1 :]]
                assert ceiling.constant(other) >= here + rises[index][choice] - 1e-12


def test_floor_and_gentlest_plan() -> None:
    for seed in range(5):
        space = between(random_space(seed, "residual", None, False), 0.5)
        items, ceiling = build_items(space), ceiling_of(space)
        least = min(constant(space, plan) for plan in all_plans(space))
        assert math.exp(ceiling.floor) == pytest.approx(least)
        assert ceiling.constant(ceiling.gentlest()) == pytest.approx(ceiling.floor)
        below = replace(ceiling, bound=ceiling.floor - 0.01)
        solved = gentlest_plan(items, below, 10)
        assert solved.picks is None
        assert solved.bound == pytest.approx(ceiling.floor, abs=1e-5)


def test_a_plan_is_found_where_neither_the_cheapest_nor_the_gentlest_is_one() -> None:
    """Few bits stretch much and wide ones little: only a mixture keeps both limits."""
    formats = {"int2": (1.0, 4.0), "int8": (0.1, 1.0)}
    graph = Potentials((Node("x"), Node("a", (Edge(0, 0.0, "a"),)), Node("b", (Edge(1, 0.0, "b"),))))
    layers = (layer("a", 100, formats), layer("b", 100, {"int2": (1.0, 2.0), "int8": (0.1, 1.0)}))
    space = Space(layers, (Limit("bits", 5.0), Limit("lipschitz", 2.0)), potentials=graph)
    items, ceiling = build_items(space), ceiling_of(space)
    assert a_plan(items, ceiling) == [1, 0]
    for strategy in (GreedySearch(), ExactSearch()):
        assert [str(spec) for spec in strategy(space).specs.values()] == ["int8", "int2"]


@pytest.mark.parametrize("graph", GRAPHS)
def test_uniform_keeps_the_limit(graph: str) -> None:
    space = random_space(3, graph, None, False)
    constants = {
        text: constant(space, {x.layer: x.candidate(WeightSpec.parse(text)) for x in space.layers}) for text in FORMATS
    }
    for bound in [c * 1.001 for c in constants.values()]:
        widest = max((t for t in FORMATS if constants[t] <= bound), key=lambda t: int(t[3:]))
        assert {str(s) for s in UniformSearch()(limited(space, bound)).specs.values()} == {widest}
    with pytest.raises(InfeasibleError, match="keeps the limits"):
        UniformSearch()(limited(space, min(constants.values()) * 0.999))


def test_algorithm_1_plays_without_limits(example_space: Space) -> None:
    free = LipschitzSearch()(example_space).specs
    assert LipschitzSearch()(limited(example_space, 1e-9)).specs == free


def test_the_tightest_of_two_limits_counts() -> None:
    space = limited(limited(random_space(0, "chain", None, False), 7.0), 5.0)
    assert space.lipschitz == 5.0
    assert ceiling_of(space).bound == math.log(5.0)
    assert random_space(0, "chain", None, False).lipschitz is None


def test_the_smallest_constant_is_named() -> None:
    space = random_space(1, "residual", None, False)
    least = min(constant(space, plan) for plan in all_plans(space))
    message = rf"lipschitz<=0.01: no plan keeps the limit \(got at least {least:.4g} with these candidates\); raise"
    for solve in (lambda s: apply_thresholds(s, Thresholds("none")), ExactSearch()):
        with pytest.raises(InfeasibleError, match=message):
            solve(limited(space, 0.01))


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_smallest_constant_within_the_other_limits_is_named(graph: str) -> None:
    checked = 0
    for seed in range(12):
        space = random_space(seed, graph, 3.0, False)
        within = min((constant(space, plan) for plan in all_plans(space)), default=math.inf)
        alone = math.exp(ceiling_of(limited(space, 1.0)).floor)
        if not alone * 1.05 < within < math.inf:
            continue
        checked += 1
        with pytest.raises(InfeasibleError, match="within bits<=3") as caught:
            ExactSearch()(limited(space, alone * 1.01))
        named = float(str(caught.value).split("at least ")[1].split()[0])
        assert alone * 0.999 <= named <= within * 1.001
    assert checked >= 3


def test_ties_alone_can_make_a_limit_impossible() -> None:
    layers = (layer("a", 10, {"int2": (1.0, 1.0), "int8": (0.1, 4.0)}),
              layer("b", 10, {"int2": (1.0, 4.0), "int8": (0.1, 1.0)}))  # fmt: skip
    graph = Potentials((Node("x"), Node("a", (Edge(0, 0.0, "a"),)), Node("b", (Edge(1, 0.0, "b"),))))
    space = Space(layers, (Limit("lipschitz", 2.0),), (("a", "b"),), graph)
    assert not feasible(space)
    with pytest.raises(InfeasibleError, match=r"lipschitz<=2: .* \(got at least 4 within the ties"):
        ExactSearch()(space)
    assert feasible(replace(space, ties=()))


def test_thresholds_are_relaxed_for_a_lipschitz_limit() -> None:
    formats = {"int2": (1.0, 1.0), "int8": (0.1, 4.0)}
    one = layer("a", 10, formats)
    far = tuple(replace(c, error=NormBound(0.6, 0.6, "given")) if c.spec.bits == 2 else c for c in one.candidates)
    near = tuple(replace(c, error=NormBound(0.1, 0.1, "given")) if c.spec.bits == 8 else c for c in far)
    graph = Potentials((Node("x"), Node("a", (Edge(0, 0.0, "a"),))))
    space = Space((replace(one, candidates=near),), (Limit("lipschitz", 2.0),), potentials=graph)
    filtered = apply_thresholds(space, Thresholds("paper"))
    assert filtered.factor == pytest.approx(2.0)
    assert str(ExactSearch()(filtered.space).specs["a"]) == "int2"


def test_a_limit_without_a_graph_is_refused() -> None:
    space = limited(replace(random_space(0, "chain", None, False), potentials=None), 5.0)
    for strategy in (GreedySearch(), ExactSearch()):
        with pytest.raises(UsageError, match="no cost model of this target prices lipschitz"):
            strategy(space)


def test_formats_without_an_operator_norm_are_refused() -> None:
    space = limited(random_space(0, "chain", None, False), 5.0)
    bare = tuple(replace(c, operator=None) for c in space.layers[2].candidates)
    broken = replace(space, layers=(*space.layers[:2], replace(space.layers[2], candidates=bare), space.layers[3]))
    with pytest.raises(UsageError, match="l2: a Lipschitz limit and a format without an operator norm"):
        ExactSearch()(broken)


def test_layers_off_the_graph_need_no_norm() -> None:
    space = random_space(0, "chain", None, False)
    extra = LayerSpace("loose", 10, ONE, ONE, (Candidate(WeightSpec.parse("int4"), 40, 9, ONE, ONE, ONE),))
    outcome = ExactSearch()(limited(replace(space, layers=(extra, *space.layers)), 1e6))
    assert list(outcome.specs) == ["loose", "l0", "l1", "l2", "l3"]


def test_potentials_of_unknown_layers_are_refused() -> None:
    with pytest.raises(PlanError, match="l3: the potentials name an unknown layer"):
        Space(random_space(0, "chain", None, False).layers[:3], (), (), CHAIN)


def test_zero_norms_and_a_zero_limit() -> None:
    graph = Potentials((Node("x"), Node("a", (Edge(0, 0.0, "a"),))))
    space = Space((layer("a", 10, {"int2": (1.0, 0.0), "int8": (0.1, 4.0)}),), (), (), graph)
    assert str(ExactSearch()(limited(space, 1e-6)).specs["a"]) == "int2"
    with pytest.raises(InfeasibleError, match="lipschitz<=0"):
        ExactSearch()(limited(space, 0.0))


@pytest.mark.parametrize(("log", "text"), [(0.0, "1"), (math.log(12345.6), "1.235e+04"), (2302.585093, "1e+1000")])
def test_constants_beyond_floats_are_readable(log: float, text: str) -> None:
    assert readable(log) == text


def test_a_deep_residual_network_is_solved_and_proved() -> None:
    rng = np.random.default_rng(0)
    nodes, layers = [Node("x"), Node("stem", (Edge(0, 0.0, "l0"),))], ["l0"]
    for _ in range(8):
        source = len(nodes) - 1
        nodes.append(Node("a", (Edge(source, 0.0, f"l{len(layers)}"),)))
        nodes.append(Node("sum", (Edge(source + 1, 0.0, f"l{len(layers) + 1}"), Edge(source))))
        layers += [f"l{len(layers)}", f"l{len(layers) + 1}"]
    spaces = []
    for name in layers:
        formats = {t: (float(rng.uniform(0.2, 1) * 4.0 ** -int(t[3:])), float(rng.uniform(0.5, 4))) for t in FORMATS}
        spaces.append(layer(name, int(rng.integers(10, 4000)), formats))
    space = Space(tuple(spaces), (Limit("bits", 5.0),), (), Potentials(tuple(nodes)))
    items = build_items(space)
    free = minimise(items, None, 1.0, 30)
    ceiling = ceiling_of(limited(space, 1.0))
    assert free.picks is not None
    half = math.exp((ceiling.floor + ceiling.constant(free.picks)) / 2)
    tight = limited(space, half)
    outcome, other = ExactSearch()(tight), GreedySearch()(tight)
    assert outcome.notes[0].startswith("optimal")
    assert constant(tight, chosen(tight, outcome)) <= half
    assert value(chosen(tight, outcome)) <= value(chosen(tight, other)) + 1e-12
    missed = 1 - value(chosen(tight, outcome)) / value(chosen(tight, other))
    assert other.gap is not None
    assert missed <= other.gap


MISTAKES: list[tuple[Any, str, Any]] = [
    (Ceiling, "keeps", lambda self, picks: True),
    (Ceiling, "constant", lambda self, picks: self.potentials.values(self.norms(picks))[-1] - 0.3),
    (Ceiling, "rises", lambda self, picks: [3 * (log[:1].sum(0) - log[:1].sum(0)[p]) for log, p in
                                            zip(self.logs, picks, strict=True)]),
    (greedy, "with_tangent", lambda items, ceiling, picks, stretch=1.0: with_tangent(items, ceiling, picks, 3.0)),
]  # fmt: skip


def check_some() -> None:
    for graph in GRAPHS:
        test_every_plan_enumerated(graph, 5.0, False)
        test_the_tangent_is_a_budget_that_every_plan_below_the_ceiling_keeps(graph)


@pytest.mark.parametrize(("where", "name", "wrong"), MISTAKES)
def test_planted_mistakes_are_caught(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Any) -> None:
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((AssertionError, InfeasibleError, pytest.fail.Exception)):
        check_some()
