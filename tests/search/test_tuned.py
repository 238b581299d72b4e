"""Optuna over block weights: every trial is a plan within the limits, the same ones in the same order every time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import optuna
import pytest

from qopt.errors import InfeasibleError, UsageError
from qopt.limits import Limit
from qopt.search.evaluation import Evaluation, Measure
from qopt.search.exact import ExactSearch
from qopt.search.items import build_items, keeps_limits
from qopt.search.refit import tightened
from qopt.search.space import Space
from qopt.search.tuned import SHARE, OptunaSearch, _Decoder
from qopt.search.uniform import UniformSearch
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]
Specs = Mapping[str, WeightSpec]
FORMATS = ("int2", "log2", "int4", "log4", "int8")


@pytest.fixture
def space(make_space: MakeSpace) -> Space:
    rng, rows = np.random.default_rng(0), []
    for i in range(15):
        scale = 10 ** rng.uniform(-3, 0)
        formats = {text: float(scale * rng.uniform(0.5, 1) * 4.0 ** -WeightSpec.parse(text).bits) for text in FORMATS}
        rows.append((f"l{i}", int(10 ** rng.uniform(2, 4)), 8, formats))
    return make_space(rows, [Limit("bits", 3.0)])


class Network:
    """Its first eight layers are thirty times as sensitive as was measured of them alone."""

    def __init__(self, space: Space, *, attacked: bool = True) -> None:
        self.space, self.attacked, self.asked = space, attacked, list[Specs]()

    def value(self, specs: Specs) -> float:
        parts = [layer.candidate(specs[layer.layer]).sensitivity for layer in self.space.layers]
        return 30 * sum(parts[:8]) + sum(parts[8:])

    def evaluate(self, plans: Sequence[Specs]) -> list[Evaluation]:
        return [self.one(specs) for specs in plans]

    def one(self, specs: Specs) -> Evaluation:
        self.asked.append(specs)
        found = self.value(specs)
        return Evaluation(found / 3, 2 * found / 3 if self.attacked else None, 3.0, 1000)


@pytest.mark.parametrize("attacked", [False, True])
def test_plans_are_new_within_the_limits_and_never_worse_than_the_solvers(space: Space, attacked: bool) -> None:
    network = Network(space, attacked=attacked)
    found = OptunaSearch().search(space, Measure(network.evaluate, 20, 0))
    assert len({tuple(specs.values()) for specs in network.asked}) == len(network.asked) <= 20
    items = build_items(space)
    for specs in network.asked:
        assert keeps_limits(items, [item.specs.index(specs[item.layers[0]]) for item in items])
    first = ExactSearch()(space)
    assert network.asked[0] == first.specs
    assert network.asked[1] == UniformSearch()(space).specs
    assert network.value(found[0].specs) < 0.7 * network.value(first.specs), "the weights of blocks gained nothing"
    values = [network.value(outcome.specs) for outcome in found]
    assert values == sorted(values)


def test_equal_seeds_give_equal_plans_in_order(space: Space) -> None:
    runs = []
    for seed in (0, 0, 1):
        network = Network(space)
        OptunaSearch().search(space, Measure(network.evaluate, 14, seed))
        runs.append(network.asked)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


@pytest.mark.parametrize("evaluations", [1, 2, 4])
def test_a_small_budget_is_kept(space: Space, evaluations: int) -> None:
    network = Network(space)
    assert OptunaSearch().search(space, Measure(network.evaluate, evaluations, 0))
    assert len(network.asked) == evaluations


def test_it_ends_where_few_plans_exist(make_space: MakeSpace) -> None:
    space = make_space([("a", 10, 1, {"int4": 1.0, "int8": 0.5}), ("b", 10, 1, {"int4": 1.0})], [Limit("bits", 8)])
    network = Network(space)
    assert len(OptunaSearch().search(space, Measure(network.evaluate, 12, 0))) == len(network.asked) <= 2


def test_neutral_weights_decode_to_the_solvers_plans(space: Space) -> None:
    decoder = _Decoder(space, 4)
    for share in (1.0, 0.85):
        plan = decoder(decoder.neutral(share))
        assert plan is not None
        assert plan.specs == ExactSearch()(tightened(space, share)).specs


def test_blocks_are_neighbours_and_weigh_their_layers_alone(space: Space) -> None:
    decoder = _Decoder(space, 4)
    assert decoder.names == ["block 0", "block 1", "block 2", "block 3"]
    assert decoder._owner.tolist() == sorted(decoder._owner.tolist())
    assert np.bincount(decoder._owner).tolist() == [4, 4, 4, 3]
    raised = decoder({**decoder.neutral(1.0), "block 3": 6.0})
    plain = decoder(decoder.neutral(1.0))
    assert raised is not None
    assert plain is not None
    last = [layer.layer for layer in space.layers[12:]]
    assert sum(raised.specs[name].bits for name in last) > sum(plain.specs[name].bits for name in last)
    assert len(_Decoder(space, 99).names) == len(space.layers)


def test_a_share_that_nothing_keeps_is_no_plan_but_a_limit_is_an_error(space: Space) -> None:
    tight = replace(space, limits=(Limit("bits", 2.1),))
    decoder = _Decoder(tight, 4)
    assert decoder({**decoder.neutral(1.0), SHARE: 0.8}) is None
    network = Network(tight)
    assert OptunaSearch().search(tight, Measure(network.evaluate, 5, 0))
    with pytest.raises(InfeasibleError, match="bits<=1"):
        OptunaSearch().search(replace(space, limits=(Limit("bits", 1.0),)), Measure(network.evaluate, 5, 0))


def test_a_users_own_studies_stay_as_loud_as_they_were(space: Space, capfd: pytest.CaptureFixture[str]) -> None:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.DEBUG)
    try:
        OptunaSearch().search(space, Measure(Network(space).evaluate, 4, 0))
        assert optuna.logging.get_verbosity() == logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)
    assert "rial" not in capfd.readouterr().err


@pytest.mark.parametrize("options", [{"blocks": 0}, {"batch": 0}, {"spread": 0.0}, {"least": 1.0}, {"least": 0.0}])
def test_wrong_options(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="optuna: blocks and the batch are 1 or more"):
        OptunaSearch(**options)  # type: ignore[arg-type]
