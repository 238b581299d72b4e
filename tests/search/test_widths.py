"""Widths of activations with formats of weights: never worse than the gap says, held against all plans one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import InfeasibleError
from qopt.limits import Limit
from qopt.search.space import Candidate, LayerSpace, Space
from qopt.search.widths import MOST, TensorSpace, Widths, best_in_one, choose_widths, efficient
from qopt.lipschitz import NormBound
from qopt.size import Stored
from qopt.spec import ActivationSpec, WeightSpec

ONE = NormBound(1.0, 1.0, "given")
FORMATS = tuple(map(WeightSpec.parse, ("int2", "int4", "int8")))
WIDTHS = tuple(map(ActivationSpec.parse, ("int8", "int4", "int2:mse")))
COLUMN = "bops on bops"


class Instance:
    """Layers in a row of which some share what they read; bit operations are MACs times bits of both sides."""

    def __init__(self, seed: int, readers: list[tuple[int, ...]], layers: int = 4, share: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        self.macs = rng.integers(1, 50, layers) * 100
        self.names = [f"l{i}" for i in range(layers)]
        self.tensors = [
            TensorSpace(
                f"t{i}", tuple(self.names[j] for j in read),
                {w: float(rng.uniform(0.2, 1) * 4.0**-w.bits) for w in WIDTHS},
            )
            for i, read in enumerate(readers)
        ]  # fmt: skip
        self.own = [{s: float(rng.uniform(0.2, 1) * 4.0**-s.bits) for s in FORMATS} for _ in self.names]
        self.bound = float(self.macs.sum() * 64 * share)

    @property
    def space(self) -> Space:
        layers = []
        for name, macs, own in zip(self.names, self.macs, self.own, strict=True):
            candidates = [
                Candidate(s, float(macs * s.bits), Stored(int(macs), 1, s).bytes, ONE, ONE, ONE, None, own[s],
                          costs={COLUMN: self.cost(int(macs), s, 8)})
                for s in FORMATS
            ]  # fmt: skip
            layers.append(LayerSpace(name, int(macs), ONE, ONE, tuple(candidates)))
        return Space(tuple(layers), (Limit("bops", self.bound),))

    @property
    def costs(self) -> dict[tuple[str, int], dict[WeightSpec, dict[str, float]]]:
        reading = {name for one in self.tensors for name in one.readers}
        return {
            (name, bits): {s: {COLUMN: self.cost(int(macs), s, bits or 8)} for s in FORMATS}
            for name, macs in zip(self.names, self.macs, strict=True)
            for bits in ([w.bits for w in WIDTHS] if name in reading else [0])
        }

    @staticmethod
    def cost(macs: int, spec: WeightSpec, bits: int) -> float:
        return float(macs * spec.bits * bits)

    def bits(self, name: str, widths: tuple[ActivationSpec, ...]) -> int:
        return max((w.bits for t, w in zip(self.tensors, widths, strict=True) if name in t.readers), default=8)

    def best(self, widths: tuple[ActivationSpec, ...]) -> float:
        """The least summed sensitivity at these widths, over all formats."""
        least = np.inf
        for specs in product(FORMATS, repeat=len(self.names)):
            cost = sum(
                self.cost(int(m), s, self.bits(n, widths))
                for n, m, s in zip(self.names, self.macs, specs, strict=True)
            )
            if cost <= self.bound:
                least = min(least, sum(own[s] for own, s in zip(self.own, specs, strict=True)))
        return least + sum(t.sensitivities[w] for t, w in zip(self.tensors, widths, strict=True))

    def optimum(self) -> float:
        return min(self.best(widths) for widths in product(WIDTHS, repeat=len(self.tensors)))


SHAPES: list[list[tuple[int, ...]]] = [[(0,), (1,), (2,), (3,)], [(0, 1), (2,), (3,)], [(0,), (0, 1), (2, 3)], [(0,), (2,)]]


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES), st.floats(0.07, 0.9))
def test_no_widths_are_better_than_the_gap_says(seed: int, readers: list[tuple[int, ...]], share: float) -> None:
    one = Instance(seed, readers, share=share)
    best = one.optimum()
    if np.isinf(best):
        with pytest.raises(InfeasibleError, match="no plan keeps the limit"):
            choose_widths(one.space, one.tensors, one.costs)
        return
    found = choose_widths(one.space, one.tensors, one.costs)
    reached = one.best(tuple(found.specs[t.tensor] for t in one.tensors))
    assert best * (1 - 1e-9) <= reached <= best / (1 - found.gap) * (1 + 1e-9)
    assert found.left == ()


def test_without_need_all_stay_at_the_first() -> None:
    one = Instance(3, SHAPES[0], share=1.0)
    found = choose_widths(one.space, one.tensors, one.costs)
    assert set(found.specs.values()) == {WIDTHS[0]}
    assert found.gap == pytest.approx(0, abs=1e-6)


def test_widths_are_worth_more_than_bits_of_weights_where_activations_are_robust() -> None:
    """A planted case: halving weights hurts a thousand times as much as halving what they meet."""
    one = Instance(0, [(0,), (1,)], layers=2, share=0.5)
    one.own = [{s: float(10.0 ** (8 - s.bits)) for s in FORMATS} for _ in one.names]
    found = choose_widths(one.space, one.tensors, one.costs)
    assert set(found.specs.values()) == {WIDTHS[1]}


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES), st.floats(0.07, 0.9))
def test_the_best_format_for_all(seed: int, readers: list[tuple[int, ...]], share: float) -> None:
    one = Instance(seed, readers, share=share)
    values = {w: one.best((w,) * len(one.tensors)) for w in WIDTHS[1:]}
    found = best_in_one(one.space, one.tensors, one.costs)
    if found is None:
        assert np.isinf(list(values.values())).all()
    else:
        assert values[found] <= min(values.values()) * 1.1  # greedy's gap on four layers
    assert best_in_one(one.space, [], one.costs) is None


def test_formats_that_nothing_takes_at_a_width_are_not_chosen_there() -> None:
    one = Instance(1, [(0,), (1,), (2,), (3,)], share=0.5)
    costs = {key: {s: c for s, c in priced.items() if key[1] == 8} for key, priced in one.costs.items()}
    assert set(choose_widths(one.space, one.tensors, costs).specs.values()) == {WIDTHS[0]}
    nothing: dict[tuple[str, int], dict[WeightSpec, dict[str, float]]] = {key: {} for key in costs}
    with pytest.raises(InfeasibleError, match="nothing takes any format of a layer"):
        choose_widths(one.space, one.tensors, nothing)


def test_a_tensor_that_binds_too_many_layers_stays() -> None:
    layers = 8
    one = Instance(5, [tuple(range(layers)), (7,)], layers=layers, share=0.5)
    assert len(WIDTHS) ** 2 * len(FORMATS) ** layers > MOST
    found = choose_widths(one.space, one.tensors, one.costs)
    assert found == Widths(dict.fromkeys(("t0", "t1"), WIDTHS[0]), found.total, found.gap, ("t0", "t1"))


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), min_size=1, max_size=30))
def test_what_is_kept_undercuts_all_else(rows: list[tuple[int, ...]]) -> None:
    points = np.array(rows, np.float64)
    kept = efficient(points)
    for i, row in enumerate(points):
        undercut = any((points[j] <= row).all() and (points[j] < row).any() for j in range(len(points)))
        assert not (undercut and i in kept)
        assert any((points[j] <= row).all() for j in kept)
    assert len({tuple(points[i]) for i in kept}) == len(kept)
    assert kept == sorted(kept, key=lambda i: points[i, -1])
