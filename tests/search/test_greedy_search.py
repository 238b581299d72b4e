"""Greedy search against brute force: limits are kept, plans are found, the printed gap is never too small."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog

from qopt.errors import InfeasibleError, PlanError, UsageError
from qopt.limits import Limit
from qopt.search import greedy
from qopt.search.exchange import improve
from qopt.search.feasible import a_plan, feasible
from qopt.search.greedy import GreedySearch, hull, lower_bound, starts
from qopt.search.items import Item, build_items, keeps_limits, total
from qopt.search.space import Candidate, Outcome, Space
from qopt.size import Stored, code_bits, stored_bytes
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]


def stored(space: Space, chosen: dict[str, WeightSpec]) -> list[Stored]:
    """The plan as the file holds it; channels follow from the bytes of the candidate."""
    found = []
    for layer in space.layers:
        candidate = layer.candidate(chosen[layer.layer])
        bare = Stored(layer.weights, 0, candidate.spec)
        found.append(Stored(layer.weights, (candidate.bytes - bare.bytes) // 4, candidate.spec))
    return found


def all_plans(space: Space) -> list[dict[str, Candidate]]:
    plans = [
        {layer.layer: c for layer, c in zip(space.layers, picks, strict=True)}
        for picks in product(*(layer.candidates for layer in space.layers))
    ]
    return [p for p in plans if all(len({p[name].spec for name in group}) == 1 for group in space.ties)]


def keeps(space: Space, plan: dict[str, Candidate]) -> bool:
    """By definition; the tables of all candidate formats are set aside, as `Space.budgets` says."""
    stored = [Stored(8, 1, c.spec) for layer in space.layers for c in layer.candidates]
    tables = stored_bytes(stored) - sum(tensor.bytes for tensor in stored)
    bits = sum(c.code_bits for c in plan.values()) / space.weights
    size = sum(c.bytes for c in plan.values()) + tables
    spent = {"bits": bits, "size": size, "flash": size}
    return all(spent[limit.quantity] <= limit.bound * (1 + 1e-9) for limit in space.limits)


def value(plan: dict[str, Candidate]) -> float:
    return sum(c.sensitivity for c in plan.values())


def optimum(space: Space) -> float | None:
    return min((value(plan) for plan in all_plans(space) if keeps(space, plan)), default=None)


def check(space: Space) -> tuple[float, Outcome] | None:
    """Everything that must hold of one answer; the share by which it misses the optimum."""
    best = optimum(space)
    if best is None:
        with pytest.raises(InfeasibleError):
            GreedySearch()(space)
        return None
    outcome = GreedySearch()(space)
    assert list(outcome.specs) == list(outcome.reasons) == [layer.layer for layer in space.layers]
    plan = {layer.layer: layer.candidate(outcome.specs[layer.layer]) for layer in space.layers}
    for limit in space.limits:
        real = stored(space, outcome.specs)
        spent = code_bits(real) if limit.quantity == "bits" else stored_bytes(real)
        assert spent <= limit.bound * (1 + 1e-9), "a limit is broken"
    assert all(len({outcome.specs[name] for name in group}) == 1 for group in space.ties)
    found = value(plan)
    missed = (found - best) / abs(found) if found else 0.0
    assert outcome.gap is not None
    assert outcome.gap >= missed - 1e-9, "the printed gap is below the true one"
    assert greedy.lower_bound(build_items(space)) <= best + 1e-9, "the bound is above the optimum"
    assert f"more than {100 * outcome.gap:.2f} %" in outcome.notes[0]
    return (found - best) / best if best else 0.0, outcome


FORMATS = ["int2", "log2", "int4", "int4:max", "log4:tensor", "int8"]
sensitivities = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.integers(0, 10**6).map(lambda n: n / 10**5))
layer_formats = st.dictionaries(st.sampled_from(FORMATS), sensitivities, min_size=1, max_size=4)
sizes = st.one_of(st.integers(1, 50), st.integers(1000, 5000))


@st.composite
def spaces(draw: st.DrawFn, make: MakeSpace, tied: bool) -> Space:
    count = draw(st.integers(1, 4))
    names = [f"l{i}" for i in range(count)]
    layers = [(name, draw(sizes), draw(st.integers(1, 8)), draw(layer_formats)) for name in names]
    limits = draw(
        st.lists(
            st.one_of(
                st.builds(Limit, st.just("bits"), st.sampled_from([2.0, 3.0, 4.0, 5.5, 8.0])),
                st.builds(Limit, st.sampled_from(["size", "flash"]), st.integers(1, 9000).map(float)),
            ),
            max_size=3,
        )
    )
    ties = [names[:2]] if tied and count > 1 else []
    space = make(layers, limits, ties)
    if ties:
        assume(
            len({frozenset(c.spec for c in layer.candidates) for layer in space.layers[:2]}) == 1 or draw(st.booleans())
        )
    return space


@settings(max_examples=250)
@given(data=st.data(), tied=st.booleans())
def test_any_small_space(make_space: MakeSpace, data: st.DataObject, tied: bool) -> None:
    check(data.draw(spaces(make_space, tied)))


def gaps(random_space: MakeSpace, *, dominated: bool, budgets: int, seeds: range = range(200)) -> NDArray[np.float64]:
    checked = [check(random_space(seed, dominated=dominated, budgets=budgets)) for seed in seeds]
    return np.array([found[0] for found in checked if found is not None])


def check_quality(missed: NDArray[np.float64], mean: float, worst: float) -> None:
    assert missed.mean() <= mean
    assert missed.max() <= worst


@pytest.mark.parametrize(
    ("dominated", "budgets", "mean", "worst"),
    [(True, 1, 0.001, 0.02), (False, 1, 0.001, 0.02), (True, 2, 0.01, 1.0), (False, 2, 0.01, 0.5)],
)
def test_the_average_gap_over_random_spaces(
    random_space: MakeSpace, monkeypatch: pytest.MonkeyPatch, dominated: bool, budgets: int, mean: float, worst: float
) -> None:
    monkeypatch.setitem(globals(), "optimum", fast_optimum)
    missed = gaps(random_space, dominated=dominated, budgets=budgets)
    assert len(missed) > 150
    check_quality(missed, mean, worst)


def sums(items: list[Item]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Costs (plans, budgets) and sensitivities (plans,) of all combinations."""
    cost, found = np.zeros((1, items[0].costs.shape[1])), np.zeros(1)
    for item in items:
        cost = (cost[:, None] + item.costs[None]).reshape(-1, cost.shape[1])
        found = (found[:, None] + item.sensitivities[None]).reshape(-1)
    return cost, found


