"""Upper bounds of a convolution's spectral norm from its matrices at single frequencies.

On a torus a convolution is block diagonal: one matrix ``F(w)``, output by input channels, per frequency. An image with
its padding fits on a torus of ``n + p`` pixels, where the layer is a part of the torus's convolution; on a torus of
``n`` it is none, and the norm there can be too small. A stride makes every residue of pixels an input channel of its
own (polyphase); with a dilation the taps fall on ``stride / gcd(stride, dilation)`` of them. What is left of a dilation
multiplies frequencies, and plays no part in a supremum over all of them.

For unit u, v the function ``Re(e^(it) u* F(w) v)``, centred, is of exponential type ``(k - 1) / 2`` along each axis, so
from a maximum M it falls no faster than ``M cos((k - 1) t / 2)`` (Duffin and Schaeffer 1938). On a grid of N
frequencies the nearest is within ``pi / N``: the supremum is at most the grid's maximum times
``sec((k - 1) pi / 2N)`` per axis, whatever the size of the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from qopt.lipschitz.operator import Axis
from qopt.lipschitz.spectral import EPS

FINENESS = 8
"""Points of the grid per tap: 4 % too high for 3 x 3 taps."""

FINE = 64
"""Channels up to which the grid is twice as fine: 1 %."""

WIDTH = 1e-6
"""By what part the largest eigenvalue may be overstated."""

TOGETHER = 1 << 20
"""Entries of matrices that are looked at together, 16 MB; at least one column of the grid."""

ESTIMATES = 6
"""Steps of the power method that choose the frequency to solve first."""


@final
@dataclass(frozen=True)
class Sampling:
    """The frequencies along one axis, and by what the largest norm found on them has to be multiplied.

    Attributes:
        points: equally spaced frequencies.
        factor: at least 1.
    """

    points: int
    factor: float


class Suprema(NamedTuple):
    """The largest norm of all matrices on the grid, as an interval, and with the factors an upper bound."""

    low: float
    high: float
    bound: float


def samplings(axis: Axis, channels: int) -> Sampling:
    """All frequencies of the torus where they are few, else a grid; repeated pixels cost the root of their number."""
    grid = FINENESS * (axis.taps - 1) * (2 if channels <= FINE else 1)
    if axis.taps == 1:
        return Sampling(1, _repeats(axis))
    sec = 1 / math.cos((axis.taps - 1) * math.pi / (2 * grid))
    torus = torus_points(axis)
    if torus is None or torus > grid:
        return Sampling(grid, sec * _repeats(axis))
    return Sampling(torus, _repeats(axis))


def torus_points(axis: Axis) -> int | None:
    """Different frequencies of the smallest torus that holds the image and its padding; None for any size."""
    if axis.size is None:
        return None
    if axis.mode == "zeros":
        pixels = axis.size + max(axis.before, axis.after)  # both ends share what is wrapped around
    else:
        pixels = axis.size if _wraps(axis) else axis.size + axis.before + axis.after
    steps = -(-pixels // axis.stride)
    return steps // math.gcd(steps, axis.dilation // math.gcd(axis.stride, axis.dilation))


def _wraps(axis: Axis) -> bool:
    """Whether wrapped padding makes the layer a part of the image's own torus, no output twice."""
    if axis.mode != "circular":
        return False
    if axis.size is None or axis.outputs is None:
        return axis.stride == 1 and axis.before + axis.after < axis.extent
    return axis.size % axis.stride == 0 and axis.outputs * axis.stride <= axis.size


def _repeats(axis: Axis) -> float:
    """By what the padding may lengthen an image."""
    return 1.0 if _wraps(axis) else math.sqrt(axis.copies)


def polyphase(weight: Tensor, axes: tuple[Axis, Axis], groups: int) -> Tensor:
    """(groups, rows, columns, taps down, taps across) of the convolution of stride 1 that each phase meets.

    Rows are the fewer of output channels and of input channels times phases.
    """
    (down, across), channels = axes, weight.shape[0] // groups
    grown = weight.new_zeros(*weight.shape[:2], down.taps * down.phases, across.taps * across.phases)
    grown[:, :, : down.kernel, : across.kernel] = weight
    parts = grown.reshape(groups, channels, -1, down.taps, down.phases, across.taps, across.phases)
    blocks = parts.permute(0, 1, 2, 4, 6, 3, 5).reshape(groups, channels, -1, down.taps, across.taps)
    return blocks if blocks.shape[1] <= blocks.shape[2] else blocks.transpose(1, 2)


