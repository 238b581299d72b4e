"""Linear formats: rounding to nearest on the narrow, the full, the mid-rise or the asymmetric grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from qopt.quant.asymmetric import least_squares, spanning
from qopt.quant.codebook import Codebook, codebook
from qopt.quant.nearest import best_scale, encode
from qopt.quant.quantized import QuantizedWeight
from qopt.quant.quantizer import Rows
from qopt.quant.scales import longer_side_scale, max_abs_scale, mean_square_scale
from qopt.spec import WeightSpec

DEAD = 2.0**-16
"""A channel whose largest weight is no more than this part of the tensor's is dead: training has switched it off."""


@final
@dataclass(frozen=True)
class Linear:
    """Codes of ``int2`` to ``int8``: multiples of one step per row, ties to even.

    ``auto`` takes the grid of lowest squared error for the whole tensor, whose codes share one table; the full range
    contains the narrow grid and turns its longer side for each row. A tensor with a dead channel is not mid-rise unless
    asked to be: a channel without a zero level and next to no scale cannot share an integer kernel with its bias.
    Blocks, which no integer kernel takes, may be dead.
    """

    name: str = "linear"

    def quantize(self, weight: Tensor, spec: WeightSpec, axis: int) -> QuantizedWeight:
        """Quantize along ``axis``; see `quantize_weight`."""
        rows = Rows.of(weight, spec, axis)
        if spec.grid == "asym":
            found = (spanning if spec.scale == "max" else least_squares)(rows.values, spec.bits)
            return rows.assemble(found.codes, found.scale, zero=found.zero)
        if spec.scale == "max":
            levels = codebook(spec)
            scale = max_abs_scale(rows.values, levels)
            return rows.assemble(encode(rows.values, scale, levels), scale)
        largest = rows.values.abs().amax(dim=1)
        levels = codebook(spec, "full" if spec.grid == "auto" else spec.grid)
        scale, error = _mean_square(rows.values, levels, blocks=spec.block > 0)
        if spec.grid == "auto" and spec.bits <= 4 and (spec.block or bool((largest > DEAD * largest.max()).all())):
            mid = codebook(spec, "mid")
            mid_scale, mid_error = _mean_square(rows.values, mid, blocks=spec.block > 0)
            if mid_error.sum() < error.sum():
                levels, scale = mid, mid_scale
        codes = encode(rows.values, scale, levels)
        if levels.table is not None:
            scale = torch.where(largest > 0, scale, 0.0)
        return rows.assemble(*_upright(codes, scale, levels), levels.table)


def _mean_square(rows: Tensor, levels: Codebook, *, blocks: bool) -> tuple[Tensor, Tensor]:
    """The best scales found and their errors, (rows,) each: never above those of max-abs scales or the narrow grid.

    The last scales are those that a weight which is quantized already came from: they make quantizing idempotent.
    """
    scales = [mean_square_scale(rows, levels, blocks=blocks)]
    if levels.lowest:
        narrow = mean_square_scale(rows, replace(levels, lowest=False), blocks=blocks)
        scales += [narrow, longer_side_scale(rows, levels)]
    return best_scale(rows, [*scales, max_abs_scale(rows, levels)], levels)


def _upright(codes: Tensor, scale: Tensor, levels: Codebook) -> tuple[Tensor, Tensor]:
    """The same values with a negative scale only where the longest level is used."""
    if not levels.lowest:
        return codes, scale
    turn = (scale < 0) & (codes.amin(dim=1) >= -levels.top)
    return torch.where(turn[:, None], -codes, codes), torch.where(turn, -scale, scale)
