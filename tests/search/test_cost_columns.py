"""Limits on what devices price: budget columns of the space, kept by every strategy, explained where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import InfeasibleError, UsageError
from qopt.limits import Limit
from qopt.search.exact import ExactSearch
from qopt.search.feasible import feasible, infeasible
from qopt.search.greedy import GreedySearch
from qopt.search.space import Space, column_of, costs
from qopt.search.thresholds import Thresholds, apply_thresholds
from qopt.search.uniform import UniformSearch
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]
LAYERS = [
    (name, 1000, 10, {"int2": weight * 3.0, "int4": weight * 1.0, "int8": weight * 0.1})
    for name, weight in (("a", 1.0), ("b", 5.0), ("c", 0.2))
]
SECONDS = {"int2": 3e-3, "int4": 2e-3, "int8": 1e-3}
"""A machine that pays for unpacking."""


@pytest.fixture
def space(make_space: MakeSpace) -> Space:
    """Three layers, priced by one machine in time and by another in energy, 1 ms and 1 uJ beside the layers."""
    plain = make_space(LAYERS)
    layers = tuple(
        replace(
            layer,
            candidates=tuple(
                replace(c, costs={"latency on m": SECONDS[str(c.spec)], "energy on e": c.code_bits * 1e-9})
                for c in layer.candidates
            ),
        )
        for layer in plain.layers
    )
    return replace(plain, layers=layers, fixed={"latency on m": 1e-3, "energy on e": 1e-6})


def limited(space: Space, *limits: Limit) -> Space:
    return replace(space, limits=limits)


def plans(space: Space) -> list[tuple[float, dict[str, float]]]:
    """Every plan: its sensitivity and its costs, what is beside the layers included."""
    found = []
    for chosen in product(*(layer.candidates for layer in space.layers)):
        columns = costs(chosen[0])
        spent = {column: sum(costs(c)[column] for c in chosen) + space.beside(column) for column in columns}
        found.append((sum(c.sensitivity for c in chosen), spent))
    return found


def spent(space: Space, specs: dict[str, WeightSpec], column: str) -> float:
    return space.beside(column) + sum(costs(layer.candidate(specs[layer.layer]))[column] for layer in space.layers)


@pytest.mark.parametrize("strategy", [GreedySearch(), ExactSearch()], ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("limits", "columns"),
    [
        ((Limit("latency", 5.5e-3),), ("latency on m",)),
        ((Limit("energy", 1.3e-5),), ("energy on e",)),
        ((Limit("latency", 6.5e-3), Limit("energy", 1.9e-5)), ("latency on m", "energy on e")),
        ((Limit("latency", 7e-3), Limit("bits", 5.0)), ("latency on m", "code_bits")),
        ((Limit("latency", 7e-3), Limit("size", 2500.0)), ("latency on m", "bytes")),
    ],
)
def test_the_best_plan_within_the_limits_is_found(
    space: Space, strategy: GreedySearch | ExactSearch, limits: tuple[Limit, ...], columns: tuple[str, ...]
) -> None:
    bounded = limited(space, *limits)
    bounds = [one.bound * (bounded.weights if one.quantity == "bits" else 1) for one in limits]
    allowed = [
        value for value, cost in plans(bounded)
        if all(cost[column] <= bound * (1 + 1e-12) for column, bound in zip(columns, bounds, strict=True))
    ]  # fmt: skip
    outcome = strategy(bounded)
    assert all(
        spent(bounded, outcome.specs, column) <= bound * (1 + 1e-9)
        for column, bound in zip(columns, bounds, strict=True)
    )
    value = sum(layer.candidate(outcome.specs[layer.layer]).sensitivity for layer in bounded.layers)
    assert value == pytest.approx(min(allowed))


def test_budgets_by_hand(space: Space) -> None:
    bounded = limited(space, Limit("latency", 5e-3), Limit("bits", 4.0), Limit("energy", 1e-5), Limit("flash", 4000.0))
    assert [(column, budget) for column, budget in bounded.budgets()] == [
        ("latency on m", pytest.approx(4e-3)), ("code_bits", 12000.0), ("energy on e", pytest.approx(9e-6)),
        ("bytes", 4000.0 - bounded.table_bytes),
    ]  # fmt: skip
    assert [str(row.limit) for row in bounded.rows()] == [
        "latency<=0.005s", "bits<=4", "energy<=1e-05J", "flash<=4000"
    ]  # fmt: skip


def test_a_limit_holds_on_every_machine_that_prices_it(space: Space) -> None:
    both = replace(
        space,
        layers=tuple(
            replace(x, candidates=tuple(replace(c, costs={**c.costs, "latency on n": 2e-3}) for c in x.candidates))
            for x in space.layers
        ),
    )
    bounded = limited(both, Limit("latency", 5e-3))
    assert [column for column, _ in bounded.budgets()] == ["latency on m", "latency on n"]
    assert not feasible(bounded)
    assert "at least 6 ms on n with these candidates" in str(infeasible(bounded))


def test_program_memory_is_that_of_the_device_where_there_is_one(space: Space) -> None:
    device = replace(
        space,
        layers=tuple(
            replace(x, candidates=tuple(replace(c, costs={"flash on m": 7.0 * c.bytes}) for c in x.candidates))
            for x in space.layers
        ),
        fixed={"flash on m": 100.0},
    )
    assert limited(device, Limit("flash", 900.0)).budgets() == (("flash on m", 800.0),)
    assert limited(device, Limit("size", 900.0)).budgets() == (("bytes", 900.0 - device.table_bytes),)
    assert limited(space, Limit("flash", 900.0)).budgets() == (("bytes", 900.0 - space.table_bytes),)


UNPRICED = [Limit("bops", 1e6), Limit("latency", 1.0), Limit("energy", 1.0)]


@pytest.mark.parametrize("limit", UNPRICED, ids=str)
def test_a_limit_that_nothing_prices_is_refused(make_space: MakeSpace, limit: Limit) -> None:
    with pytest.raises(UsageError) as caught:
        limited(make_space(LAYERS), limit).budgets()
    assert f"no cost model of this target prices {limit.quantity} (got {limit})" in str(caught.value)
    assert "`qopt targets` lists what prices others" in str(caught.value)


def test_memory_at_once_is_no_sum_over_layers(space: Space) -> None:
    assert limited(space, Limit("sram", 1.0)).budgets() == ()
    assert limited(space, Limit("sram", 1.0)).additive == ()


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ([Limit("latency", 3e-3)], "latency<=0.003s: no plan keeps the limit (got at least 4 ms on m with these"),
        ([Limit("latency", 5e-4)], "latency<=0.0005s: no plan keeps the limit (got at least 4 ms on m with these"),
        ([Limit("energy", 5e-6)], "energy<=5e-06J: no plan keeps the limit (got at least 7 uJ on e with these"),
        ([Limit("bits", 8.0), Limit("latency", 1e-3)], "latency<=0.001s: no plan keeps the limit (got at least 4 ms"),
    ],
)
def test_what_cannot_be_kept_says_how_far_one_can_get(space: Space, limits: list[Limit], said: str) -> None:
    bounded = limited(space, *limits)
    assert not feasible(bounded)
    for strategy in (ExactSearch(), GreedySearch()):
        with pytest.raises(InfeasibleError):
            strategy(bounded)
    with pytest.raises(InfeasibleError) as caught:
        apply_thresholds(bounded, Thresholds("none"))
    assert str(caught.value).startswith(said)


def test_limits_that_exclude_each_other_say_what_is_left_of_one(space: Space) -> None:
    """Few bits are slow here: each limit can be kept alone."""
    one, other = Limit("latency", 4.5e-3), Limit("bits", 4.0)
    assert feasible(limited(space, one))
    assert feasible(limited(space, other))
    bounded = limited(space, one, other)
    assert not feasible(bounded)
    least = min(cost["latency on m"] for _, cost in plans(space) if cost["code_bits"] <= 12000)
    assert str(infeasible(bounded)) == (
        f"latency<=0.0045s: no plan keeps all limits at once (got at least {1000 * least:.4g} ms on m with these "
        "candidates, within bits<=4); raise a limit"
    )


def test_uniform_plans_keep_them_too(space: Space) -> None:
    assert set(map(str, UniformSearch()(limited(space, Limit("energy", 1.4e-5))).specs.values())) == {"int4"}


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_feasible_is_what_enumeration_says(make_space: MakeSpace, seed: int, first: float, second: float) -> None:
    rng = np.random.default_rng(seed)
    plain = make_space(LAYERS)
    layers = tuple(
        replace(x, candidates=tuple(replace(c, costs={"latency on m": float(rng.uniform())}) for c in x.candidates))
        for x in plain.layers
    )
    space = limited(replace(plain, layers=layers), Limit("latency", 3 * first), Limit("bits", 8 * second))
    kept = [
        cost for _, cost in plans(space)
        if cost["latency on m"] <= 3 * first and cost["code_bits"] <= 8 * second * space.weights
    ]  # fmt: skip
    assert feasible(space) == bool(kept)


def test_columns_of_storage_keep_their_names() -> None:
    assert column_of("code_bits", "bits") == "code_bits"
    assert column_of("bytes", "bits") == "bytes"
    assert column_of("bytes", "device") == "bytes on device"
    assert column_of("latency", "device") == "latency on device"
