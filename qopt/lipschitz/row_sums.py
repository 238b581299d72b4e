"""The linf norm of a convolution: the largest row sum of its matrix, exact at the borders of the image too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.operator import Axis
from qopt.lipschitz.spectral import EPS

Pattern = tuple[int, ...]
"""For every tap the pixel it reads, counted from 0 in the order in which they come up; -1 where it reads a zero."""


def largest_row_sum(weight: Tensor, axes: tuple[Axis, Axis]) -> NormBound:
    """The linf operator norm of a convolution: the largest sum of magnitudes over what one output reads.

    Args:
        weight: float64, (out, in / groups, kernel height, kernel width).
        axes: height and width; where a size is unknown, the supremum over sizes.
    """
    return _largest(weight, [_read(axis) for axis in axes])


def largest_column_sum(weight: Tensor, axes: tuple[Axis, Axis], groups: int) -> NormBound:
    """The linf operator norm of the adjoint: the largest sum of magnitudes over what reads one pixel.

    Arguments as of `largest_row_sum`, with zeros as padding.
    """
    blocks = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    return _largest(blocks, [_reading(axis) for axis in axes])


def _largest(rows: Tensor, patterns: Sequence[set[Pattern]]) -> NormBound:
    """The largest sum over (rows, channels, height, width) as two of the patterns merge taps or leave them out."""
    low = high = 0.0
    slack = 2 * (rows[0].numel() + 2) * EPS
    for down in patterns[0]:
        for across in patterns[1]:
            sums = _merged(rows, down, across)
            whole = _merged(rows.abs(), down, across)  # taps that merge may cancel: rounding is a part of this
            low = max(low, float((sums - slack * whole).max()))
            high = max(high, float((sums + slack * whole).max()))
    return NormBound(low, high, "row-sum")


def _merged(rows: Tensor, down: Pattern, across: Pattern) -> Tensor:
    """The sum of magnitudes of each row, (rows,), where taps that read one pixel add up."""
    merged = torch.einsum("rchw,ph,qw->rcpq", rows, _merging(down), _merging(across))
    return merged.abs().sum(dim=(1, 2, 3))


def _read(axis: Axis) -> set[Pattern]:
    """What the taps of each output read; where some output reads as many pixels as there are taps, that alone."""
    every = tuple(range(axis.kernel))
    if axis.size is None or axis.outputs is None:
        return {every}
    pixels = axis.pixels()
    found = set()
    for output in range(axis.outputs):
        first = output * axis.stride
        pattern = _numbered(pixels[first + axis.dilation * tap] for tap in range(axis.kernel))
        if pattern == every:
            return {every}
        found.add(pattern)
    return found


def _reading(axis: Axis) -> set[Pattern]:
    """Which taps read each pixel: those of one residue, except at the borders."""
    found = set()
    sizes = range(axis.before, axis.before + axis.size) if axis.size is not None else range(axis.stride)
    for place in sizes:
        pattern = []
        for tap in range(axis.kernel):
            output, rest = divmod(place - axis.dilation * tap, axis.stride)
            inside = axis.outputs is None or 0 <= output < axis.outputs
            pattern.append(-1 if rest or not inside else tap)
        found.add(_numbered(pattern))
    return {p for p in found if not any(_within(p, other) for other in found)}


def _within(pattern: Pattern, other: Pattern) -> bool:
    return pattern != other and all(a < 0 or b >= 0 for a, b in zip(pattern, other, strict=True))


def _numbered(pixels: Iterable[int]) -> Pattern:
    """Pixels by the order in which they come up, zeros as -1."""
    names: dict[int, int] = {}
    return tuple(-1 if p < 0 else names.setdefault(p, len(names)) for p in pixels)


def _merging(pattern: Pattern) -> Tensor:
    """(pixels, taps): which taps add up to the weight of a pixel."""
    matrix = torch.zeros(max(1, max(pattern) + 1), len(pattern), dtype=torch.float64)
    for tap, pixel in enumerate(pattern):
        if pixel >= 0:
            matrix[pixel, tap] = 1.0
    return matrix
