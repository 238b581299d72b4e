"""Exchanges and prices: no pair that helps is missed, prices bound the optimum, walks are those of the textbook."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from qopt.search import exchange
from qopt.search.exchange import improve
from qopt.search.feasible import a_plan
from qopt.search.greedy import best_plan, build_hulls, lower_bound, priced, prices, solve, walk_down, walk_up
from qopt.search.items import FULL, Item, keeps_limits, spending, total
from qopt.search.solver import minimise
from qopt.spec import WeightSpec

SPEC = WeightSpec("int", 4)


def random_items(seed: int, count: int = 6, choices: int = 5, budgets: int = 2) -> list[Item]:
    """Dearer choices are mostly better; most plans break a budget."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        costs = np.sort(rng.uniform(0, 2.2 / count, (choices, budgets)), axis=0)
        losses = np.sort(rng.uniform(0, 1, choices))[::-1] * 10 ** rng.uniform(-1, 1)
        found.append(Item((f"l{i}",), (SPEC,) * choices, costs, losses))
    return found


def neighbours(items: list[Item], picks: list[int]) -> list[list[int]]:
    """Every plan one or two changes away."""
    found = []
    for first, second in combinations(range(len(items)), 2):
        for a, b in product(range(len(items[first].specs)), range(len(items[second].specs))):
            other = list(picks)
            other[first], other[second] = a, b
            found.append(other)
    return found


def optimum(items: list[Item]) -> float:
    cost, found = np.zeros((1, items[0].costs.shape[1])), np.zeros(1)
    for item in items:
        cost = (cost[:, None] + item.costs[None]).reshape(-1, cost.shape[1])
        found = (found[:, None] + item.sensitivities[None]).reshape(-1)
    return float(found[(cost <= FULL).all(axis=1)].min())


def worths(items: list[Item]) -> list[NDArray[np.float64] | None]:
    """Prices that are right, none, too low and far too high: all are allowed."""
    right = prices(items)
    return [right, None, right / 3, right * 10 + 1]


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), budgets=st.integers(1, 3))
def test_no_exchange_of_two_is_missed_whatever_the_prices(seed: int, budgets: int) -> None:
    items = random_items(seed, budgets=budgets)
    start = a_plan(items, None)
    if start is None:
        return
    for worth in worths(items):
        better = improve(items, start, None, worth)
        assert keeps_limits(items, better)
        least = min(total(items, p) for p in neighbours(items, better) if keeps_limits(items, p))
        assert total(items, better) <= least + 1e-9, "a pair that helps was missed"


def test_too_small_a_neighbourhood_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MOST", 3)
    with pytest.raises(AssertionError, match="a pair that helps was missed"):
        test_no_exchange_of_two_is_missed_whatever_the_prices()


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), budgets=st.integers(1, 4), factor=st.floats(0, 5))
def test_any_prices_bound_the_optimum_and_the_right_ones_best(seed: int, budgets: int, factor: float) -> None:
    items = random_items(seed, budgets=budgets)
    if a_plan(items, None) is None:
        return
    best, worth = optimum(items), prices(items)
    assert (worth >= 0).all()
    assert priced(items, worth) <= best + 1e-9
    assert priced(items, factor * worth) <= priced(items, worth) + 1e-9
    assert lower_bound(items, worth) >= lower_bound(items) - 1e-7 * best
    picks, bound = solve(items, None)
    assert bound <= best + 1e-9 <= total(items, picks) + 2e-9


def test_prices_of_budgets_that_all_plans_keep_are_zero() -> None:
    items = [Item(("a",), (SPEC,) * 2, np.array([[0.1, 0.2], [0.2, 0.1]]), np.array([1.0, 0.5]))]
    assert prices(items).tolist() == [0.0, 0.0]
    assert solve(items, None) == ([1], 0.5)


def test_walks_by_hand() -> None:
    """Two layers, one budget of 1: the steeper edge first, the other does not fit."""
    steep = Item(("a",), (SPEC,) * 2, np.array([[0.2], [0.6]]), np.array([4.0, 0.0]))
    flat = Item(("b",), (SPEC,) * 3, np.array([[0.3], [0.5], [0.9]]), np.array([3.0, 2.0, 1.5]))
    items = [steep, flat]
    hulls = build_hulls(items)
    assert hulls.index.tolist() == [0, 1, 1]
    assert np.allclose(hulls.saving, [10.0, 5.0, 1.25])
    assert walk_up(items) == [1, 0]
    assert walk_down(items) == [1, 0]
    assert walk_up([steep]) == [1]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), budgets=st.integers(1, 3))
def test_the_walk_up_takes_edges_one_by_one(seed: int, budgets: int) -> None:
    """As it is defined, an edge at a time."""
    items = random_items(seed, 8, budgets=budgets)
    hulls = build_hulls(items)
    picks = list(hulls.cheapest)
    for index, source, target in zip(hulls.index, hulls.source, hulls.target, strict=True):
        if picks[index] == source:
            after = [*picks[:index], int(target), *picks[index + 1 :]]
            picks = after if (spending(items, after) <= FULL).all() else picks
    assert walk_up(items) == picks


def test_a_known_plan_changes_nothing_but_the_time() -> None:
    for seed in range(5):
        items = random_items(seed, 12, 6)
        if a_plan(items, None) is None:
            continue
        known = best_plan(items, None, prices(items), 1)
        for plan in (None, known, a_plan(items, None)):
            solved = minimise(items, None, total(items, known), 20, plan)
            assert solved.done
            assert solved.picks is not None
            assert total(items, solved.picks) == pytest.approx(total(items, minimise(items, None, 1.0, 20).picks or []))


def test_many_layers_come_close_to_the_bound() -> None:
    items = random_items(0, 400, 8)
    picks, bound = solve(items, None)
    assert keeps_limits(items, picks)
    assert total(items, picks) <= bound * 1.01