def fast_optimum(space: Space) -> float | None:
    cost, found = sums(build_items(space))
    kept = found[(cost <= 1 + 1e-9).all(axis=1)]
    return float(kept.min()) if len(kept) else None


def test_both_oracles_agree(random_space: MakeSpace) -> None:
    for seed in range(1):
        space = random_space(seed, dominated=True, budgets=2)
        slow, fast = optimum(space), fast_optimum(space)
        assert slow is not None
        assert slow == pytest.approx(fast, rel=1e-12)


def check_everything(random_space: MakeSpace) -> None:
    check_quality(gaps(random_space, dominated=True, budgets=1, seeds=range(60)), 0.001, 0.02)
    check_bound(random_space, 1)


def reversed_hull(weight: greedy.Column, sensitivity: greedy.Column) -> list[int]:
    return hull(weight, sensitivity)[::-1]


def no_hull(weight: greedy.Column, sensitivity: greedy.Column) -> list[int]:
    return [int(i) for i in np.lexsort((sensitivity, weight))]


def lonely(items: Any, ceiling: Any, worth: Any) -> list[list[int]]:
    return [a_plan(items, None) or []]


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"hull": reversed_hull}, "the order of the hull"),
    ({"hull": no_hull}, "points off the hull"),
    ({"improve": lambda items, picks, ceiling, worth: picks, "starts": lonely}, "no improvement"),
    ({"improve": lambda items, picks, ceiling, worth: picks, "pinned_walks": lambda items, hulls: [],
      "walk_down": lambda items, hulls: [0] * 6, "equal_widths": lambda items: []}, "walk up alone"),
    ({"keeps": lambda items, ceiling, picks: True}, "starts outside the limits"),
    ({"FULL": 1.2}, "a budget stretched"),
    ({"lower_bound": lambda items, w=None: sum(float(i.sensitivities.min()) for i in items)}, "a bound without limits"),
    ({"lower_bound": lambda items, worth=None: lower_bound(items, worth) * 1.5}, "a bound above the optimum"),
    ({"lower_bound": lambda items, worth=None: total(items, starts(items)[0])}, "no bound at all"),
]  # fmt: skip