def supremum(blocks: Tensor, samplings: tuple[Sampling, Sampling]) -> Suprema:
    """Bounds of ``sup ||F(w)||_2`` over all frequencies and groups.

    Args:
        blocks: as `polyphase` gives them, entries near 1.
        samplings: down and across.
    """
    slack = _rounding(blocks)
    low = high = 0.0
    for grams in _grams(blocks, samplings):
        low, high = _largest(grams, low, high)
    top = math.sqrt(high + slack) * (1 + 4 * EPS)
    bottom = math.sqrt(max(0.0, low - slack)) * (1 - 4 * EPS)
    return Suprema(bottom, top, top * samplings[0].factor * samplings[1].factor * (1 + 8 * EPS))


def _rounding(blocks: Tensor) -> float:
    """How far the computed eigenvalues may be off, by the bounds of `spectral`.

    With T taps ``G(w)`` sums products of which ``(sum ||K_t||_F)^2 <= T ||K||_F^2`` bounds the magnitudes.
    """
    taps = blocks.shape[3] * blocks.shape[4]
    squares = float(blocks.square().sum(dim=(1, 2, 3, 4)).max())
    return 8 * (blocks.shape[1] + blocks.shape[2] + taps + 8) * EPS * taps * squares


def _grams(blocks: Tensor, samplings: tuple[Sampling, Sampling]) -> Iterator[Tensor]:
    """``F(w) F(w)*`` for every frequency, half of them by symmetry, some columns of the grid at a time.

    As ``sum_d C_d e^(iwd)`` with ``C_d = sum_t K_(t+d) K_t^T``, which costs one product per shift and none per
    frequency.
    """
    groups, rows, _, high, wide = blocks.shape
    shifts = blocks.new_zeros(2 * high - 1, 2 * wide - 1, groups, rows, rows)
    for y in range(high):
        for x in range(1 - wide, wide):
            if y == 0 and x < 0:
                continue
            late = blocks[..., y:, max(x, 0) : wide + min(x, 0)].flatten(2)
            early = blocks[..., : high - y, max(-x, 0) : wide + min(-x, 0)].flatten(2)
            product = late @ early.mT
            shifts[high - 1 + y, wide - 1 + x] = product
            shifts[high - 1 - y, wide - 1 - x] = product.mT
    down, across = samplings[0].points, samplings[1].points
    turns_down = _turns(torch.arange(down), high, down)
    turns_across = _turns(torch.arange(across // 2 + 1), wide, across)
    for turns in turns_across.split(max(1, TOGETHER // (down * groups * rows * rows))):  # type: ignore[no-untyped-call]
        partial = torch.einsum("cx,yxgrs->cygrs", turns, shifts.to(turns.dtype))
        yield torch.einsum("fy,cygrs->fcgrs", turns_down, partial).flatten(0, 2)


def _turns(frequencies: Tensor, taps: int, points: int) -> Tensor:
    """``e^(2 pi i f d / points)`` for the shifts d from ``1 - taps`` to ``taps - 1``: (frequencies, shifts)."""
    shifts = torch.arange(1 - taps, taps)
    angles = (frequencies[:, None] * shifts).remainder(points).to(torch.float64) * (2 * math.pi / points)
    return torch.polar(torch.ones_like(angles), angles)


def _largest(grams: Tensor, low: float, high: float) -> tuple[float, float]:
    """The interval of the largest eigenvalue of all matrices so far, ``grams`` (batch, n, n) now among them.

    Eigenvalues are computed of the few that look largest. For the others it is enough that Cholesky's algorithm
    succeeds on ``mu I - G``: that is positive semidefinite then, up to ``n eps`` of its trace (Rump 2006).
    """
    side = grams.shape[-1]
    estimates = _estimates(grams)
    while len(grams):
        first = int(estimates.argmax())
        if float(estimates[first]) > low or not low:
            low = max(low, float(torch.linalg.eigvalsh(grams[first])[-1]))
        tested = low * (1 + WIDTH)
        shifted = -grams
        shifted.diagonal(dim1=-2, dim2=-1).add_(tested)
        _, failed = torch.linalg.cholesky_ex(shifted)
        high = max(high, tested * (1 + 4 * (side + 2) * side * EPS))
        kept = torch.nonzero(failed)[:, 0]
        if len(kept) == len(grams):
            low = max(low, float(torch.linalg.eigvalsh(grams)[:, -1].max()))
            return low, max(high, low)
        grams, estimates = grams[kept], estimates[kept]
    return low, high


def _estimates(grams: Tensor) -> Tensor:
    """Rayleigh quotients after a few steps from the largest columns, (batch,)."""
    columns = grams.diagonal(dim1=-2, dim2=-1).real.argmax(dim=1)
    vectors = grams[torch.arange(len(grams)), :, columns][..., None]
    for _ in range(ESTIMATES):
        lengths = vectors.norm(dim=1, keepdim=True)
        vectors = grams @ (vectors / lengths.clamp_min(torch.finfo(torch.float64).tiny))
    lengths = vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    unit = vectors / lengths
    quotients: Tensor = (unit.conj() * (grams @ unit)).sum(dim=(1, 2)).real
    return quotients
