"""Backward linear bounds: CROWN (Zhang et al. 2018), DeepPoly (Singh et al. 2019).

A row of coefficients on one step's value is pulled back to the image, step by step: through affine maps by their
transpose, through curves by the line on the safe side. What is left is a linear function of the pixels, whose extreme
on the ball is known. The bounds hold for the network as float32 computes it, like `qopt.certificates.interval`'s.

Coefficients are float32. If A' is what float32 makes of A W, then ``A (W x + b) >= A' x + A b - gamma |A| (|W| |x|)``:
the rounding of the reverse product costs the same kind of term as that of the forward one, and `slack` holds both.
Constants and dot products are float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Final, final

import torch
from torch import Tensor

from qopt.certificates.ball import Ball
from qopt.certificates.curves import UNIT, Lines
from qopt.certificates.interval import TINY, Box, interval, slack, sum_slack, windowed
from qopt.certificates.maps import Average, Convolution, Product
from qopt.certificates.network import Affine, Bend, Concat, Entry, Maximum, Network, Opaque, Step, Sum

MEMORY: Final = 1 << 28
"""Bytes that the coefficients of one chunk may take, about."""

WORK: Final = 2e10
"""Multiplications per image that tightening the bounds of one step may cost; interval bounds stay where it is more."""


@final
@dataclass(frozen=True, eq=False)
class Tangents:
    """How a `Maximum` is bounded: below by element ``below`` of each window, above by a constant or that element.

    Attributes:
        below: int64 (n, outputs), places in the flattened source.
        above: float64 (n, outputs), the constant.
        exact: bool (n, outputs), where the element is the largest on the whole ball, so that it bounds above too.
    """

    below: Tensor
    above: Tensor
    exact: Tensor


@final
@dataclass(eq=False)
class Backward:
    """Bounds of every step of ``network`` on a ball around each of n images, and of any linear function of the last.

    Attributes:
        network, ball: what is bounded, where.
        work: as `WORK`; 0 takes interval bounds for every step in between (CROWN-IBP).
        boxes: of every step, filled when made.

    Raises:
        UnsupportedModelError: naming the operator and node that backward bounds do not pass.
    """

    network: Network
    ball: Ball
    work: float = WORK
    boxes: list[Box] = field(default_factory=list)
    _lines: dict[int, Lines] = field(default_factory=dict)
    _tangents: dict[int, Tangents] = field(default_factory=dict)
    _slack: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        bent = {source for s in self.network.steps if isinstance(s, (Bend, Maximum)) for source in s.inputs}
        for place, step in enumerate(self.network.steps):
            if isinstance(step, Opaque):
                raise step.refuse("backward bounds")
            inputs = [self.boxes[i] for i in step.inputs]
            self.boxes.append(interval(step, inputs, self.ball))
            self._prepare(place, step, inputs)
            if place in bent:
                self._tighten(place)

    def lower(self, rows: Tensor) -> Tensor:
        """Lower bounds of linear functions of the output: (n, k), float64, of rows (n, k, classes)."""
        count, functions, _ = rows.shape
        numbers = torch.arange(count).repeat_interleave(functions)
        last = len(self.network.steps) - 1
        return self._in_chunks(last, rows.reshape(-1, *self.network.steps[-1].shape), numbers).reshape(count, functions)

    def _prepare(self, place: int, step: Step, inputs: list[Box]) -> None:
        if isinstance(step, Affine):
            self._slack[place] = slack(step.map, inputs[0].size)
        elif isinstance(step, Sum):
            self._slack[place] = sum_slack(inputs)
        elif isinstance(step, Bend):
            lines = step.curve.lines(inputs[0].low, inputs[0].high)
            self._lines[place] = lines
            steepest = torch.maximum(lines.low_slope.abs(), lines.high_slope.abs())
            constants = torch.maximum(lines.low.abs(), lines.high.abs())
            self._slack[place] = UNIT * (4 * steepest * inputs[0].size + 2.0**-6 * constants)
        elif isinstance(step, Maximum):
            self._tangents[place] = _tangents(inputs[0], step)

    def _tighten(self, place: int) -> None:
        """Replace the interval bounds of elements that a curve bends by backward ones."""
        open_ = self._open(place)
        if not bool(open_.any()) or self._is_exact(place):
            return
        below = _work(self.network, place)
        affordable = open_.flatten(1).sum(1) * 2 * below <= self.work
        images, elements = torch.nonzero(open_.flatten(1) & affordable[:, None], as_tuple=True)
        if not len(images):
            return
        size, box = prod(self.network.steps[place].shape), self.boxes[place]
        shape = box.low.shape
        ends = []
        for sign, end in ((1.0, box.low), (-1.0, box.high)):
            found = self._one_hot(place, images, elements, size, sign)
            better = end.flatten(1).clone()
            better[images, elements] = torch.maximum(sign * better[images, elements], found) * sign
            ends.append(better.reshape(shape))
        self.boxes[place] = Box(ends[0], ends[1])

    def _open(self, place: int) -> Tensor:
        """Which elements a curve or a maximum makes use of better bounds of."""
        box = self.boxes[place]
        found = torch.zeros_like(box.low, dtype=torch.bool)
        for step in self.network.steps:
            if place not in step.inputs:
                continue
            if isinstance(step, Bend):
                found |= ~step.curve.settled(box.low, box.high)
            elif isinstance(step, Maximum):
                found |= box.low < box.high
        return found

    def _is_exact(self, place: int) -> bool:
        """Whether interval arithmetic has lost nothing: one mixing map at most between the image and the step."""
        mixing = 0
        while place:
            step = self.network.steps[place]
            if not isinstance(step, Affine):
                return False
            mixing += isinstance(step.map, (Convolution, Product, Average))
            (place,) = step.inputs
        return mixing <= 1 and self.ball.radius is None

    def _one_hot(self, place: int, images: Tensor, elements: Tensor, size: int, sign: float) -> Tensor:
        """Lower bounds of ``sign *`` single elements."""
        most, found = self._most_rows(place), []
        for chunk, where in zip(torch.split(images, most), torch.split(elements, most), strict=True):
            rows = torch.zeros(len(chunk), size)
            rows[torch.arange(len(chunk)), where] = sign
            found.append(self._pull(place, rows.reshape(-1, *self.network.steps[place].shape), chunk))
        return torch.cat(found)

    def _in_chunks(self, place: int, rows: Tensor, images: Tensor) -> Tensor:
        most = self._most_rows(place)
        parts = zip(torch.split(rows.to(torch.float32), most), torch.split(images, most), strict=True)
        return torch.cat([self._pull(place, part, numbers) for part, numbers in parts])

    def _most_rows(self, place: int) -> int:
        largest = max(prod(step.shape) for step in self.network.steps[: place + 1])
        return max(1, MEMORY // (48 * largest))

    def _pull(self, place: int, rows: Tensor, images: Tensor) -> Tensor:
        """Lower bounds of ``rows . value`` of one step: (q,), of float32 rows (q, *shape) about some images."""
        total = torch.zeros(len(rows), dtype=torch.float64)
        pending: dict[int, Tensor] = {place: rows}
        for here in range(place, -1, -1):
            if here not in pending:
                continue
            step, now = self.network.steps[here], pending.pop(here)
            if isinstance(step, Entry):
                total += self.ball.part(images).smallest(now)
                continue
            if here in self._slack:
                total -= _dot(now.abs(), _of(self._slack[here], images))
            constant, parts = self._through(here, step, now, images)
            total += constant
            for source, part in zip(step.inputs, parts, strict=True):
                size = self.boxes[source].size
                total -= TINY * 4 * prod(part.shape[1:]) * size.flatten(1).sum(1)[images]
                if source in pending:
                    part = pending[source] + part
                    total -= _dot(UNIT * 2 * part.abs(), size[images])
                pending[source] = part
        return torch.nan_to_num(total, nan=-torch.inf, posinf=-torch.inf)

    def _through(self, place: int, step: Step, rows: Tensor, images: Tensor) -> tuple[Tensor | float, list[Tensor]]:
        """One step back: a constant, and the coefficients on each input."""
        if isinstance(step, Affine):
            constant = 0.0 if step.map.offset is None else _dot(rows, step.map.offset)
            return constant, [step.map.adjoint(rows)]
        if isinstance(step, Sum):
            return 0.0, [rows if sign > 0 else -rows for sign in step.signs]
        if isinstance(step, Concat):
            sizes = [self.network.steps[i].shape[step.axis] for i in step.inputs]
            return 0.0, list(torch.split(rows, sizes, step.axis + 1))
        up, down = rows.clamp(min=0), rows.clamp(max=0)
        if isinstance(step, Maximum):
            return _through_maximum(self._tangents[place], step, self.network, up, down, images)
        lines = self._lines[place]
        constant = _dot(up, lines.low[images]) + _dot(down, lines.high[images])
        slopes = (lines.low_slope.to(rows.dtype)[images], lines.high_slope.to(rows.dtype)[images])
        return constant, [up * slopes[0] + down * slopes[1]]


def _dot(rows: Tensor, values: Tensor) -> Tensor:
    """``sum rows * values`` in float64: (q,)."""
    return (rows.double() * values).flatten(1).sum(1)


def _of(values: Tensor, images: Tensor) -> Tensor:
    return values[images] if values.ndim else values


def _work(network: Network, place: int) -> float:
    """Multiplications of pulling one row from a step back to the image."""
    needed, total = {place}, 0.0
    for here in range(place, 0, -1):
        if here not in needed:
            continue
        step = network.steps[here]
        needed.update(step.inputs)
        total += prod(step.shape)
        if isinstance(step, Affine) and isinstance(step.map, (Convolution, Product)):
            total += prod(step.shape) * (step.map.terms - 1)
    return total


def _tangents(box: Box, step: Maximum) -> Tangents:
    """Below: the element with the largest lower bound, which is exact where no other one can pass it."""
    low, high = windowed(box.low, step.windows), windowed(box.high, step.windows)
    at = low.argmax(2)
    others = high.scatter(2, at[:, :, None], -torch.inf).amax(2)
    exact = others <= low.gather(2, at[:, :, None])[:, :, 0]
    below = step.windows[torch.arange(step.windows.shape[0])[None], at]
    return Tangents(below, high.amax(2), exact)


def _through_maximum(
    tangents: Tangents, step: Maximum, network: Network, up: Tensor, down: Tensor, images: Tensor
) -> tuple[Tensor, list[Tensor]]:
    shape = network.steps[step.inputs[0]].shape
    exact = tangents.exact[images]
    up, down = up.flatten(1), down.flatten(1)
    constant = _dot(torch.where(exact, 0.0, down), tangents.above[images])
    linear = up + torch.where(exact, down, 0.0)
    found = torch.zeros(len(up), prod(shape)).scatter_add_(1, tangents.below[images], linear)
    return constant, [found.reshape(len(up), *shape)]