@pytest.mark.parametrize(("mistake", "what"), MISTAKES, ids=[what for _, what in MISTAKES])
def test_planted_mistakes_are_caught(
    random_space: MakeSpace, monkeypatch: pytest.MonkeyPatch, mistake: dict[str, Any], what: str
) -> None:
    monkeypatch.setitem(globals(), "optimum", fast_optimum)
    for name, wrong in mistake.items():
        monkeypatch.setattr(greedy, name, wrong)
    with pytest.raises((AssertionError, InfeasibleError, pytest.fail.Exception)):
        check_everything(random_space)


columns = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=9)


@settings(max_examples=200)
@given(points=columns, multiplier=st.floats(0, 50))
def test_the_hull_holds_the_best_choice_for_every_price(points: list[tuple[int, int]], multiplier: float) -> None:
    weight, sensitivity = np.array(points, np.float64).T
    kept = hull(weight, sensitivity)
    priced = sensitivity + multiplier * weight
    assert priced[kept].min() == pytest.approx(priced.min())
    assert (np.diff(weight[kept]) > 0).all()
    assert (np.diff(sensitivity[kept]) < 0).all()
    slopes = np.diff(sensitivity[kept]) / np.diff(weight[kept])
    assert (np.diff(slopes) > 0).all()


def check_bound(random_space: MakeSpace, budgets: int) -> None:
    """HiGHS solves the same linear relaxation."""
    for seed in range(15):
        items = build_items(random_space(seed, dominated=seed % 2 == 0, budgets=budgets))
        if a_plan(items, None) is None:
            continue
        costs = np.concatenate([item.costs for item in items]).T
        rows = [[float(i == j) for j, item in enumerate(items) for _ in item.specs] for i in range(len(items))]
        objective = np.concatenate([item.sensitivities for item in items])
        solved = linprog(objective, costs, np.ones(budgets), rows, np.ones(len(items)))
        assert solved.fun is not None
        bound, solved_value = greedy.lower_bound(items), float(solved.fun)
        assert bound <= solved_value + 1e-9
        if budgets == 1:
            assert bound == pytest.approx(solved_value, rel=1e-6)


@pytest.mark.parametrize("budgets", [1, 2])
def test_the_bound_is_the_linear_relaxation(random_space: MakeSpace, budgets: int) -> None:
    check_bound(random_space, budgets)


@settings(max_examples=150)
@given(st.data())
def test_a_plan_is_found_wherever_there_is_one(data: st.DataObject) -> None:
    budgets = data.draw(st.integers(1, 3))
    shares = st.integers(0, 60).map(lambda n: n / 100)
    items = [
        Item((f"l{i}",), (WeightSpec("int", 4),) * len(costs), np.array(costs), np.zeros(len(costs)))
        for i, costs in enumerate(
            data.draw(
                st.lists(
                    st.lists(st.lists(shares, min_size=budgets, max_size=budgets), min_size=1, max_size=4),
                    min_size=1,
                    max_size=4,
                )
            )
        )
    ]
    found = a_plan(items, None)
    assert (found is not None) == bool((sums(items)[0] <= 1 + 1e-9).all(axis=1).any())
    assert found is None or keeps_limits(items, found)


def test_without_limits_every_layer_gets_its_best(make_space: MakeSpace) -> None:
    space = make_space(
        [("a", 10, 1, {"int2": 3.0, "int8": 1.0, "int4": 2.0}), ("b", 10, 1, {"int4": 0.5, "int8": 0.7})]
    )
    outcome = GreedySearch()(space)
    assert {name: str(spec) for name, spec in outcome.specs.items()} == {"a": "int8", "b": "int4"}
    assert outcome.gap == 0.0
    assert outcome.reasons == {
        "a": "sensitivity 1 (others: int2 3, int4 2)",
        "b": "sensitivity 0.5 (others: int8 0.7)",
    }
    assert outcome.notes == ("no plan within the limits lowers the summed sensitivity by more than 0.00 %",)


def test_an_only_candidate_is_called_so(make_space: MakeSpace) -> None:
    outcome = GreedySearch()(make_space([("a", 10, 1, {"int4": 0.25})], [Limit("bits", 4.0)]))
    assert outcome.reasons == {"a": "sensitivity 0.25 (only candidate)"}


