"""Scales: max-abs, and the mean-square-optimal one found on sorted magnitudes.

Sorting each row once makes a candidate scale cheap: with thresholds t_j between the levels u_j, the squared error is
``sum w^2 - 2 s sum_j (u_j - u_(j-1)) S_j + s^2 sum_j (u_j^2 - u_(j-1)^2) N_j``, where S_j and N_j are the sum and the
count of the magnitudes above ``s t_j``. It also gives the best scale for the same assignment in closed form, so that
every candidate is one step of Lloyd's algorithm. A grid with one more level on one side adds one such term, over the
weights of that side. Everything here is float64 on rows of shape (rows, weights per row).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from qopt.quant.codebook import Codebook

OCTAVES = 6
"""How far below max-abs the search looks: clipping at a 64th of the largest weight."""

NEGLIGIBLE = 2.0**-24
"""Levels below this part of the largest one do not change the error that the search compares."""

LOOKUPS = 1 << 20
"""Threshold lookups at a time: bounds the memory of the search to a few times 8 MB."""


def max_abs_scale(rows: Tensor, codes: Codebook) -> Tensor:
    """The float32 scale, shape (rows,), that puts each row's largest magnitude on the top level; 1 for zeros."""
    return storable(rows.abs().amax(dim=1) / codes.top, codes)


def longer_side_scale(rows: Tensor, codes: Codebook) -> Tensor:
    """The scale (rows,) that puts each row's largest magnitude on level -(q + 1); negative where that is positive."""
    sign = torch.where(rows.amax(dim=1) > -rows.amin(dim=1), -1.0, 1.0)
    return storable(rows.abs().amax(dim=1) / (codes.top + 1), codes) * sign


def storable(scale: Tensor, codes: Codebook) -> Tensor:
    """``scale`` as a normal float32 whose top level is finite, and 1 where it is zero.

    The last step makes quantization idempotent: the scale that max-abs finds in the dequantized weight is this one.
    """
    info = torch.finfo(torch.float32)
    limit = torch.tensor(info.max / (codes.top + codes.lowest), dtype=torch.float32).nextafter(torch.tensor(0.0))
    narrow = scale.to(torch.float32).clamp(min=info.tiny).minimum(limit)
    stable = (narrow * codes.top / codes.top).clamp(min=info.tiny)
    return torch.where(scale == 0, torch.ones_like(stable), stable)


