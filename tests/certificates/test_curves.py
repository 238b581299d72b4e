"""Lines below and above elementwise functions, and their ranges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qopt.certificates.curves import Clamp, Curve, Leaky, Smooth, Staircase, to_float32
from qopt.certificates.operators import _SMOOTH
from qopt.quant import ActivationQuantizer, AffineRange


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


AFFINE = AffineRange.from_bounds(-0.7, 1.9, 3)
FINE = AffineRange.from_bounds(0.0, 6.0, 8)
ONE_BIT = AffineRange.from_bounds(0.0, 1.0, 1)


def staircase(affine: AffineRange, codes: bool = False) -> Staircase:
    zero = torch.tensor(float(affine.zero_point))
    return Staircase(torch.tensor(affine.scale), zero, 0, affine.largest_code, codes)


CURVES: dict[str, Any] = {
    "relu": (Clamp(number(0.0), number(math.inf)), torch.relu),
    "relu6": (Clamp(number(0.0), number(6.0)), F.relu6),
    "narrow": (Clamp(number(-0.125), number(0.25)), lambda x: x.clamp(-0.125, 0.25)),
    "ceiling": (Clamp(number(-math.inf), number(0.5)), lambda x: x.clamp(max=0.5)),
    "leaky": (Leaky(number(0.1)), lambda x: F.leaky_relu(x, 0.1)),
    "steps": (staircase(AFFINE), ActivationQuantizer(AFFINE)),
    "fine steps": (staircase(FINE), ActivationQuantizer(FINE)),
    "one bit": (staircase(ONE_BIT), ActivationQuantizer(ONE_BIT)),
    "codes": (staircase(AFFINE, codes=True), lambda x: AFFINE.quantize(x).float()),
    "sigmoid": (_SMOOTH[torch.sigmoid], torch.sigmoid),
    "tanh": (_SMOOTH[torch.tanh], torch.tanh),
    "erf": (_SMOOTH[torch.erf], torch.erf),
    "softplus": (_SMOOTH[F.softplus], F.softplus),
}

ENDS = st.floats(-8, 8, width=32) | st.sampled_from([0.0, -0.0, 6.0, 0.5, 1e-30, -1e-30, 2e4, -2e4])


def points(low: float, high: float) -> Tensor:
    """Float32 numbers of [low, high]: a grid, the ends, and the corners of steps with what is beside them."""
    step = AFFINE.scale
    special = [k * s + d for s in (step, FINE.scale) for k in range(-9, 10) for d in (-s / 2, 0.0, s / 2)]
    near = torch.tensor([low, high, 0.0, 6.0, 0.5, 1.0, *special], dtype=torch.float32)
    near = torch.cat([near, torch.nextafter(near, near + 1), torch.nextafter(near, near - 1)])
    grid = torch.linspace(low, high, 257, dtype=torch.float64).float()
    x = torch.cat([near, grid])
    return x[(x.double() >= low) & (x.double() <= high)]


@pytest.mark.parametrize("name", CURVES)
@settings(max_examples=30)
@given(ends=st.tuples(ENDS, ENDS))
def test_lines_and_ranges_hold(name: str, ends: tuple[float, float]) -> None:
    curve: Curve
    curve, function = CURVES[name]
    low, high = number(min(ends)), number(max(ends))
    x = points(float(low), float(high))
    y = function(x).double()
    bottom, top = curve.range(low, high)
    assert bool(((bottom <= y) & (y <= top)).all())
    lines, wide = curve.lines(low, high), x.double()
    assert bool((lines.low_slope * wide + lines.low <= y).all())
    assert bool((y <= lines.high_slope * wide + lines.high).all())
    for slope in (lines.low_slope, lines.high_slope):
        assert float(slope) == float(slope.float())
        assert 0 <= float(slope) <= curve.slope * (1 + 1e-6)


@pytest.mark.parametrize("name", CURVES)
@settings(max_examples=30)
@given(pair=st.tuples(ENDS, ENDS))
def test_slope_and_jump_bound_every_change(name: str, pair: tuple[float, float]) -> None:
    curve, function = CURVES[name]
    a, b = (function(torch.tensor(x, dtype=torch.float32)).double() for x in pair)
    allowed = curve.slope * abs(pair[0] - pair[1]) + curve.jump
    assert abs(float(a - b)) <= allowed * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize("name", [n for n, (c, _) in CURVES.items() if not isinstance(c, Smooth)])
@settings(max_examples=30)
@given(ends=st.tuples(ENDS, ENDS))
def test_settled_lines_are_the_function(name: str, ends: tuple[float, float]) -> None:
    curve, _ = CURVES[name]
    low, high = number(min(ends)), number(max(ends))
    if bool(curve.settled(low, high)):
        lines = curve.lines(low, high)
        for x in (low, high):
            gap = (lines.high_slope - lines.low_slope) * x + lines.high - lines.low
            assert float(gap) <= 1e-5 * (1 + float(torch.maximum(low.abs(), high.abs())))


@given(st.floats(-100, 100), st.floats(-100, 100))
def test_relu_has_crowns_lines(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    lines = CURVES["relu"][0].lines(number(low), number(high))
    if low < -1e-3 and high > 1e-3:
        slope = high / (high - low)
        assert float(lines.high_slope) == pytest.approx(slope, rel=1e-5)
        assert float(lines.high) == pytest.approx(-slope * low, rel=1e-4)
        if abs(high + low) > 1e-3:
            assert float(lines.low_slope) == (1.0 if high > -low else 0.0)
        assert float(lines.low) == pytest.approx(0.0, abs=1e-9)


@given(st.floats(-30, 30), st.floats(0, 3))
def test_a_staircase_is_no_further_than_a_step(low: float, width: float) -> None:
    """Never looser than ``x +- step / 2`` at the middle, inside the codes."""
    affine = AffineRange.from_bounds(-40.0, 40.0, 8)
    left, right = number(low), number(low + width)
    lines = staircase(affine).lines(left, right)
    middle = (left + right) / 2
    room = affine.scale / 2 + 1e-3
    assert float(lines.high_slope * middle + lines.high) <= float(middle) + room
    assert float(lines.low_slope * middle + lines.low) >= float(middle) - room


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30))
def test_outward_float32(value: float) -> None:
    below, above = to_float32(number(value), -math.inf), to_float32(number(value), math.inf)
    assert float(below) <= value <= float(above)
    assert float(above) == float(below) or float(torch.nextafter(below, above)) == float(above)
