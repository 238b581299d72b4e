"""Exact search against brute force: the optimum, ties, several limits at once, and what happens when time is up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import InfeasibleError, UsageError
from qopt.limits import Limit
from qopt.search import exact, greedy, solver
from qopt.search.exact import ExactSearch
from qopt.search.feasible import a_plan
from qopt.search.greedy import GreedySearch
from qopt.search.items import FULL, Item, build_items, keeps_limits, total
from qopt.search.solver import minimise
from qopt.search.space import Outcome, Space
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]


def optimum(items: list[Item]) -> float | None:
    cost, found = np.zeros((1, items[0].costs.shape[1])), np.zeros(1)
    for item in items:
        cost = (cost[:, None] + item.costs[None]).reshape(-1, cost.shape[1])
        found = (found[:, None] + item.sensitivities[None]).reshape(-1)
    kept = found[(cost <= FULL).all(axis=1)]
    return float(kept.min()) if len(kept) else None


def value(space: Space, outcome: Outcome) -> float:
    return sum(layer.candidate(outcome.specs[layer.layer]).sensitivity for layer in space.layers)


def picks(items: list[Item], outcome: Outcome) -> list[int]:
    return [item.specs.index(outcome.specs[item.layers[0]]) for item in items]


def check(space: Space) -> Outcome | None:
    items = build_items(space)
    best = optimum(items)
    if best is None:
        with pytest.raises(InfeasibleError):
            ExactSearch()(space)
        return None
    outcome = ExactSearch()(space)
    assert list(outcome.specs) == list(outcome.reasons) == [layer.layer for layer in space.layers]
    assert keeps_limits(items, picks(items, outcome)), "a limit is broken"
    assert all(len({outcome.specs[name] for name in group}) == 1 for group in space.ties)
    assert value(space, outcome) == pytest.approx(best, rel=1e-9, abs=1e-12), "not the optimum"
    assert value(space, outcome) <= value(space, GreedySearch()(space)) + 1e-12
    assert outcome.gap is not None
    assert 0 <= outcome.gap <= 1e-6
    assert outcome.notes[0].startswith("optimal: no plan within the limits")
    return outcome


FORMATS = ["int2", "log2", "int4", "int4:max", "int8"]
sensitivities = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.integers(0, 10**6).map(lambda n: n / 10**5))
layer_formats = st.dictionaries(st.sampled_from(FORMATS), sensitivities, min_size=1, max_size=4)


@settings(max_examples=120)
@given(data=st.data(), tied=st.booleans())
def test_any_small_space(make_space: MakeSpace, data: st.DataObject, tied: bool) -> None:
    count = data.draw(st.integers(1, 4))
    layers = [
        (f"l{i}", data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 8)), data.draw(layer_formats))
        for i in range(count)
    ]
    bits = st.builds(Limit, st.just("bits"), st.sampled_from([2.0, 3.0, 4.0, 5.5, 8.0]))
    size = st.builds(Limit, st.sampled_from(["size", "flash"]), st.integers(1, 9000).map(float))
    limits = data.draw(st.lists(st.one_of(bits, size), max_size=3))
    space = make_space(layers, limits, [("l0", "l1")] if tied and count > 1 else [])
    if (
        tied
        and count > 1
        and not {c.spec for c in space.layers[0].candidates} & {c.spec for c in space.layers[1].candidates}
    ):
        with pytest.raises(InfeasibleError, match="no format in common"):
            ExactSearch()(space)
        return
    check(space)


@pytest.mark.parametrize("dominated", [False, True])
@pytest.mark.parametrize("budgets", [1, 2])
def test_random_spaces(random_space: MakeSpace, dominated: bool, budgets: int) -> None:
    found = [check(random_space(seed, dominated=dominated, budgets=budgets)) for seed in range(12)]
    assert sum(outcome is not None for outcome in found) >= 6


def random_items(seed: int, count: int = 20, choices: int = 8, budgets: int = 2) -> list[Item]:
    """Costs and sensitivities that have nothing to do with each other, half of the mean cost allowed."""
    rng = np.random.default_rng(seed)
    share = 4.0 / count * rng.uniform(0.2, 1, (count, 1, 1))
    costs = share * rng.uniform(0, 1.4, (count, choices, budgets))
    spec = (WeightSpec("int", 4),) * choices
    return [Item((f"l{i}",), spec, costs[i], rng.uniform(0, 1, choices)) for i in range(count)]


def test_exact_beats_greedy_somewhere_and_both_are_honest() -> None:
    better = 0
    for seed in range(8):
        items = random_items(seed, 40)
        picks_, bound = greedy.solve(items, None)
        solved = minimise(items, None, 1.0, 30)
        assert solved.done
        assert solved.picks is not None
        assert keeps_limits(items, solved.picks)
        exactly, greedily = total(items, solved.picks), total(items, picks_)
        assert bound <= solved.bound + 1e-9
        assert solved.bound == pytest.approx(exactly, rel=1e-6)
        assert exactly <= greedily + 1e-12
        better += exactly < greedily * (1 - 1e-6)
    assert better >= 2, "the test shows nothing"


def test_a_limit_that_is_met_exactly_is_kept(make_space: MakeSpace) -> None:
    layers = [(f"l{i}", 3 * 10**i, 1, {"int2": 4.0, "int4": 2.0, "int8": 1.0}) for i in range(1, 6)]
    weights = sum(3 * 10**i for i in range(1, 6))
    bits = (8 * (weights - 3 * 10**5) + 2 * 3 * 10**5) / weights
    outcome = check(make_space(layers, [Limit("bits", bits)]))
    assert outcome is not None
    assert [str(spec) for spec in outcome.specs.values()] == ["int8"] * 4 + ["int2"]
    outcome = check(make_space(layers, [Limit("bits", bits * (1 - 1e-6))]))
    assert outcome is not None
    assert sorted(str(spec) for spec in outcome.specs.values()) == ["int2", "int4", "int8", "int8", "int8"]


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_the_size_of_sensitivities_does_not_matter(random_space: MakeSpace, scale: float) -> None:
    space = random_space(3, dominated=False, budgets=1)
    layers = tuple(
        replace(x, candidates=tuple(replace(c, sensitivity=scale * c.sensitivity) for c in x.candidates))
        for x in space.layers
    )
    outcome = ExactSearch()(replace(space, layers=layers))
    assert outcome.specs == ExactSearch()(space).specs


def test_the_same_space_gives_the_same_plan(random_space: MakeSpace) -> None:
    one, other = (ExactSearch()(random_space(6, dominated=True, budgets=2)) for _ in range(2))
    assert (one.specs, one.reasons, one.gap, one.notes) == (other.specs, other.reasons, other.gap, other.notes)


INFEASIBLE: list[tuple[list[Limit], str]] = [
    ([Limit("bits", 1.9)], r"bits<=1.9: no plan keeps the limit \(got at least 2 bits"),
    ([Limit("size", 900.0)], r"size<=900: no plan keeps the limit \(got at least \d+ bytes"),
    ([Limit("bits", 8.0), Limit("size", 900.0)], "size<=900: no plan keeps the limit"),
]


@pytest.mark.parametrize(("limits", "message"), INFEASIBLE)
def test_no_plan_names_the_limit_and_what_can_be_reached(
    make_space: MakeSpace, limits: list[Limit], message: str
) -> None:
    space = make_space([("a", 4000, 1, {"int2": 1.0, "int4": 0.0})], limits)
    with pytest.raises(InfeasibleError, match=message):
        ExactSearch()(space)


def test_limits_that_only_together_cannot_be_kept(make_space: MakeSpace) -> None:
    """int2 has the fewest bits, ternary the fewest bytes of nothing: one layer cannot be both."""
    layers = [("a", 100, 400, {"int2": 1.0, "int4:tensor": 0.0})]
    space = make_space(layers)
    small, wide = space.layers[0].candidates
    assert small.code_bits < wide.code_bits
    assert small.bytes > wide.bytes
    size = Limit("size", float(wide.bytes + space.table_bytes))
    both = replace(space, limits=(Limit("bits", 2.0), size))
    said = r"bits<=2: no plan keeps all limits at once \(got at least 4 bits with these candidates, within size<="
    with pytest.raises(InfeasibleError, match=said):
        ExactSearch()(both)


def test_without_limits_every_layer_gets_its_best(make_space: MakeSpace) -> None:
    space = make_space([("a", 10, 1, {"int2": 3.0, "int8": 1.0}), ("b", 10, 1, {"int4": 0.5, "int8": 0.7})])
    outcome = ExactSearch()(space)
    assert {name: str(spec) for name, spec in outcome.specs.items()} == {"a": "int8", "b": "int4"}
    assert outcome.gap == 0.0
    assert outcome.reasons == {"a": "sensitivity 1 (others: int2 3)", "b": "sensitivity 0.5 (others: int8 0.7)"}


def test_all_zero_sensitivities_have_no_gap(make_space: MakeSpace) -> None:
    outcome = ExactSearch()(make_space([("a", 10, 1, {"int2": 0.0, "int4": 0.0})], [Limit("bits", 4.0)]))
    assert outcome.gap == 0.0


def test_when_time_is_up_the_greedy_plan_stays_and_says_so(random_space: MakeSpace) -> None:
    for seed in range(6):
        space = random_space(seed, dominated=True, budgets=1)
        outcome = ExactSearch(seconds=1e-9)(space)
        assert value(space, outcome) == pytest.approx(value(space, GreedySearch()(space)))
        assert outcome.notes[0].startswith("the solver proved no optimum within 1e-09 s: ")
        best = optimum(build_items(space))
        assert best is not None
        assert outcome.gap is not None
        assert outcome.gap >= (value(space, outcome) - best) / value(space, outcome) - 1e-9


def test_when_time_is_up_an_impossible_limit_is_still_named(make_space: MakeSpace) -> None:
    space = make_space([("a", 4000, 1, {"int2": 1.0, "int4": 0.0})], [Limit("bits", 1.9)])
    with pytest.raises(InfeasibleError, match="at least 2 bits"):
        ExactSearch(seconds=1e-9)(space)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_time_limit_is_a_positive_number(seconds: float) -> None:
    with pytest.raises(UsageError, match="a time limit is positive and finite"):
        ExactSearch(seconds)


def test_plans_that_the_tolerance_lets_through_are_cut_off() -> None:
    """A sum above its budget by less than the solver's tolerance, but more than `FULL`: found, refused, replaced."""
    spec = (WeightSpec("int", 4),) * 2
    over = Item(("a",), spec, np.array([[1 + 5e-7], [0.5]]), np.array([0.0, 1.0]))
    coarse, kept = solver.SCALE, []
    try:
        solver.SCALE = 1.0  # type: ignore[misc]
        kept = minimise([over], None, 1.0, 10).picks or []
    finally:
        solver.SCALE = coarse  # type: ignore[misc]
    assert kept == [1]


