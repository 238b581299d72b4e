"""QUANOS: widths in proportion to the noise sensitivity, scaled to the limits, against the formula by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qopt.errors import InfeasibleError, UsageError
from qopt.limits import Limit
from qopt.search.feasible import feasible
from qopt.search.items import build_items, keeps_limits
from qopt.search.quanos import QuanosSearch, _narrowed
from qopt.search.space import Space
from qopt.spec import WeightSpec

MakeSpace = Callable[..., Space]
LINEAR = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")


def layers(
    count: int, formats: tuple[str, ...] = LINEAR, weights: int = 100
) -> list[tuple[str, int, int, dict[str, float]]]:
    return [(f"l{i}", weights * (i + 1), 4, dict.fromkeys(formats, 1.0)) for i in range(count)]


def widths(space: Space, noise: Mapping[str, float]) -> list[int]:
    return [spec.bits for spec in QuanosSearch(noise)(space).specs.values()]


def named(*values: float) -> dict[str, float]:
    return {f"l{i}": value for i, value in enumerate(values)}


@pytest.mark.parametrize(
    ("noise", "bits"),
    [
        ((1.0, 0.5, 0.25), [8, 4, 2]),  # 8 * share
        ((0.1, 0.3, 0.2), [3, 8, 5]),  # 2.67, 8, 5.33
        ((1.0, 0.0, 0.01), [8, 2, 2]),  # at least 2
        ((0.5625, 1.0, 0.4375), [5, 8, 4]),  # 4.5 and 3.5: halves go up
        ((7.0, 7.0, 7.0), [8, 8, 8]),
        ((0.0, 0.0, 0.0), [8, 8, 8]),  # nothing moves: no layer is told from another
    ],
)
def test_without_limits_the_widths_are_those_of_the_formula(
    make_space: MakeSpace, noise: tuple[float, ...], bits: list[int]
) -> None:
    assert widths(make_space(layers(3)), named(*noise)) == bits


def test_a_width_that_is_not_there_becomes_the_next_narrower(make_space: MakeSpace) -> None:
    space = make_space(layers(3, ("log4", "int2", "int4:max", "int4", "int8")))
    found = QuanosSearch(named(1.0, 0.9, 0.4))(space)
    assert [str(spec) for spec in found.specs.values()] == ["int8", "int4:max", "int2"]  # 8, 7.2 and 3.2 bits
    assert found.reasons["l1"] == "ANS 0.9, 90% of the largest"


def test_a_layer_with_wider_formats_only_takes_its_narrowest(make_space: MakeSpace) -> None:
    one, two = layers(1), [("l1", 50, 4, {"int4": 1.0, "int8": 1.0})]
    assert widths(make_space([*one, *two]), named(1.0, 0.1)) == [8, 4]


def brute_force(space: Space, noise: Mapping[str, float]) -> list[int] | None:
    """The last feasible plan as the scale rises in small steps."""
    best: list[int] | None = None
    before: dict[str, WeightSpec] = {}
    most = max(noise.values())
    for step in range(1, 6001):
        scale, plan = step / 100, dict[str, WeightSpec]()
        for layer in space.layers:
            bits = max(math.floor(scale * noise[layer.layer] / most + 0.5), 2)
            known = [c.spec for c in layer.candidates]
            plan[layer.layer] = max((s for s in known if s.bits <= bits), key=lambda s: s.bits)
        if plan != before and feasible(_narrowed(space, plan)):
            best = [spec.bits for spec in plan.values()]
        before = plan
    return best


@pytest.mark.parametrize("bound", [2.0, 2.5, 3.0, 4.3, 6.0, 8.0])
def test_with_limits_the_scale_is_the_largest_that_keeps_them(make_space: MakeSpace, bound: float) -> None:
    noise = named(0.9, 0.31, 0.123)
    space = make_space(layers(3, ("int2", "int4", "int8")), [Limit("bits", bound)])
    assert widths(space, noise) == brute_force(space, noise)


@settings(max_examples=60)
@given(st.lists(st.floats(0.0, 10.0), min_size=2, max_size=7), st.floats(2.0, 8.0))
def test_limits_hold_and_more_noise_never_means_fewer_bits(
    make_space: MakeSpace, noise: list[float], bound: float
) -> None:
    space = make_space(layers(len(noise), ("int2", "int4", "int8")), [Limit("bits", bound)])
    found = QuanosSearch(named(*noise))(space)
    items = build_items(space)
    assert keeps_limits(items, [item.specs.index(found.specs[item.layers[0]]) for item in items])
    ordered = sorted(zip(noise, [spec.bits for spec in found.specs.values()], strict=True))
    assert all(a[1] <= b[1] for a, b in pairwise(ordered) if a[0] < b[0])


def test_tied_layers_share_the_width_of_the_noisiest(make_space: MakeSpace) -> None:
    space = make_space(layers(3), ties=[("l0", "l2")])
    assert widths(space, named(0.1, 1.0, 0.5)) == [4, 8, 4]


def test_limits_that_the_narrowest_formats_break_are_named(make_space: MakeSpace) -> None:
    space = make_space(layers(2), [Limit("bits", 1.5)])
    with pytest.raises(InfeasibleError, match=r"bits<=1.5: no plan keeps the limit .* at least 2 bits"):
        QuanosSearch(named(1.0, 0.5))(space)


@pytest.mark.parametrize("noise", [{}, {"l0": 1.0}, {"l0": 1.0, "l1": math.nan}])
def test_every_layer_needs_its_noise(make_space: MakeSpace, noise: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="needs every layer's adversarial noise sensitivity; give --data"):
        QuanosSearch(noise)(make_space(layers(2)))


def test_formats_are_linear_ones(make_space: MakeSpace) -> None:
    specs = tuple(map(WeightSpec.parse, ("ternary", "int2", "log4", "int8")))
    assert [str(spec) for spec in QuanosSearch().candidates(specs)] == ["int2", "int8"]
    with pytest.raises(UsageError, match="l0: QUANOS chooses among linear formats"):
        QuanosSearch(named(1.0))(make_space(layers(1, ("log4",))))
