"""The levels of a weight format: which multiples of the scale its codes can represent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.errors import UsageError
from qopt.spec import Grid, WeightSpec

TOP_MULTIPLIER = 64
"""The largest entry of an int8 table of powers of two: small enough for saturating 8-bit kernels."""


@final
@dataclass(frozen=True, eq=False)
class Codebook:
    """The positive levels of a format of 2 to 8 bits; the negatives follow, and zero where the grid has it.

    Attributes:
        levels: float64, shape (n,), ascending multiples of the scale: 1..q for linear, 1, 3, .. for mid-rise, powers of
            two for log.
        nearest: float64, shape (n,); a magnitude of at least ``nearest[j]`` belongs to ``levels[j]`` or above when
            rounding to the nearest level (a tie goes up), and one below ``nearest[0]`` to zero.
        logarithmic: the same for log formats when rounding the exponent; None for all others.
        table: what a code indexes, shape (spec.packing.base,). Log: zero, the positive levels from the largest down,
            the negative ones in the same order, then zeros; mid-rise: all levels, ascending. int8 up to 4 bits, float32
            above; None where the codes are the levels.
        lowest: whether there is one more negative level, -(q + 1).
    """

    levels: Tensor
    nearest: Tensor
    logarithmic: Tensor | None = None
    table: Tensor | None = None
    lowest: bool = False

    @property
    def top(self) -> float:
        """The largest positive level."""
        return float(self.levels[-1])


def codebook(spec: WeightSpec, grid: Grid = "narrow") -> Codebook:
    """The codebook of a linear, log or ternary format of 2 to 8 bits, a linear one on ``grid``; else UsageError."""
    if spec.quantizer not in ("linear", "log", "ternary") or not 2 <= spec.bits <= 8:
        raise UsageError("a format without a codebook", expected="int2..int8, log2..log8 or ternary", got=str(spec))
    count = 2 ** (spec.bits - 1) - 1
    if spec.kind == "log":
        return _log(spec, count)
    if spec.kind == "int" and grid == "mid":
        if spec.bits > 4:
            raise UsageError("no mid-rise grid of so many bits", expected="int2..int4", got=str(spec))
        levels = torch.arange(1, 2**spec.bits, 2, dtype=torch.float64)
        return Codebook(levels, levels - 1, table=torch.cat([-levels.flip(0), levels]).to(torch.int8))
    levels = torch.arange(1, count + 1, dtype=torch.float64)
    return Codebook(levels, levels - 0.5, lowest=spec.kind == "int" and grid == "full")


def _log(spec: WeightSpec, count: int) -> Codebook:
    first = TOP_MULTIPLIER if spec.bits <= 4 else 1
    levels = first * torch.exp2(torch.arange(1 - count, 1, dtype=torch.float64))
    nearest = levels * 0.75
    nearest[0] = levels[0] * 0.5  # its lower neighbour is zero, not the next power of two
    down = levels.flip(0)
    table = torch.zeros(spec.packing.base, dtype=torch.float64)
    table[1 : count + 1] = down
    table[count + 1 : 2 * count + 1] = -down
    return Codebook(levels, nearest, levels * 0.5**0.5, table.to(torch.int8 if spec.bits <= 4 else torch.float32))