@pytest.mark.parametrize("count", [60])
def test_many_layers_are_solved_to_the_optimum(make_space: MakeSpace, count: int) -> None:
    rng = np.random.default_rng(0)
    layers = []
    for i in range(count):
        formats = {text: float(rng.uniform(0, 1) / n) for n, text in enumerate(FORMATS, 1)}
        layers.append((f"l{i}", int(rng.integers(100, 90_000)), 16, formats))
    space = make_space(layers, [Limit("bits", 3.7)])
    outcome, other = ExactSearch()(space), GreedySearch()(space)
    assert outcome.gap is not None
    assert other.gap is not None
    true = (value(space, other) - value(space, outcome)) / value(space, other)
    assert 0 <= true <= other.gap


def test_stdout_stays_clean(random_space: MakeSpace, capfd: pytest.CaptureFixture[str]) -> None:
    ExactSearch()(random_space(1, dominated=False, budgets=2))
    assert capfd.readouterr().out == ""


def half_costs(items: list[Item]) -> list[Item]:
    return [replace(item, costs=item.costs / 2) for item in items]


def check_some(random_space: MakeSpace) -> None:
    for seed in range(4):
        check(random_space(seed, dominated=False, budgets=1))


MISTAKES: list[tuple[Any, str, Any]] = [
    (solver, "FULL", 0.8),
    (exact, "minimise", lambda items, *more: minimise(half_costs(list(items)), *more)),
    (exact, "minimise", lambda items, *more: replace(minimise(items, *more), picks=[0] * len(items))),
    (exact, "minimise", lambda items, *more: replace(minimise(items, *more), bound=-math.inf)),
    (exact, "build_items", lambda space: build_items(replace(space, limits=()))),
]


@pytest.mark.parametrize(("where", "name", "wrong"), MISTAKES)
def test_planted_mistakes_are_caught(
    random_space: MakeSpace, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, wrong: Any
) -> None:
    monkeypatch.setattr(greedy, "best_plan", lambda items, ceiling, worth, improved: a_plan(items, ceiling))
    monkeypatch.setattr(where, name, wrong)
    with pytest.raises((AssertionError, InfeasibleError, pytest.fail.Exception)):
        check_some(random_space)


def test_product_oracle_agrees(random_space: MakeSpace) -> None:
    space = random_space(0, dominated=False, budgets=1)
    items = build_items(space)
    slow = min(
        (total(items, p) for p in product(*(range(len(i.specs)) for i in items)) if keeps_limits(items, p)),
        default=None,
    )
    assert slow == pytest.approx(optimum(items))