def test_all_zero_sensitivities_have_no_gap(make_space: MakeSpace) -> None:
    outcome = GreedySearch()(make_space([("a", 10, 1, {"int2": 0.0, "int4": 0.0})], [Limit("bits", 4.0)]))
    assert outcome.gap == 0.0


def test_tied_layers_are_priced_together(make_space: MakeSpace) -> None:
    layers = [("a", 100, 1, {"int2": 0.0, "int4": 9.0}), ("b", 10, 1, {"int4": 0.0, "int2": 5.0})]
    specs = GreedySearch()(make_space(layers, ties=[("a", "b")])).specs
    assert set(map(str, specs.values())) == {"int2"}


TIES = [
    ([("a", "x")], PlanError, "x: a tie names an unknown layer"),
    ([("a", "b"), ("b", "c")], PlanError, "b: a layer is tied twice"),
    ([("a", "a")], PlanError, "a: a layer is tied twice"),
    ([("a", "c")], InfeasibleError, "a, c: tied layers have no format in common"),
]


@pytest.mark.parametrize(("ties", "kind", "message"), TIES)
def test_wrong_ties(make_space: MakeSpace, ties: list[tuple[str, ...]], kind: type[Exception], message: str) -> None:
    layers = [("a", 1, 1, {"int2": 0.0}), ("b", 1, 1, {"int2": 0.0}), ("c", 1, 1, {"int4": 0.0})]
    with pytest.raises(kind, match=message):
        GreedySearch()(make_space(layers, ties=ties))


@pytest.mark.parametrize("limit", [Limit("bits", 1.9), Limit("bits", 0.0), Limit("size", 0.0), Limit("size", 1020.0)])
def test_no_plan_is_an_error(make_space: MakeSpace, limit: Limit) -> None:
    space = make_space([("a", 4000, 1, {"int2": 1.0, "int4": 0.0})], [limit])
    assert not feasible(space)
    with pytest.raises(InfeasibleError, match="no combination of formats keeps the limits"):
        GreedySearch()(space)


def test_limits_in_bytes_set_tables_aside(make_space: MakeSpace) -> None:
    layers = [("a", 4000, 1, {"int2": 1.0, "int4": 0.0})]
    exact = stored_bytes([Stored(4000, 1, WeightSpec.parse("int2")), Stored(0, 0, WeightSpec.parse("int4"))])
    assert str(GreedySearch()(make_space(layers, [Limit("size", exact)])).specs["a"]) == "int2"
    with pytest.raises(InfeasibleError):
        GreedySearch()(make_space(layers, [Limit("size", exact - 1)]))


@pytest.mark.parametrize("quantity", ["latency", "energy", "bops", "lipschitz"])
def test_a_limit_that_nothing_prices_is_refused(make_space: MakeSpace, quantity: Any) -> None:
    space = make_space([("a", 10, 1, {"int4": 0.0})], [Limit(quantity, 1.0)])
    with pytest.raises(UsageError, match=f"no cost model of this target prices {quantity}"):
        GreedySearch()(space)


def test_the_same_space_gives_the_same_plan(random_space: MakeSpace) -> None:
    one, other = (GreedySearch()(random_space(6, dominated=True, budgets=1)) for _ in range(2))
    assert (one.specs, one.reasons, one.gap) == (other.specs, other.reasons, other.gap)


def test_many_layers_come_close_to_the_bound(make_space: MakeSpace) -> None:
    rng = np.random.default_rng(0)
    layers = []
    for i in range(120):
        formats = {text: float(rng.uniform(0, 1) / n) for n, text in enumerate(FORMATS, 1)}
        layers.append((f"l{i}", int(rng.integers(100, 90_000)), 16, formats))
    outcome = GreedySearch()(make_space(layers, [Limit("bits", 3.7)]))
    assert outcome.gap is not None
    assert outcome.gap < 0.005


def test_improving_never_makes_it_worse(random_space: MakeSpace) -> None:
    for seed in range(20):
        items = build_items(random_space(seed, dominated=True, budgets=2))
        if a_plan(items, None) is None:
            continue
        for start in starts(items):
            better = improve(items, start)
            assert keeps_limits(items, better)
            assert total(items, better) <= total(items, start)
