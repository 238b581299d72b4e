"""The levels of a weight format: which multiples of the scale its codes can represent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.errors import UsageError
from qopt.spec import WeightSpec

TOP_MULTIPLIER = 64
"""The largest entry of an int8 table of powers of two: small enough for saturating 8-bit kernels."""


@final
@dataclass(frozen=True, eq=False)
class Codebook:
    """The positive levels of a symmetric format of 2 to 8 bits; zero and the negatives follow.

    Attributes:
        levels: float64, shape (n,), ascending multiples of the scale: 1..q for linear, powers of two for log.
        nearest: float64, shape (n,); a magnitude of at least ``nearest[j]`` belongs to ``levels[j]`` or above when
            rounding to the nearest level (a tie goes up), and one below ``nearest[0]`` to zero.
        logarithmic: the same for log formats when rounding the exponent; None for linear formats.
        table: what a log code indexes, shape (2**container_bits,): zero, the positive levels from the largest down,
            the negative ones in the same order, then zeros. int8 up to 4 bits, float32 above; None for linear formats.
    """

    levels: Tensor
    nearest: Tensor
    logarithmic: Tensor | None
    table: Tensor | None

    @property
    def top(self) -> float:
        """The largest level."""
        return float(self.levels[-1])


def codebook(spec: WeightSpec) -> Codebook:
    """The codebook of a linear or log format of 2 to 8 bits; UsageError for any other, binary formats included."""
    if spec.kind == "float" or not 2 <= spec.bits <= 8:
        raise UsageError("a format without a codebook", expected="int2..int8 or log2..log8", got=str(spec))
    count = 2 ** (spec.bits - 1) - 1
    if spec.kind == "int":
        levels = torch.arange(1, count + 1, dtype=torch.float64)
        return Codebook(levels, levels - 0.5, None, None)
    first = TOP_MULTIPLIER if spec.bits <= 4 else 1
    levels = first * torch.exp2(torch.arange(1 - count, 1, dtype=torch.float64))
    nearest = levels * 0.75
    nearest[0] = levels[0] * 0.5  # its lower neighbour is zero, not the next power of two
    return Codebook(levels, nearest, levels * 0.5**0.5, _table(levels, spec))


def _table(levels: Tensor, spec: WeightSpec) -> Tensor:
    down = levels.flip(0)
    table = torch.zeros(2**spec.container_bits, dtype=torch.float64)
    table[1 : len(down) + 1] = down
    table[len(down) + 1 : 2 * len(down) + 1] = -down
    return table.to(torch.int8 if spec.bits <= 4 else torch.float32)
