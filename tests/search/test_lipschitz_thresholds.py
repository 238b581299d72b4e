"""Lipschitz thresholds: who passes, by how much they are relaxed, and what is said where nothing helps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import InfeasibleError, UsageError
from qopt.limits import Limit
from qopt.lipschitz import NormBound
from qopt.search.greedy import GreedySearch
from qopt.search.space import Candidate, LayerSpace, Space
from qopt.search.thresholds import Form, Thresholds, apply_thresholds, paper_thresholds
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]


def exactly(value: float) -> NormBound:
    return NormBound(value, value, "given")


def candidate(
    text: str, norm: float | NormBound = 1.0, error: float | NormBound = 0.1, weighted: float | NormBound | None = None
) -> Candidate:
    """Of a layer with 1000 weights."""
    norm, error = (exactly(v) if isinstance(v, float) else v for v in (norm, error))
    weighted = exactly(weighted) if isinstance(weighted, float) else weighted
    spec = WeightSpec.parse(text)
    return Candidate(spec, 1000 * spec.container_bits, int(125 * spec.container_bits) + 4, norm, error, error, weighted)


def layer(name: str, norm: float | NormBound, *candidates: Candidate) -> LayerSpace:
    norm = exactly(norm) if isinstance(norm, float) else norm
    return LayerSpace(name, 1000, norm, norm, candidates)


@pytest.mark.parametrize(
    ("norm", "bounds"),
    [(1.0, (1.1, 0.3)), (2.999, (3.2989, 0.3)), (3.0, (3.3, 1.5)), (10.0, (11.0, 1.5)), (0.0, (0.0, 0.3))],
)
def test_the_thresholds_of_the_paper(norm: float, bounds: tuple[float, float]) -> None:
    assert paper_thresholds(norm) == pytest.approx(bounds)


WIDE = NormBound(0.9, 1.1, "given")
EXCESS: list[tuple[Form, float, float | NormBound, Candidate, float]] = [
    ("paper", 0.25, 1.0, candidate("int4", 1.0, 0.3), 1.0),
    ("paper", 0.25, 1.0, candidate("int4", 1.1, 0.1), 1.0),
    ("paper", 0.25, 1.0, candidate("int4", 2.2, 0.1), 2.0),
    ("paper", 0.25, 1.0, candidate("int4", 1.0, 0.6), 2.0),
    ("paper", 0.25, 1.0, candidate("int4", 3.3, 0.6), 3.0),
    ("paper", 0.25, 4.0, candidate("int4", 4.4, 1.5), 1.0),
    ("paper", 0.25, 4.0, candidate("int4", 4.0, 3.0), 2.0),
    ("paper", 99.0, 1.0, candidate("int4", 1.0, 0.6), 2.0),
    ("paper", 0.25, 1.0, candidate("int4", 1.0, NormBound(0.1, 0.45, "given")), 1.5),
    ("relative", 0.25, 1.0, candidate("int4", 9.0, 0.25), 1.0),
    ("relative", 0.25, 2.0, candidate("int4", 9.0, 0.25), 0.5),
    ("relative", 0.1, 2.0, candidate("int4", 9.0, 0.6), 3.0),
    ("relative", 0.5, WIDE, candidate("int4", 1.0, 0.9), 2.0),
    ("relative", 0.5, 1.0, candidate("int4", 1.0, WIDE), 2.2),
    ("weighted", 0.25, 1.0, candidate("int4", 9.0, 9.0, 0.25), 1.0),
    ("weighted", 0.5, 1.0, candidate("int4", 9.0, 9.0, 1.5), 3.0),
    ("weighted", 0.5, 1.0, candidate("int4", 9.0, 9.0, WIDE), 2.2),
    ("weighted", 0.5, 1.0, candidate("int4", 9.0, 9.0, None), 0.0),
    ("none", 0.25, 1.0, candidate("int4", 9.0, 9.0, 9.0), 0.0),
    ("relative", 0.25, 0.0, candidate("int4", 0.0, 0.0), 0.0),
    ("relative", 0.25, 0.0, candidate("int4", 0.0, 0.1), float("inf")),
]


@pytest.mark.parametrize(("form", "value", "norm", "chosen", "excess"), EXCESS)
def test_by_how_much_a_candidate_exceeds(
    form: Form, value: float, norm: float | NormBound, chosen: Candidate, excess: float
) -> None:
    assert Thresholds(form, value).excess(layer("a", norm, chosen), chosen) == pytest.approx(excess)


def names(space: Space) -> list[list[str]]:
    return [[str(c.spec) for c in layer.candidates] for layer in space.layers]


def test_candidates_above_the_thresholds_are_dropped() -> None:
    space = Space(
        (layer("a", 1.0, candidate("int2", error=0.5), candidate("int4", error=0.1), candidate("int8", 1.2)),)
    )
    filtered = apply_thresholds(space, Thresholds("paper"))
    assert (names(filtered.space), filtered.factor, filtered.relaxed) == ([["int4"]], 1.0, ())


def test_a_layer_without_a_candidate_relaxes_all_by_the_smallest_factor() -> None:
    one = layer("a", 1.0, candidate("int2", error=0.9), candidate("int4", error=0.6))
    other = layer("b", 1.0, candidate("int2", error=0.5), candidate("int4", error=0.1), candidate("int8", 3.3))
    filtered = apply_thresholds(Space((one, other)), Thresholds("paper"))
    assert filtered.factor == pytest.approx(2.0)
    assert names(filtered.space) == [["int4"], ["int2", "int4"]]
    assert filtered.relaxed == ("a",)


def test_a_limit_relaxes_where_candidates_within_the_thresholds_cost_too_much() -> None:
    one = layer("a", 1.0, candidate("int2", error=0.6), candidate("int4", error=0.1))
    other = layer("b", 1.0, candidate("int2", error=1.5), candidate("int4", error=0.1))
    space = Space((one, other), (Limit("bits", 3.0),))
    filtered = apply_thresholds(space, Thresholds("paper"))
    assert filtered.factor == pytest.approx(2.0)
    assert (names(filtered.space), filtered.relaxed) == ([["int2", "int4"], ["int4"]], ("a",))
    assert GreedySearch()(filtered.space).specs["a"].bits == 2


def test_a_tie_without_a_common_candidate_relaxes() -> None:
    one = layer("a", 1.0, candidate("int2", error=0.1), candidate("int4", error=0.6))
    other = layer("b", 1.0, candidate("int2", error=0.9), candidate("int4", error=0.1))
    space = Space((one, other), ties=(("a", "b"),))
    filtered = apply_thresholds(space, Thresholds("paper"))
    assert filtered.factor == pytest.approx(2.0)
    assert filtered.relaxed == ("a",)
    assert {str(spec) for spec in GreedySearch()(filtered.space).specs.values()} == {"int4"}


def test_two_limits_that_only_a_third_candidate_keeps_together() -> None:
    """Each limit alone has a candidate within the thresholds; only the one above them keeps both."""
    few_bits = replace(candidate("int2", error=0.1), bytes=900)
    few_bytes = replace(candidate("int8", error=0.1), bytes=100)
    both = replace(candidate("int4", error=0.6), bytes=300)
    tables = Space((layer("a", 1.0, few_bits, both, few_bytes),)).table_bytes
    space = Space((layer("a", 1.0, few_bits, both, few_bytes),), (Limit("bits", 4.0), Limit("size", 300.0 + tables)))
    filtered = apply_thresholds(space, Thresholds("paper"))
    assert filtered.factor == pytest.approx(2.0)
    assert filtered.relaxed == ("a",)
    assert str(GreedySearch()(filtered.space).specs["a"]) == "int4"


def exists(space: Space, excess: dict[tuple[str, str], float], factor: float) -> bool:
    """By enumeration: a plan of admitted candidates that keeps the limits and ties."""
    kept = [[c for c in la.candidates if excess[la.layer, str(c.spec)] <= factor] for la in space.layers]
    tables = {(c.spec.kind, c.spec.bits): c.spec for few in kept for c in few}
    reserve = Space(tuple(replace(la, candidates=tuple(few)) for la, few in zip(space.layers, kept, strict=True)))
    assert (reserve.table_bytes > 0) == any(s.bits < 8 for s in tables.values())
    for picks in product(*kept):
        plan = dict(zip([la.layer for la in space.layers], picks, strict=True))
        spent = {
            "bits": sum(c.code_bits for c in picks) / space.weights,
            "size": sum(c.bytes for c in picks) + reserve.table_bytes,
        }
        tied = all(len({plan[name].spec for name in group}) == 1 for group in space.ties)
        if tied and all(spent[limit.quantity] <= limit.bound * (1 + 1e-9) for limit in space.limits):
            return True
    return False


errors = st.sampled_from([0.1, 0.3, 0.31, 0.6, 0.9, 2.0])
layer_candidates = st.dictionaries(st.sampled_from(["int2", "log2", "int4", "log4", "int8"]), errors, min_size=1)
random_limits = st.lists(
    st.one_of(
        st.builds(Limit, st.just("bits"), st.sampled_from([2.0, 3.0, 4.0, 6.0, 8.0])),
        st.builds(Limit, st.just("size"), st.integers(500, 6000).map(float)),
    ),
    max_size=2,
)


@settings(max_examples=200)
@given(layers=st.lists(layer_candidates, min_size=1, max_size=3), limits=random_limits, tied=st.booleans())
def test_the_factor_is_the_smallest(layers: list[dict[str, float]], limits: Sequence[Limit], tied: bool) -> None:
    space = Space(
        tuple(layer(f"l{i}", 1.0, *(candidate(t, 1.0, e) for t, e in few.items())) for i, few in enumerate(layers)),
        tuple(limits),
        (("l0", "l1"),) if tied and len(layers) > 1 else (),
    )
    thresholds = Thresholds("paper")
    excess = {(la.layer, str(c.spec)): thresholds.excess(la, c) for la in space.layers for c in la.candidates}
    factors = [f for f in sorted({1.0, *excess.values()}) if f >= 1 and exists(space, excess, f)]
    if not factors:
        with pytest.raises(InfeasibleError):
            apply_thresholds(space, thresholds)
        return
    filtered = apply_thresholds(space, thresholds)
    assert filtered.factor == factors[0]
    assert bool(filtered.relaxed) == (filtered.factor > 1)
    for la in filtered.space.layers:
        assert all(excess[la.layer, str(c.spec)] <= filtered.factor for c in la.candidates)
    GreedySearch()(filtered.space)


def test_without_thresholds_everything_passes() -> None:
    space = Space((layer("a", 1.0, candidate("int2", 9.0, 9.0)),))
    assert apply_thresholds(space, Thresholds("none")).space == space


def test_weighted_thresholds_without_images_are_an_error() -> None:
    space = Space((layer("a", 1.0, candidate("int2")),))
    with pytest.raises(UsageError, match="--thresholds: weighted thresholds weigh errors by images; give --data"):
        apply_thresholds(space, Thresholds("weighted"))


def test_a_layer_without_moments_passes_weighted_thresholds() -> None:
    space = Space((layer("a", 1.0, candidate("int2")), layer("b", 1.0, candidate("int2", weighted=0.2))))
    assert apply_thresholds(space, Thresholds("weighted", 0.25)).factor == 1.0


INFEASIBLE: list[tuple[Limit, str]] = [
    (
        Limit("bits", 1.5),
        "bits<=1.5: no plan keeps the limit (got at least 3 bits with these candidates); "
        "raise the limit or choose a target with lower-bit candidates",
    ),
    (Limit("bits", 0.0), "bits<=0: no plan keeps the limit (got at least 3 bits"),
    (
        Limit("size", 800.0),
        "size<=800: no plan keeps the limit (got at least {least} bytes, the tables of all candidate formats included",
    ),
]


@pytest.mark.parametrize(("limit", "message"), INFEASIBLE)
def test_what_cannot_be_reached_names_what_can(limit: Limit, message: str) -> None:
    layers = (layer("a", 1.0, candidate("int2"), candidate("int8")), layer("b", 1.0, candidate("int4")))
    least = 254 + 504 + Space(layers).table_bytes
    with pytest.raises(InfeasibleError) as caught:
        apply_thresholds(Space(layers, (limit,)), Thresholds("none"))
    assert str(caught.value).startswith(message.format(least=least))
    reachable = replace(limit, bound=3.0 if limit.quantity == "bits" else float(least))
    assert apply_thresholds(Space(layers, (reachable,)), Thresholds("none")).factor == 1.0


def test_limits_that_exclude_each_other_are_named() -> None:
    few_bits = replace(candidate("int2"), bytes=900)
    few_bytes = replace(candidate("int8"), bytes=100)
    layers = (layer("a", 1.0, few_bits, few_bytes),)
    size = Limit("size", 500.0 + Space(layers).table_bytes)
    said = r"bits<=4: no plan keeps all limits at once \(got at least 8 bits with these candidates, within size<="
    with pytest.raises(InfeasibleError, match=said):
        apply_thresholds(Space(layers, (Limit("bits", 4.0), size)), Thresholds("none"))


def test_a_candidate_whose_table_does_not_fit_is_not_waited_for() -> None:
    """Relaxing further admits a format whose table breaks the limit: the first factor that works is taken."""
    one = layer("a", 1.0, candidate("int4", error=0.6), candidate("int2", error=0.9))
    space = Space((one,), (Limit("size", 525.0),))
    filtered = apply_thresholds(space, Thresholds("paper"))
    assert filtered.factor == pytest.approx(2.0)
    assert names(filtered.space) == [["int4"]]
