"""Elementwise functions that never fall: their range on an interval, and straight lines below and above them.

The intercept of a line is not derived from its slope by a formula: it is the extreme of ``f(x) - slope x`` over the
few points where that can be attained. So whatever slope is chosen, the line holds; the slope decides how tight it is.
Slopes are float32 numbers, intercepts float64 and rounded outwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, final

import torch
from torch import Tensor

UNIT: Final = 2.0**-24
"""Half the distance from 1 to the next float32 number: the relative error of one operation."""

_OUTWARD: Final = 2.0**-46
"""Covers the handful of float64 roundings behind an intercept."""


@final
@dataclass(frozen=True, eq=False)
class Lines:
    """``low_slope x + low <= f(x) <= high_slope x + high`` on an interval, all of the interval's shape, float64."""

    low_slope: Tensor
    low: Tensor
    high_slope: Tensor
    high: Tensor


class Curve(Protocol):
    """A monotone function, element by element."""

    @property
    def slope(self) -> float:
        """``|f(x) - f(y)| <= slope |x - y| + jump``, float32 evaluation apart."""
        ...

    @property
    def jump(self) -> float:
        """The highest step of a staircase; 0 for what has a Lipschitz constant."""
        ...

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and largest values on [low, high], float64, as float32 computes them."""
        ...

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        """Lines that hold on [low, high], float64."""
        ...

    def settled(self, low: Tensor, high: Tensor) -> Tensor:
        """Bool, where narrower bounds would not make the lines any tighter."""
        ...


def to_float32(values: Tensor, direction: float) -> Tensor:
    """The float32 numbers next to float64 ``values`` that do not lie on the wrong side; ``direction`` +-inf."""
    near = values.to(torch.float32)
    wrong = near.double() < values if direction > 0 else near.double() > values
    return torch.where(wrong, torch.nextafter(near, torch.full_like(near, direction)), near)


def _line(
    slopes: list[Tensor], points: list[tuple[Tensor, Tensor]], low: Tensor, high: Tensor, side: float
) -> tuple[Tensor, Tensor]:
    """The best line of the ``slopes`` on one side (+1 above, -1 below) of a function that ``points`` span.

    Best is what is nearest to the function in the middle of the interval: the smallest area over it.
    """
    middle = (low + high) / 2
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for slope in slopes:
        slope = slope.to(torch.float32).double()
        sizes = [(value - slope * x) * side for x, value in points]
        room = sum((value.abs() + (slope * x).abs() for x, value in points), torch.zeros_like(low))
        intercept = torch.stack(sizes).amax(0) + _OUTWARD * room
        height = side * slope * middle + intercept
        if best is None:
            best = (slope, intercept, height)
            continue
        take = height < best[2]
        best = (
            torch.where(take, slope, best[0]),
            torch.where(take, intercept, best[1]),
            torch.where(take, height, best[2]),
        )
    assert best is not None
    return best[0], side * best[1]


def _ratio(rise: Tensor, run: Tensor) -> Tensor:
    """``rise / run``, 0 where the run is 0."""
    return torch.where(run > 0, rise / torch.where(run > 0, run, torch.ones_like(run)), torch.zeros_like(run))


def _two_sides(
    slopes: tuple[list[Tensor], list[Tensor]],
    points: tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]],
    low: Tensor,
    high: Tensor,
) -> Lines:
    below, above = _line(slopes[0], points[0], low, high, -1.0), _line(slopes[1], points[1], low, high, 1.0)
    return Lines(below[0], below[1], above[0], above[1])


@final
@dataclass(frozen=True, eq=False)
class Clamp:
    """``clip(x, floor, ceiling)``: ReLU and ReLU6 too; the bounds broadcast to one image, infinite where there is none.

    Exact in float32. Lines as in DeepPoly (Singh et al. 2019), with the slope of smaller area where both fit.
    """

    floor: Tensor
    ceiling: Tensor

    slope = 1.0
    jump = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """The function, in the type of ``x``."""
        return torch.minimum(torch.maximum(x, self.floor.to(x.dtype)), self.ceiling.to(x.dtype))

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends clipped."""
        return self(low), self(high)

    def settled(self, low: Tensor, high: Tensor) -> Tensor:
        """Where it is one straight line, or a constant."""
        inside = (low >= self.floor) & (high <= self.ceiling)
        return inside | (high <= self.floor) | (low >= self.ceiling)

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        """A constant or the identity where settled; else the chord, the identity or a constant."""
        slopes = clamp_slopes(self, low, high)
        at = [low, high, *(torch.minimum(torch.maximum(x, low), high) for x in (self.floor, self.ceiling))]
        points = [(x, self(x)) for x in at]
        return _two_sides(slopes, (points, points), low, high)