def mean_square_scale(rows: Tensor, codes: Codebook, *, blocks: bool = False) -> Tensor:
    """The best float32 scale found for rounding to nearest, shape (rows,); 1 for rows of zeros.

    Exact for one level (ternary). Otherwise a geometric grid over six octaves under max-abs, denser for short rows,
    whose error is jagged; a finer grid around its best point; then three Lloyd steps. The scale stays below the point
    where the top level would be unused. It is negative where one more level on one side is worth more there.

    ``blocks`` says that rows are many and short: some at a time, without the scales that no such row is best under.
    """
    if not blocks:
        return _searched(rows, codes, 0.0)
    parts = torch.split(rows, max(1, LOOKUPS // len(codes.levels)))
    return torch.cat([_searched(part, codes, _least_part(rows.shape[1], codes)) for part in parts])


def _least_part(count: int, codes: Codebook) -> float:
    """The part of a max-abs scale below which none is as good, whatever the row of ``count`` weights.

    Under the max-abs scale no weight is off by more than half the gap below the top level; under a smaller one the
    largest weight is off by what the top level lacks.
    """
    half_gap = codes.top - float(codes.nearest[-1])
    return (codes.top - half_gap * math.sqrt(count)) / (codes.top + codes.lowest)


def _searched(rows: Tensor, codes: Codebook, least: float) -> Tensor:
    used = codes.levels > codes.top * NEGLIGIBLE
    search = _Search.of(rows, codes.levels[used], codes.nearest[used], codes.lowest)
    if len(codes.levels) == 1 and not codes.lowest:
        return storable(search.single_level(), codes)
    top = rows.abs().amax(dim=1, keepdim=True) / codes.top
    limit = top * (codes.top / float(codes.nearest[-1])) * (1 - 1e-6)
    work = rows.shape[1] * len(search.thresholds)
    per_octave = 32 if work <= 4096 else 8 if len(search.thresholds) <= 31 else 4
    steps = torch.arange(-OCTAVES * per_octave, per_octave, dtype=torch.float64) / per_octave
    parts = torch.exp2(steps)
    best, _ = search.best(torch.minimum(top * parts[parts >= least], limit), limit)
    around = torch.linspace(-1, 1, 9, dtype=torch.float64) / per_octave
    best, sign = search.best(torch.minimum(best * torch.exp2(around), limit), limit)
    for _ in range(3):
        best, sign = search.best(best, limit)
    return storable(best[:, 0], codes) * sign[:, 0].to(torch.float32)


@final
@dataclass(frozen=True, eq=False)
class _Sorted:
    values: Tensor  # (rows, n), ascending
    below: Tensor  # (rows, n + 1), prefix sums of the values

    @staticmethod
    def of(rows: Tensor) -> _Sorted:
        narrow = rows.to(torch.float32)  # of float32 weights the same numbers, sorted in less than half the time
        exact = bool((narrow == rows).all())
        found = torch.from_numpy(np.sort((narrow if exact else rows).numpy(), axis=1))
        return _Sorted._from(found.to(torch.float64))

    def negated(self) -> _Sorted:
        return _Sorted._from(-self.values.flip(1))

    @staticmethod
    def _from(values: Tensor) -> _Sorted:
        return _Sorted(values, torch.nn.functional.pad(values.cumsum(dim=1), (1, 0)))

    def above(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and number of the values that are at least ``cuts`` (rows, k); both float64 (rows, k)."""
        position = torch.searchsorted(self.values, cuts)
        number = (self.values.shape[1] - position).to(torch.float64)
        return self.below[:, -1:] - self.below.gather(1, position), number


@final
@dataclass(frozen=True, eq=False)
class _Search:
    magnitudes: _Sorted
    sides: tuple[_Sorted, ...]  # where the grid has one more level on one side: the rows negated, the rows
    thresholds: Tensor  # (levels,), in units of the scale
    steps: Tensor  # (levels,), u_j - u_(j-1)
    square_steps: Tensor  # (levels,), u_j^2 - u_(j-1)^2

    @staticmethod
    def of(rows: Tensor, levels: Tensor, thresholds: Tensor, lowest: bool) -> _Search:
        lower = torch.nn.functional.pad(levels[:-1], (1, 0))
        signed = _Sorted.of(rows) if lowest else None
        sides = () if signed is None else (signed.negated(), signed)
        return _Search(_Sorted.of(rows.abs()), sides, thresholds, levels - lower, levels**2 - lower**2)

    def single_level(self) -> Tensor:
        """The exact optimum where there is one level: the mean of the k largest magnitudes that maximises mean^2 k."""
        below = self.magnitudes.below
        above = below[:, -1:] - below[:, :-1]
        number = torch.arange(above.shape[1], 0, -1, dtype=torch.float64)
        first = (above.square() / number).argmax(dim=1)
        mean = (above / number).gather(1, first[:, None])[:, 0]
        return mean / self.steps[0]

    def best(self, scales: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """From candidates (rows, k), each improved for its own assignment, the one of lowest error: (rows, 1).

        With it the sign, (rows, 1): -1 where the longer side is that of the positive weights.
        """
        width = max(1, LOOKUPS // (len(self.thresholds) * len(scales)))
        parts = [self._improve(part.contiguous()) for part in torch.split(scales, width, dim=1)]
        gain, improved, sign = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
        first = gain.argmax(dim=1, keepdim=True)
        return torch.minimum(improved.gather(1, first), limit), sign.gather(1, first)

    def _improve(self, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far each candidate's assignment lowers the error under ``sum w^2``, and the scale and sign that do so."""
        rows, count = scales.shape
        total, number = self.magnitudes.above((scales[:, :, None] * self.thresholds).view(rows, -1))
        above = total.view(rows, count, -1) @ self.steps
        weight = number.view(rows, count, -1) @ self.square_steps
        if not self.sides:
            return *_lloyd(above, weight, scales), torch.ones_like(scales)
        top = len(self.thresholds)  # the grid is linear: its levels are 1 .. top
        cut = scales * (top + 0.5)
        tails = [side.above(cut) for side in self.sides]
        plain, turned = (_lloyd(above + s, weight + (2 * top + 1) * n, scales) for s, n in tails)
        better = turned[0] > plain[0]
        gain, improved = (torch.where(better, b, a) for a, b in zip(plain, turned, strict=True))
        return gain, improved, torch.where(better, -1.0, 1.0)


def _lloyd(above: Tensor, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The gain ``above**2 / weight`` and the scale ``above / weight`` of assignments that ``scales`` made."""
    improved = torch.where(weight > 0, above / weight.clamp(min=1e-300), scales)
    return above * improved, improved
