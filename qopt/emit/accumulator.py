"""Weights and biases as the int32 accumulator of an integer kernel takes them.

The runtime rounds each bias to a multiple of the weight's scale times the activation's and stores it in 32 bits. Where
a channel's weights are tiny beside its bias, which dead channels of trained networks are, that overflows, and ONNX
Runtime 1.31 then computes something else without a word (measured: below a scale of about 1e-8 the channel is lost).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qopt.quant import AffineRange, AnyWeight, QuantizedWeight, parts_of, with_parts
from qopt.quant.rows import Weight

LARGEST_BIAS = 2**30
"""The largest bias code; the other half of int32 is left for the products: 33 thousand of the largest at 8 bits."""

SMALLEST_SCALE = 1e-30
"""A weight's scale stays above this, so that its product with an activation's scale is a normal number."""


@final
@dataclass(frozen=True, eq=False)
class Bias:
    """A bias in units of the accumulator.

    Attributes:
        codes: int32 (channels,), at most `LARGEST_BIAS`.
        unit: float32, shape () or (channels,): the weight's scale times that of the activations.
    """

    codes: NDArray[np.int32]
    unit: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        """What the kernel adds, float32 (channels,)."""
        return np.asarray(self.codes * self.unit.astype(np.float64), np.float32)


@final
@dataclass(frozen=True, eq=False)
class IntegerLayer:
    """A layer as an integer kernel computes it.

    Attributes:
        weight: the codes and scales that it reads.
        biases: number of the use to the bias that it adds to the products.
        gemm: whether ONNX Runtime looks for a Gemm there, and for what fuses with one.
    """

    weight: AnyWeight
    biases: Mapping[int, Bias]
    gemm: bool


def round_bias(bias: NDArray[np.float32], weight: AnyWeight, code: AffineRange) -> Bias:
    """The bias (channels,) of a use whose input comes in ``code``; the weight's scales must be large enough for it."""
    unit = np.asarray(weight.scale.numpy() * np.float32(code.scale), np.float32)
    return Bias(np.rint(bias.astype(np.float64) / unit).astype(np.int32), unit)


def smallest_scales(biases: Iterable[tuple[NDArray[np.float32], AffineRange]], channels: int) -> Tensor:
    """The smallest scale of each channel that keeps every bias within `LARGEST_BIAS`: float32 (channels,)."""
    needed = np.full(channels, SMALLEST_SCALE)
    for bias, code in biases:
        needed = np.maximum(needed, np.abs(bias.astype(np.float64)) / (LARGEST_BIAS * code.scale))
    return torch.from_numpy(needed).to(torch.float32)


def fit_scales(weight: Weight, smallest: Tensor) -> Weight:
    """``weight`` with no scale of a magnitude below ``smallest`` (channels,), codes rounded again where a scale grows.

    What changes is below the last bit of the bias. A channel of zeros, where any scale gives zero, gets the smallest
    one: its bias then is as exact as 30 bits are.
    """
    return with_parts(weight, [_fit_scales(part, smallest[members]) for part, members in parts_of(weight)])


def scales_fit(weight: AnyWeight, smallest: Tensor) -> bool:
    """Whether `fit_scales` keeps the weight: it has a zero level, or no scale is below ``smallest`` (channels,)."""
    return all(_fits(part, smallest[members]) for part, members in parts_of(weight))


def _fits(weight: QuantizedWeight, smallest: Tensor) -> bool:
    floor = smallest if weight.scale.ndim else smallest.max()
    return bool((weight.levels()[0] == 0).any()) or bool((weight.scale.abs() >= floor).all())


def _fit_scales(weight: QuantizedWeight, smallest: Tensor) -> QuantizedWeight:
    per_channel = weight.scale.ndim > 0
    shape = weight.codes.movedim(weight.axis, 0).shape
    rows = weight.codes.movedim(weight.axis, 0).reshape(len(smallest) if per_channel else 1, -1).clone()
    zero = (weight.dequantize() == 0).movedim(weight.axis, 0).reshape(len(rows), -1).all(dim=1)
    old = weight.scale.reshape(-1)
    floor = smallest if per_channel else smallest.max(dim=0, keepdim=True).values
    new = torch.where(zero, floor, torch.maximum(old.abs(), floor)) * torch.where(old < 0, -1.0, 1.0)
    for row in torch.nonzero(new != old).flatten().tolist():
        rows[row] = _recode(rows[row], weight.table, 0.0 if zero[row] else float(old[row]) / float(new[row]))
    codes = rows.reshape(shape).movedim(0, weight.axis).contiguous()
    return replace(weight, codes=codes, scale=new.reshape(weight.scale.shape))


def _recode(codes: Tensor, table: Tensor | None, ratio: float) -> Tensor:
    """The codes of the levels nearest to ``ratio`` times those of ``codes``."""
    if table is None:
        return (codes.to(torch.float64) * ratio).round().to(torch.int8)
    levels = table.to(torch.float64)
    nearest = (levels[:, None] * ratio - levels).abs().argmin(dim=1)
    return nearest[codes.to(torch.int64)].to(torch.uint8)