def clamp_slopes(clamp: Clamp, low: Tensor, high: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Candidate slopes below and above: 0, and that of the tangent chord (1 on the straight part)."""
    bottom, top = torch.maximum(low, clamp.floor), torch.minimum(high, clamp.ceiling)
    flat = (high <= clamp.floor) | (low >= clamp.ceiling)
    zero = torch.zeros_like(low)
    rising_below = torch.where(high <= clamp.ceiling, zero + 1, _ratio(clamp(high) - bottom, high - bottom))
    rising_above = torch.where(low >= clamp.floor, zero + 1, _ratio(top - clamp(low), top - low))
    return [zero, torch.where(flat, zero, rising_below)], [zero, torch.where(flat, zero, rising_above)]


@final
@dataclass(frozen=True, eq=False)
class Leaky:
    """``x`` above 0, ``factor x`` below, the factor (broadcast to one image) in [0, 1]."""

    factor: Tensor

    slope = 1.0
    jump = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """The function, in the type of ``x``."""
        return torch.where(x > 0, x, self.factor.to(x.dtype) * x)

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends, and the rounding of the product."""
        return tuple(self(x) + sign * 2 * UNIT * x.abs() for x, sign in ((low, -1), (high, 1)))  # type: ignore[return-value]

    def settled(self, low: Tensor, high: Tensor) -> Tensor:
        """Where it is one straight line."""
        return (low >= 0) | (high <= 0)

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        """Above the chord, below one of the two pieces: it is convex."""
        nearest = torch.minimum(torch.maximum(torch.zeros_like(low), low), high)
        points = [(x, self(x)) for x in (low, high, nearest)]
        zero = torch.zeros_like(low)
        chord = torch.where(high > low, _ratio(self(high) - self(low), high - low), zero)
        below = [zero + self.factor, zero + 1]
        found = _two_sides((below, [chord, zero + 1, zero + self.factor]), (points, points), low, high)
        room = 2 * UNIT * torch.maximum(low.abs(), high.abs())
        return Lines(found.low_slope, found.low - room, found.high_slope, found.high + room)


@final
@dataclass(frozen=True, eq=False)
class Smooth:
    """A rising function whose derivative is on every interval smallest at one of the interval's ends.

    So are sigmoid, tanh and erf, softplus too. Evaluated in float64; ``ulps`` float32 units of the result, and as many
    of 2**-126, are left to the runtime's own evaluation.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    slope: float
    ulps: float = 8.0

    jump = 0.0

    def _room(self, value: Tensor) -> Tensor:
        return self.ulps * (2 * UNIT * value.abs() + 2.0**-126)

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Both ends with room for float32."""
        bottom, top = self.function(low), self.function(high)
        return bottom - self._room(bottom), top + self._room(top)

    def settled(self, low: Tensor, high: Tensor) -> Tensor:
        """Where the interval is a point."""
        return low == high

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        """A constant, or the smaller end slope: then ``f(x) - slope x`` never falls and its ends are its extremes."""
        gentle = torch.minimum(self.derivative(low), self.derivative(high)) * (1 - 2.0**-20)
        slopes = [torch.zeros_like(low), gentle]
        bottom, top = self.function(low), self.function(high)
        room = self._room(torch.maximum(bottom.abs(), top.abs()))
        below, above = ([(low, bottom + sign * room), (high, top + sign * room)] for sign in (-1, 1))
        return _two_sides((slopes, slopes), (below, above), low, high)


@final
@dataclass(frozen=True, eq=False)
class Staircase:
    """An activation quantizer: ``clip(round(x / step) + zero, first, last)``, as codes or as the numbers they mean.

    Monotone in float32 too (division by a positive number and rounding to even never turn two numbers round), so the
    range on an interval is exact: its two ends. No Lipschitz constant; ``|Q(x) - x| <= step / 2`` inside the codes.

    Attributes:
        step, zero: float32, broadcast to one image.
        first, last: the smallest and the largest code.
        codes: give codes in float instead of ``(code - zero) * step``.
    """

    step: Tensor
    zero: Tensor
    first: int
    last: int
    codes: bool = False

    @property
    def slope(self) -> float:
        """1, or codes per unit; with room for the rounding of the quotient."""
        return (1.0 / float(self.step.min()) if self.codes else 1.0) * (1 + 8 * UNIT)

    @property
    def jump(self) -> float:
        """One step, or one code; the rounding of both quotients is of the size of a unit of a code."""
        room = 1 + 8 * UNIT * max(abs(self.first), abs(self.last), 1)
        return room * (1.0 if self.codes else float(self.step.max()))

    def __call__(self, x: Tensor) -> Tensor:
        """Of float32 numbers, as QuantizeLinear and DequantizeLinear compute it."""
        codes = (torch.round(x / self.step) + self.zero).clamp(self.first, self.last)
        return codes if self.codes else (codes - self.zero) * self.step

    def range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The two ends, rounded outwards to float32 first."""
        return self(to_float32(low, -torch.inf)).double(), self(to_float32(high, torch.inf)).double()

    def settled(self, low: Tensor, high: Tensor) -> Tensor:
        """Where one step holds all of the interval."""
        bottom, top = self.range(low, high)
        return bottom == top

    def lines(self, low: Tensor, high: Tensor) -> Lines:
        """The slopes of the clip; intercepts at the corners of the first and the last step.

        A corner above is the left end of a step, half a step before its value. On the way from one to the next
        ``Q(x) - slope x`` changes by ``step (1 - slope)`` each time, so the first or the last is the extreme.
        """
        values = Staircase(self.step, self.zero, self.first, self.last)
        bottom, top = values.range(low, high)
        step, zero = self.step.double(), self.zero.double()
        clamp = Clamp((self.first - zero) * step, (self.last - zero) * step)
        several = top > bottom
        slopes = tuple([torch.where(several, s, 0.0) for s in side] for side in clamp_slopes(clamp, low, high))

        def inside(x: Tensor) -> Tensor:
            return torch.minimum(torch.maximum(x, low), high)

        next_, before = torch.minimum(bottom + step, top), torch.maximum(top - step, bottom)
        # corners below the first point are moved into the interval, which can only make the line safer
        above = [(low, bottom), (inside(next_ - step / 2), next_), (inside(top - step / 2), top)]
        below = [(high, top), (inside(before + step / 2), before), (inside(bottom + step / 2), bottom)]
        found = _two_sides((slopes[0], slopes[1]), (below, above), low, high)
        # where float32 puts a corner: a few units of the quotient beside it
        room = torch.where(several, 8 * UNIT * (torch.maximum(low.abs(), high.abs()) + step), 0.0)
        lines = Lines(found.low_slope, found.low - room, found.high_slope, found.high + room)
        return self._in_codes(lines, step, zero, low, high) if self.codes else lines

    def _in_codes(self, lines: Lines, step: Tensor, zero: Tensor, low: Tensor, high: Tensor) -> Lines:
        """``code = value / step + zero``; rounding slope and values to float32 moves the line by a few units."""
        far = torch.maximum(low.abs(), high.abs())
        parts = []
        for slope, intercept, side in ((lines.low_slope, lines.low, -1), (lines.high_slope, lines.high, 1)):
            steep = (slope / step).to(torch.float32).double()
            room = 4 * UNIT * (steep.abs() * far + intercept.abs() / step) + _OUTWARD * zero.abs()
            parts += [steep, intercept / step + zero + side * room]
        return Lines(*parts)
