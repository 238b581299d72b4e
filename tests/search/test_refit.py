"""Refitted sensitivities: the regression against the textbook formula, the search on networks whose truth is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from qopt.errors import InfeasibleError, UsageError
from qopt.limits import Limit
from qopt.search import refit
from qopt.search.evaluation import Evaluation, Measure
from qopt.search.exact import ExactSearch
from qopt.search.items import build_items, keeps_limits
from qopt.search.refit import RefitSearch, Refitted, tightened, with_sensitivities
from qopt.search.space import Outcome, Space
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]
Specs = Mapping[str, WeightSpec]
FORMATS = ("int2", "log2", "int4", "log4", "int8")


class Network:
    """What is measured: sums of true sensitivities, in which neighbours add something, and noise of a percent."""

    def __init__(self, space: Space, seed: int, *, layer: float = 0.7, beside: float = 0.2) -> None:
        self._rng = np.random.default_rng(seed)
        self.space, self.beside, self.asked = space, beside, list[Specs]()
        self.table = {}
        for one in space.layers:
            factor = np.exp(self._rng.normal(0, layer))
            for candidate in one.candidates:
                own = factor * np.exp(self._rng.normal(0, 0.2))
                self.table[one.layer, candidate.spec] = 3 * candidate.sensitivity * own

    def value(self, specs: Specs) -> float:
        parts = np.array([self.table[layer.layer, specs[layer.layer]] for layer in self.space.layers])
        return float(parts.sum() + self.beside * np.sqrt(parts[1:] * parts[:-1]).sum())

    def evaluate(self, plans: Sequence[Specs]) -> list[Evaluation]:
        return [self.one(specs) for specs in plans]

    def one(self, specs: Specs) -> Evaluation:
        self.asked.append(specs)
        found = self.value(specs) * float(np.exp(self._rng.normal(0, 0.01)))
        return Evaluation(found / 3, 2 * found / 3, 3.0, 1000)


def deep(make_space: MakeSpace, seed: int, layers: int = 14, bound: float = 3.0) -> Space:
    rng, rows = np.random.default_rng(seed), []
    for i in range(layers):
        scale = 10 ** rng.uniform(-3, 0)
        formats = {text: float(scale * rng.uniform(0.5, 1) * 4.0 ** -WeightSpec.parse(text).bits) for text in FORMATS}
        rows.append((f"l{i}", int(10 ** rng.uniform(2, 4)), 8, formats))
    return make_space(rows, [Limit("bits", bound)])


def test_it_finds_better_plans_than_the_solver_alone(make_space: MakeSpace) -> None:
    gains, apart = [], []
    for seed in range(5):
        space = deep(make_space, seed)
        network = Network(space, seed)
        best = RefitSearch().search(space, Measure(network.evaluate, 24, seed))[0]
        first = network.value(ExactSearch()(space).specs)
        true = [np.array([network.table[x.layer, c.spec] for c in x.candidates]) for x in space.layers]
        known = network.value(ExactSearch()(with_sensitivities(space, true)).specs)
        gains.append(network.value(best.specs) / first)
        apart.append((network.value(best.specs) - known) / max(first - known, 1e-9))
        assert gains[-1] < 1.02, "worse than what it began with"
    assert np.mean(gains) < 0.93
    assert np.median(apart) < 0.6, "little of what could be gained"


def test_every_plan_measured_is_new_within_the_limits_and_the_budget(make_space: MakeSpace) -> None:
    space = deep(make_space, 3)
    network = Network(space, 3)
    found = RefitSearch().search(space, Measure(network.evaluate, 17, 3))
    assert len(network.asked) == 17
    assert len({tuple(specs.values()) for specs in network.asked}) == 17
    items = build_items(space)
    for specs in network.asked:
        assert keeps_limits(items, [item.specs.index(specs[item.layers[0]]) for item in items])
    assert 1 < len(found) <= refit.FINALISTS
    values = [network.value(outcome.specs) for outcome in found]
    assert values == sorted(values) or max(values) / min(values) < 1.05
    assert found[0].notes[0].startswith("17 plans were measured, the best is that of ")
    assert found[0].notes[1].startswith("on the front of bits and divergences: 1 of them; its knee: 3 bits")


def test_equal_seeds_and_measurements_give_equal_plans_in_order(make_space: MakeSpace) -> None:
    space = deep(make_space, 4)
    runs = []
    for seed in (0, 0, 1):
        network = Network(space, 9)
        RefitSearch().search(space, Measure(network.evaluate, 12, seed))
        runs.append(network.asked)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("evaluations", [1, 2, 3])
def test_a_small_budget_is_kept(make_space: MakeSpace, evaluations: int) -> None:
    space = deep(make_space, 5)
    network = Network(space, 5)
    found = RefitSearch().search(space, Measure(network.evaluate, evaluations, 5))
    assert len(network.asked) == len(found) == evaluations
    assert network.asked[0] == ExactSearch()(space).specs


def test_it_ends_where_no_plan_is_new(make_space: MakeSpace) -> None:
    space = make_space([("a", 10, 1, {"int4": 1.0, "int8": 0.5}), ("b", 10, 1, {"int4": 1.0})], [Limit("bits", 8)])
    network = Network(space, 0)
    assert len(RefitSearch().search(space, Measure(network.evaluate, 24, 0))) == len(network.asked) <= 2


def test_a_sensitivity_of_zero_everywhere_is_no_obstacle(make_space: MakeSpace) -> None:
    space = make_space([(f"l{i}", 10, 1, {"int2": 0.0, "int4": 0.0}) for i in range(3)], [Limit("bits", 3)])
    found = RefitSearch().search(space, Measure(lambda plans: [Evaluation(0.0, None, 3.0, 1)] * len(plans), 6, 0))
    assert set(found[0].specs) == {"l0", "l1", "l2"}


def measured(space: Space, network: Network, count: int) -> list[tuple[Specs, float]]:
    rng, found = np.random.default_rng(1), list[tuple[Specs, float]]()
    for _ in range(count):
        specs: Specs = {x.layer: x.candidates[int(rng.integers(len(x.candidates)))].spec for x in space.layers}
        found.append((specs, network.value(specs)))
    return found


def test_the_fit_is_bayesian_linear_regression(make_space: MakeSpace) -> None:
    """Against the primal normal equations over every single factor."""
    space = deep(make_space, 6, layers=4)
    plans = measured(space, Network(space, 6), 7)
    model = Refitted.of(space, plans)
    prior = np.concatenate([[c.sensitivity for c in x.candidates] for x in space.layers])
    rows = np.array(
        [[float(c.spec == specs[x.layer]) for x in space.layers for c in x.candidates] for specs, _ in plans]
    )
    values = np.array([value for _, value in plans])
    prior *= np.median(values / (rows @ prior))
    effects = np.zeros((len(prior), 1 + 4 + len(prior)))
    effects[:, 0] = refit.NETWORK
    for i in range(len(prior)):
        effects[i, 1 + i // len(FORMATS)] = refit.LAYER
        effects[i, 5 + i] = refit.FORMAT
    design = (rows * prior) @ effects
    noise = np.diag(1 / (refit.NOISE * np.maximum(values, 1e-3 * values.max())) ** 2)
    solution = np.linalg.solve(
        design.T @ noise @ design + np.eye(design.shape[1]), design.T @ noise @ (values - rows @ prior)
    )
    expected = prior * np.maximum(1 + effects @ solution, refit.LEAST_FACTOR)
    assert np.concatenate(model.mean) == pytest.approx(expected, rel=1e-6)


def test_draws_scatter_about_the_mean_least_where_most_was_measured(make_space: MakeSpace) -> None:
    space = deep(make_space, 7, layers=5)
    plans = measured(space, Network(space, 7, beside=0.0), 30)
    seen = {name: sum(1 for specs, _ in plans if specs["l0"] == name) for name in plans[0][0].values()}
    assert seen
    few, many = Refitted.of(space, plans[:2]), Refitted.of(space, plans)
    rng = np.random.default_rng(0)
    spreads = []
    for model in (few, many):
        draws = np.array([np.concatenate(model.draw(rng)) for _ in range(400)])
        mean = np.concatenate(model.mean)
        assert (draws > 0).all()
        assert np.median(np.abs(draws.mean(0) / mean - 1)) < 0.25
        spreads.append(np.median(draws.std(0) / draws.mean(0)))
    assert spreads[1] < spreads[0]


def test_tightening_leaves_limits_that_are_no_sums(make_space: MakeSpace) -> None:
    limits = (Limit("bits", 4.0), Limit("size", 1000.0), Limit("lipschitz", 9.0), Limit("sram", 500.0))
    space = replace(deep(make_space, 0), limits=limits)
    assert [limit.bound for limit in tightened(space, 0.5).limits] == [2.0, 500.0, 9.0, 500.0]


def test_sensitivities_are_put_in_their_place(make_space: MakeSpace) -> None:
    space = deep(make_space, 1, layers=2)
    table = [np.arange(5.0), 10 + np.arange(5.0)]
    found = with_sensitivities(space, table)
    assert [[c.sensitivity for c in x.candidates] for x in found.layers] == [values.tolist() for values in table]
    assert [c.bytes for x in found.layers for c in x.candidates] == [
        c.bytes for x in space.layers for c in x.candidates
    ]


def test_limits_that_nothing_keeps(make_space: MakeSpace) -> None:
    space = deep(make_space, 0, bound=1.0)
    with pytest.raises(InfeasibleError, match="bits<=1"):
        RefitSearch().search(space, Measure(Network(space, 0).evaluate, 5, 0))


@pytest.mark.parametrize("options", [{"probes": -1}, {"draws": -1}, {"spread": 0.0}])
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="refit search"):
        RefitSearch(**options)  # type: ignore[arg-type]


def test_reasons_tell_how_the_plan_came_about(make_space: MakeSpace) -> None:
    space = deep(make_space, 2)
    found: Outcome = RefitSearch().search(space, Measure(Network(space, 2).evaluate, 9, 2))[0]
    assert all(reason.startswith("refit, ") for reason in found.reasons.values())
    assert list(found.reasons) == [layer.layer for layer in space.layers]
