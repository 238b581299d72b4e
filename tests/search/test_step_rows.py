"""Limits that hold at every step of execution: rows by hand, kept by every strategy, explained where they cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import InfeasibleError, PlanError
from qopt.limits import Limit
from qopt.search.exact import ExactSearch
from qopt.search.feasible import feasible, infeasible
from qopt.search.greedy import GreedySearch
from qopt.search.items import FULL, build_items, keeps_limits
from qopt.search.quanos import QuanosSearch
from qopt.search.rows import RowChoices, allocate_rows
from qopt.search.space import Moment, Space, costs
from qopt.search.thresholds import Thresholds, apply_thresholds
from qopt.search.uniform import UniformSearch
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]
FORMATS = ("int2", "int4", "int8")
COLUMN = "sram on m"


@pytest.fixture(scope="session")
def make_steps(make_space: MakeSpace) -> Callable[..., Space]:
    """Four layers at random; memory of a weight is its bytes, and step k holds layer k and maybe another."""

    def make(seed: int, *limits: Limit, ties: bool = False) -> Space:
        rng = np.random.default_rng(seed)
        names = [f"l{i}" for i in range(4)]
        layers = [
            (name, int(rng.integers(100, 2000)), 4, {f: float(rng.uniform() / (2 + k)) for k, f in enumerate(FORMATS)})
            for name in names
        ]
        plain = make_space(layers, limits, [names[1:3]] if ties else [])
        spaces = tuple(
            replace(x, candidates=tuple(replace(c, costs={COLUMN: float(c.bytes)}) for c in x.candidates))
            for x in plain.layers
        )
        moments = tuple(
            Moment(f"n{k}", COLUMN, float(rng.integers(0, 500)), tuple(dict.fromkeys((name, names[rng.integers(4)]))))
            for k, name in enumerate(names)
        )
        return replace(plain, layers=spaces, moments=(*moments, Moment("pool", COLUMN, float(rng.integers(0, 900)))))

    return make


def peak(space: Space, specs: dict[str, WeightSpec]) -> float:
    """By definition, the most of all steps."""
    taken = {x.layer: costs(x.candidate(specs[x.layer]))[COLUMN] for x in space.layers}
    return max(one.base + sum(taken[name] for name in one.layers) for one in space.moments)


def plans(space: Space) -> list[tuple[float, float, dict[str, WeightSpec]]]:
    """Every plan that keeps the ties: its sensitivity, its peak and its formats."""
    found = []
    for chosen in product(*(x.candidates for x in space.layers)):
        specs = {x.layer: c.spec for x, c in zip(space.layers, chosen, strict=True)}
        if all(len({specs[name] for name in group}) == 1 for group in space.ties):
            found.append((sum(c.sensitivity for c in chosen), peak(space, specs), specs))
    return found


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1), ties=st.booleans(), bits=st.sampled_from([None, 3.5, 6.0]))
def test_the_limit_holds_at_every_step(
    make_steps: Callable[..., Space], seed: int, share: float, ties: bool, bits: float | None
) -> None:
    space = make_steps(seed, ties=ties)
    peaks = [one for _, one, _ in plans(space)]
    bound = min(peaks) + share * (max(peaks) - min(peaks))
    limits = [Limit("sram", bound), *([] if bits is None else [Limit("bits", bits)])]
    space = replace(space, limits=tuple(limits))
    weight = {x.layer: x.weights for x in space.layers}
    kept = [
        value for value, most, specs in plans(space)
        if most <= bound * (1 + 1e-12)
        and (bits is None or sum(specs[n].container_bits * w for n, w in weight.items()) <= bits * space.weights)
    ]  # fmt: skip
    assert feasible(space) == bool(kept)
    for strategy in (ExactSearch(), GreedySearch()):
        if not kept:
            with pytest.raises(InfeasibleError):
                strategy(space)
            continue
        outcome = strategy(space)
        assert peak(space, outcome.specs) <= bound * (1 + 1e-9), "a step is above the limit"
        value = sum(x.candidate(outcome.specs[x.layer]).sensitivity for x in space.layers)
        assert outcome.gap is not None
        assert outcome.gap >= (value - min(kept)) / value - 1e-9, "the printed gap is below the true one"
        if strategy.name == "exact":
            assert value == pytest.approx(min(kept))


def test_rows_by_hand(make_steps: Callable[..., Space]) -> None:
    space = make_steps(0, Limit("sram", 5000.0), Limit("bits", 4.0))
    rows = space.rows()
    assert [(row.place, row.column) for row in rows] == [
        ("", "code_bits"), *((one.place, COLUMN) for one in space.moments)
    ]  # fmt: skip
    assert all(row.base + row.room == 5000.0 for row in rows[1:])
    assert space.budgets() == (("code_bits", 4.0 * space.weights),)
    assert rows[1].counts("l0")
    assert not rows[-1].counts("l0")
    items = build_items(space)
    assert items[0].costs.shape == (3, len(rows))
    assert items[0].costs[:, -1].tolist() == [0.0, 0.0, 0.0]
    taken = costs(space.layers[0].candidates[1])[COLUMN]
    assert items[0].costs[1, 1] == pytest.approx(taken / rows[1].room)


def test_without_a_limit_on_memory_steps_do_not_matter(make_steps: Callable[..., Space]) -> None:
    space = make_steps(0, Limit("bits", 4.0))
    assert [row.place for row in space.rows()] == [""]
    assert ExactSearch()(space).specs == ExactSearch()(replace(space, moments=())).specs


def test_what_lives_whatever_the_formats_can_be_too_much(make_steps: Callable[..., Space]) -> None:
    space = make_steps(0)
    space = replace(space, limits=(Limit("sram", 3000.0),), moments=(Moment("pool", COLUMN, 3001.0),))
    assert not feasible(space)
    assert not keeps_limits(build_items(space), [0] * 4)
    assert str(infeasible(space)).startswith(
        "sram<=3000: no plan keeps the limit (got at least 2.931 KB on m at node pool with these candidates)"
    )


def test_the_fullest_step_is_named_with_the_cheapest_value(make_steps: Callable[..., Space]) -> None:
    for seed in range(6):
        space = make_steps(seed)
        least = min(one for _, one, _ in plans(space))
        space = replace(space, limits=(Limit("sram", least - 1),))
        error = infeasible(space)
        fullest = max(
            (one.base + sum(min(costs(c)[COLUMN] for c in x.candidates) for x in space.layers if x.layer in one.layers),
             one.place) for one in space.moments
        )  # fmt: skip
        assert fullest[0] == pytest.approx(least)
        assert f"at node {fullest[1]} with these candidates" in str(error)
        with pytest.raises(InfeasibleError, match=f"at node {fullest[1]}"):
            apply_thresholds(space, Thresholds("none"))


def test_limits_that_exclude_each_other_say_what_the_peak_can_be(make_steps: Callable[..., Space]) -> None:
    """Memory falls with the bits, and energy rises: each limit can be kept alone."""
    space = make_steps(3)
    layers = tuple(
        replace(x, candidates=tuple(replace(c, costs={**c.costs, "energy on e": 1 / c.bytes}) for c in x.candidates))
        for x in space.layers
    )
    space = replace(space, layers=layers)

    def energy(specs: dict[str, WeightSpec]) -> float:
        return sum(costs(x.candidate(specs[x.layer]))["energy on e"] for x in space.layers)

    least = min(energy(specs) for _, _, specs in plans(space)) * 1.02
    peaks = [most for _, most, specs in plans(space) if energy(specs) <= least]
    space = replace(space, limits=(Limit("sram", min(peaks) - 10), Limit("energy", least)))
    error = str(infeasible(space))
    assert "no plan keeps all limits at once" in error
    assert f"got at least {min(peaks) / 1024:.4g} KB on m at node n" in error
    assert error.count("within energy<=") == 1


def test_other_strategies_keep_it(make_steps: Callable[..., Space]) -> None:
    space = make_steps(1)
    fours = peak(space, dict.fromkeys((x.layer for x in space.layers), WeightSpec.parse("int4")))
    bounded = replace(space, limits=(Limit("sram", fours),))
    assert set(map(str, UniformSearch()(bounded).specs.values())) == {"int4"}
    found = QuanosSearch(noise={f"l{i}": 1.0 + i for i in range(4)})(bounded)
    assert peak(bounded, found.specs) <= fours


def test_formats_of_rows_keep_it(make_steps: Callable[..., Space]) -> None:
    space = make_steps(2)
    layer = space.layers[0]
    specs = tuple(c.spec for c in layer.candidates)
    each = {column: np.array([costs(c)[column] / 8 for c in layer.candidates]) for column in (COLUMN, "bytes")}
    losses = np.random.default_rng(0).uniform(0, 1, (3, 8)) / np.array([[1.0], [4.0], [16.0]])
    least = min(one for _, one, _ in plans(space))
    bounded = replace(space, limits=(Limit("sram", least * 1.3),))
    outcome = allocate_rows(bounded, {layer.layer: RowChoices(specs, each, losses)})
    spec = outcome.specs[layer.layer]
    shares = spec.row_counts if spec.rows else {spec: 8}
    taken = sum(count * each[COLUMN][specs.index(row)] for row, count in shares.items())
    others = {x.layer: costs(x.candidate(outcome.specs[x.layer]))[COLUMN] for x in space.layers[1:]}
    others[layer.layer] = taken
    most = max(one.base + sum(others[name] for name in one.layers) for one in space.moments)
    assert most <= least * 1.3 * FULL


def test_a_step_of_an_unknown_layer_is_an_error(make_steps: Callable[..., Space]) -> None:
    with pytest.raises(PlanError, match="a step of the execution names an unknown layer"):
        replace(make_steps(0), moments=(Moment("n", COLUMN, 0.0, ("l9",)),))


def test_planted_mistakes_are_caught(make_steps: Callable[..., Space]) -> None:
    """A search that does not see the steps breaks the limit where it binds."""
    broken = 0
    for seed in range(10):
        space = make_steps(seed)
        peaks = sorted(one for _, one, _ in plans(space))
        bounded = replace(space, limits=(Limit("sram", peaks[len(peaks) // 4]),))
        blind = ExactSearch()(replace(bounded, moments=()))
        broken += peak(bounded, blind.specs) > peaks[len(peaks) // 4]
    assert broken >= 5
