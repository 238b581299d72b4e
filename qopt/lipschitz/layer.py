"""The three norms of a layer, which are never the same thing: of its reshaped weight, and of the map it computes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.errors import UsageError
from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.frequency import polyphase, samplings, supremum
from qopt.lipschitz.operator import Axis, Operator
from qopt.lipschitz.reshaped import as_matrix, max_row_sum, reshaped_l2
from qopt.lipschitz.row_sums import largest_column_sum, largest_row_sum
from qopt.lipschitz.spectral import EPS, finite, times_power_of_two
from qopt.lipschitz.stretch import Convolution, stretch


@final
@dataclass(frozen=True)
class LayerNorms:
    """What can be said of a layer's weight, each an interval that holds.

    Attributes:
        reshaped: the spectral norm of the weight as a matrix, which the papers' thresholds use; of a convolution a
            lower bound of ``operator_l2`` only, up to 3 times low.
        operator_l2: the Lipschitz constant in l2 of the map from one input to its output, without the bias.
        operator_linf: that in linf.

    An embedding is no linear map of its ids: its ``operator_l2`` is the longest row, ``operator_linf`` the largest
    entry, which bound what one word contributes.
    """

    reshaped: NormBound
    operator_l2: NormBound
    operator_linf: NormBound


def layer_norms(weight: Tensor, operator: Operator, *, where: str = "weight") -> LayerNorms:
    """All norms of a layer.

    Args:
        weight: any real dtype, shaped as ``operator`` says; batch norm folded into it.
        operator: what the layer does with it.
        where: the layer's name, for errors.

    Raises:
        CorruptModelError: for NaN or infinite weights.
        UsageError: for an empty weight, and one that does not fit the operator.
    """
    _check(weight, operator, where)
    if operator.is_convolution:
        axis = 1 if operator.kind == "transposed" else 0
        reshaped = reshaped_l2(weight, axis, operator.groups, where=where)
        l2, linf = operator_l2(weight, operator, where=where), operator_linf(weight, operator, where=where)
        return LayerNorms(reshaped, l2, linf)
    reshaped = reshaped_l2(weight, operator.axis, where=where)
    if operator.kind == "linear":
        return LayerNorms(reshaped, reshaped, max_row_sum(weight, operator.axis, where=where))
    largest = float(finite(weight, where).abs().max())
    return LayerNorms(reshaped, _longest_row(weight, where), NormBound(largest, largest, "largest entry"))


def operator_l2(weight: Tensor, operator: Operator, *, where: str = "weight") -> NormBound:
    """The l2 operator norm of a convolution, plain or transposed: arguments and errors of `layer_norms`.

    The upper end is exact on the torus up to rounding where the image is small, 1 to 4 % high on a grid of
    frequencies, and higher by the root of the number of copies of a pixel where padding reflects or wraps. The lower
    end is found on the image itself, or for images of any size on the grid.
    """
    axes, wide = _convolution(weight, operator, where)
    scaled, exponent = _scaled(wide)
    if not bool(scaled.any()):
        return NormBound(0.0, 0.0, "zero")
    blocks = polyphase(scaled, axes, operator.groups)
    grid = (samplings(axes[0], blocks.shape[1]), samplings(axes[1], blocks.shape[1]))
    found = supremum(blocks, grid)
    upper = min(found.bound, _schur(scaled, axes, operator.groups))
    if operator.size is None:
        return _unscaled(min(found.low, upper), upper, exponent, "grid")
    whole = stretch(Convolution(scaled, axes, operator.groups), _stretch_rounding(scaled, axes))
    if all(_holds_a_patch(axis) for axis in axes):
        whole = max(whole, reshaped_l2(scaled, 0, operator.groups, where=where).lower)
    return _unscaled(min(whole, upper), upper, exponent, "frequencies+conjugate gradients")


def operator_linf(weight: Tensor, operator: Operator, *, where: str = "weight") -> NormBound:
    """The linf operator norm of a convolution, exact up to rounding: arguments and errors of `layer_norms`."""
    axes, wide = _convolution(weight, operator, where)
    return (
        largest_column_sum(wide, axes, operator.groups)
        if operator.kind == "transposed"
        else largest_row_sum(wide, axes)
    )


def _convolution(weight: Tensor, operator: Operator, where: str) -> tuple[tuple[Axis, Axis], Tensor]:
    """Both axes, and the weight with both in float64."""
    _check(weight, operator, where)
    if not operator.is_convolution:
        raise UsageError("not a convolution", where=where, got=operator.kind)
    axes = operator.axes(tuple(weight.shape), where=where)
    wide = finite(weight, where)
    return axes, wide if wide.ndim == 4 else wide[:, :, None]


def _schur(weight: Tensor, axes: tuple[Axis, Axis], groups: int) -> float:
    """``sqrt(||K||_1 ||K||_inf)``, which is never below the spectral norm and tight for smooth kernels."""
    padded = (axes[0].padded(), axes[1].padded())
    columns = largest_column_sum(weight, padded, groups).upper * axes[0].copies * axes[1].copies
    return math.sqrt(largest_row_sum(weight, axes).upper * columns) * (1 + 8 * EPS)


def _check(weight: Tensor, operator: Operator, where: str) -> None:
    if weight.numel() == 0:
        raise UsageError("a weight without entries", where=where, got=f"shape {tuple(weight.shape)}")
    if not operator.is_convolution and (weight.ndim != 2 or operator.groups != 1):
        got = f"shape {tuple(weight.shape)}, {operator.groups} groups"
        raise UsageError("not the weight of a linear layer or an embedding", where=where, expected="a matrix", got=got)


def _scaled(weight: Tensor) -> tuple[Tensor, int]:
    """The weight over a power of two that makes its largest entry about 1, exactly, and the exponent."""
    exponent = torch.frexp(weight.abs().max()).exponent
    return times_power_of_two(weight, -exponent), int(exponent)


def _unscaled(lower: float, upper: float, exponent: int, method: str) -> NormBound:
    low, high = math.ldexp(lower, exponent), math.ldexp(upper, exponent)
    return NormBound(max(0.0, math.nextafter(low, 0.0)), math.nextafter(high, math.inf), method)


def _stretch_rounding(weight: Tensor, axes: tuple[Axis, Axis]) -> float:
    """How far the norm of an output may be off for a unit image: sums of ``terms`` products, each pixel in many.

    ``|| |K| ||_2 <= sum_t ||K_t||_F <= sqrt(T) ||K||_F``, times the copies of a pixel.
    """
    terms = weight[0].numel()
    taps = weight.shape[2] * weight.shape[3]
    copies = axes[0].copies * axes[1].copies
    return 4 * (terms + 8) * EPS * math.sqrt(taps * copies * float(weight.square().sum()))


def _holds_a_patch(axis: Axis) -> bool:
    """Whether the taps of some output all lie inside the image: then it reads any pixels independently."""
    if axis.size is None or axis.outputs is None:
        return True
    first = -(-axis.before // axis.stride)
    return first < axis.outputs and first * axis.stride - axis.before + axis.extent <= axis.size


def _longest_row(weight: Tensor, where: str) -> NormBound:
    rows, exponent = _scaled(as_matrix(finite(weight, where))[0])
    longest, slack = float(rows.norm(dim=1).max()), (rows.shape[1] + 4) * EPS
    return _unscaled(longest * (1 - slack), longest * (1 + slack), exponent, "longest row")
