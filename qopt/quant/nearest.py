"""Rounding to nearest on a codebook: codes, their error, and the best of several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qopt.quant.codebook import Codebook

PROBE = 256
"""Weights per row that rule most of the rows out before a scale is tried on all of them."""


def encode(rows: Tensor, scale: Tensor, levels: Codebook, thresholds: Tensor | None = None) -> Tensor:
    """Codes of (rows, n) weights under scales (rows,): the levels themselves, or indices into the table.

    Linear codes round half to even and clip; the others take ``thresholds``, or else the nearest level, a tie upwards.
    """
    ratio = rows / scale.to(torch.float64)[:, None]
    if levels.table is None:
        return ratio.round_().clamp_(-levels.top - levels.lowest, levels.top).to(torch.int8)
    count = len(levels.levels)
    if levels.nearest[0] == 0:  # mid-rise: even numbers separate the levels
        beyond = ratio.abs().mul_(0.5).floor_().clamp_(max=count - 1)
        return torch.where(ratio < 0, count - 1 - beyond, count + beyond).to(torch.uint8)
    cuts = levels.nearest if thresholds is None else thresholds
    index = torch.bucketize(ratio.abs(), cuts, right=True, out_int32=True)
    positive = torch.cat([torch.zeros(1, dtype=torch.uint8), torch.arange(count, 0, -1).to(torch.uint8)])
    negative = torch.where(positive > 0, positive + count, 0).to(torch.uint8)
    return torch.cat([positive, negative])[index + (ratio < 0) * (count + 1)]


def squared_errors(rows: Tensor, scale: Tensor, levels: Codebook) -> Tensor:
    """The squared error of each row, (rows,): that of the float32 products that the file computes."""
    codes = encode(rows, scale, levels)
    values = codes if levels.table is None else levels.table[codes.to(torch.int32)]
    return (rows - values.to(torch.float32) * scale[:, None]).square_().sum(dim=1)


def best_scale(rows: Tensor, scales: Sequence[Tensor], levels: Codebook) -> tuple[Tensor, Tensor]:
    """For each row the scale of lowest error, the last one of equals, and that error: both (rows,)."""
    best, lowest = scales[0], squared_errors(rows, scales[0], levels)
    for scale in scales[1:]:
        open_ = torch.nonzero(squared_errors(rows[:, :PROBE], scale, levels) <= lowest)[:, 0]
        if not len(open_):
            continue
        error = squared_errors(rows[open_], scale[open_], levels)
        chosen = error <= lowest[open_]
        best = best.index_put((open_[chosen],), scale[open_[chosen]])
        lowest = lowest.index_put((open_[chosen],), error[chosen])
    return best, lowest
