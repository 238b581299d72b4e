"""Interval bounds: the smallest and largest value of every element on a ball (Gowal et al. 2018).

What they bound is the network as float32 computes it, whatever the order of its sums: every affine map of k terms is
widened by ``gamma(k) (|W| |x| + |b|)`` (`qopt.certificates.maps`). The arithmetic here is float64; its own roundings, a
2**29th of those, are inside the same term, which is taken for ``2 k + 8`` terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from qopt.certificates.ball import Ball
from qopt.certificates.curves import UNIT
from qopt.certificates.maps import Map, Pick, image
from qopt.certificates.network import Affine, Bend, Concat, Entry, Maximum, Network, Opaque, Step, Sum

TINY: Final = 2.0**-126
"""What one operation may lose where float32 flushes small numbers to zero."""


@final
@dataclass(frozen=True, eq=False)
class Box:
    """``low <= value <= high``, float64 (n, *shape)."""

    low: Tensor
    high: Tensor

    @property
    def size(self) -> Tensor:
        """The largest magnitude of each element."""
        return torch.maximum(self.low.abs(), self.high.abs())

    def meet(self, other: Box) -> Box:
        """What both allow."""
        return Box(torch.maximum(self.low, other.low), torch.minimum(self.high, other.high))


def intervals(network: Network, ball: Ball) -> list[Box]:
    """A box for every step.

    Raises:
        UnsupportedModelError: naming the operator and node that interval bounds do not pass.
    """
    boxes: list[Box] = []
    for step in network.steps:
        boxes.append(interval(step, [boxes[i] for i in step.inputs], ball))
    return boxes


def interval(step: Step, inputs: list[Box], ball: Ball) -> Box:
    """The box of one step from those of its inputs."""
    if isinstance(step, Entry):
        return Box(ball.low, ball.high)
    if isinstance(step, Affine):
        return _affine(step.map, inputs[0])
    if isinstance(step, Sum):
        return _sum(inputs, step.signs)
    if isinstance(step, Concat):
        low, high = (torch.cat([getattr(box, end) for box in inputs], step.axis + 1) for end in ("low", "high"))
        return Box(low, high)
    if isinstance(step, Bend):
        return Box(*step.curve.range(inputs[0].low, inputs[0].high))
    if isinstance(step, Maximum):
        low, high = (windowed(end, step.windows).amax(2) for end in (inputs[0].low, inputs[0].high))
        return Box(low.reshape(-1, *step.shape), high.reshape(-1, *step.shape))
    assert isinstance(step, Opaque)
    raise step.refuse("interval bounds")


def slack(map_: Map, size: Tensor) -> Tensor:
    """What float32 may add to or take from each output, for inputs of magnitude up to ``size``: (n, *output).

    For forward and reverse products together, so that the bounds of `qopt.certificates.backward` can use it too.
    """
    if map_.terms == 0 and map_.back_terms <= 1:
        return size.new_zeros(())
    terms = 2 * (map_.terms + map_.back_terms) + 8
    reached = map_.magnitude().product(size)
    reached = reached if map_.offset is None else reached + map_.offset.abs()
    return gamma(terms) * reached + terms * TINY


def gamma(terms: int) -> float:
    """``k u / (1 - k u)`` of float32 (Higham 2002, equation 3.1); infinite from 2**24 terms on."""
    return terms * UNIT / (1 - terms * UNIT) if terms * UNIT < 1 else float("inf")


def windowed(values: Tensor, windows: Tensor) -> Tensor:
    """The elements of every window: (n, outputs, window), minus infinity for padding."""
    flat = values.flatten(1)
    return torch.where(windows >= 0, flat[:, windows.clamp(min=0)], -torch.inf)


def _affine(map_: Map, box: Box) -> Box:
    if isinstance(map_, Pick):  # exact, also for the float64 of these lines
        return Box(image(map_, box.low), image(map_, box.high))
    middle, half = (box.low + box.high) / 2, (box.high - box.low) / 2
    centre, spread = image(map_, middle), map_.magnitude().product(half) + slack(map_, box.size)
    return Box(centre - spread, centre + spread)


def _sum(boxes: list[Box], signs: tuple[int, ...]) -> Box:
    signed = list(zip(boxes, signs, strict=True))
    low = torch.stack([b.low if s > 0 else -b.high for b, s in signed]).sum(0)
    high = torch.stack([b.high if s > 0 else -b.low for b, s in signed]).sum(0)
    room = sum_slack(boxes)
    return Box(low - room, high + room)


def sum_slack(boxes: list[Box]) -> Tensor:
    """What float32 may lose in a sum of values in ``boxes``."""
    total = torch.stack([box.size for box in boxes]).sum(0)
    return gamma(2 * len(boxes) + 4) * total
