"""Asymmetric linear formats: 2**bits levels between a lowest and a highest one, zero among them.

A code c means ``(c - zero) * scale``, zero an integer code, so that a weight of zero stays zero (Jacob et al. 2018,
equation 1). Scales have `MANTISSA` bits: every level is then exact in float32, and a weight that is quantized already
has the range of its codes to the last bit, from which the same scale and zero point follow again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

MANTISSA = 16
"""Bits of a scale; the 8 bits of a code beside them fill a float32."""

OCTAVES = 5
"""How far below the range of the weights the search looks."""

PER_OCTAVE = 8
PER_OCTAVE_SHORT = 24
"""Ranges that are tried on each octave; more for short rows, whose error is jagged."""

SHORT = 1024
"""Weights times levels of a short row."""

AT_A_TIME = 1 << 15
"""Weights that the search looks at together: what a cache holds."""

SPLITS = (0.0, 0.5, 1.0)
"""What part of that by which a range is shorter is taken off its lower end."""

REFINEMENTS = 2
"""How often the best scale for the codes, in closed form, is tried as the next scale."""


@final
@dataclass(frozen=True, eq=False)
class AsymmetricCodes:
    """Rows in codes.

    Attributes:
        codes: uint8 (rows, n).
        scale: float32 (rows,), positive.
        zero: uint8 (rows,), the code of zero.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def spanning(rows: Tensor, bits: int) -> AsymmetricCodes:
    """Codes of float64 ``rows`` (rows, n) whose levels span zero and all weights; a row of zeros has the scale 1."""
    low, high = _range(rows)
    scale = _shorter((high - low) / _top(bits), bits)
    return _coded(rows, torch.where(high > low, scale, 1.0), low, bits)


def least_squares(rows: Tensor, bits: int) -> AsymmetricCodes:
    """Codes under the scale and zero point of lowest squared error found, never above that of `spanning`.

    Shorter ranges, taken off either end or both, and of the best one the zero points beside it and the scale that is
    best for its codes.
    """
    parts = torch.split(rows, max(1, AT_A_TIME // rows.shape[1]))
    found = [_searched(part, bits) for part in parts]
    return AsymmetricCodes(
        torch.cat([part.codes for part in found]),
        torch.cat([part.scale for part in found]),
        torch.cat([part.zero for part in found]),
    )


def _searched(rows: Tensor, bits: int) -> AsymmetricCodes:
    search = _Search(rows, bits, spanning(rows, bits))
    low, high = _range(rows)
    per_octave = PER_OCTAVE_SHORT if rows.shape[1] << bits <= SHORT else PER_OCTAVE
    for step in range(1, OCTAVES * per_octave + 1):
        part = 2.0 ** (-step / per_octave)
        if search.hopeless(part):
            break
        for split in SPLITS:
            lowest = low + (high - low) * ((1 - part) * split)
            search.attempt(_shorter((high - low) * (part / _top(bits)), bits), lowest.clamp(max=0.0))
    for _ in range(REFINEMENTS):
        for shift in (0, -1, 1):
            search.refine(shift)
    return search.best


@final
class _Search:
    """The best codes so far, row by row."""

    def __init__(self, rows: Tensor, bits: int, best: AsymmetricCodes) -> None:
        self._rows, self._bits = rows, bits
        self.best, self._error = best, _errors(rows, best)

    def hopeless(self, part: float) -> bool:
        """Whether no range of ``part`` of the weights' can beat the whole, whatever the weights.

        Under the whole range no weight is off by more than half a step, and what a shorter one lacks the outermost
        weights are off by, both together.
        """
        steps = (1 - part) * _top(self._bits)
        return steps**2 / 2 > self._rows.shape[1] / 4

    def attempt(self, scale: Tensor, lowest: Tensor) -> None:
        """Take the codes under ``scale`` (rows,) with ``lowest`` on level 0 for the rows that they are better for."""
        self._keep(_coded(self._rows, scale, lowest, self._bits))

    def refine(self, shift: int) -> None:
        """Try zero points ``shift`` codes away, and under them the best scale for the codes that they give."""
        zero = (self.best.zero.to(torch.int16) + shift).clamp(0, _top(self._bits))
        moved = _under(self._rows, self.best.scale, zero, self._bits)
        multiples = moved.codes.to(torch.float64) - zero[:, None]
        gain, norm = (multiples * self._rows).sum(1), multiples.square().sum(1)
        usable = (norm > 0) & (gain > 0)
        scale = torch.where(usable, _shorter(torch.where(usable, gain / norm, 1.0), self._bits), self.best.scale)
        self._keep(moved)
        self._keep(_under(self._rows, scale, zero, self._bits))

    def _keep(self, other: AsymmetricCodes) -> None:
        error = _errors(self._rows, other)
        wins = (error < self._error) & _found_again(other, self._bits)
        if not bool(wins.any()):
            return
        self._error = torch.where(wins, error, self._error)
        self.best = AsymmetricCodes(
            torch.where(wins[:, None], other.codes, self.best.codes),
            torch.where(wins, other.scale, self.best.scale),
            torch.where(wins, other.zero, self.best.zero),
        )


def _found_again(found: AsymmetricCodes, bits: int) -> Tensor:
    """Whether the codes reach both ends, or zero is that end: `spanning` then finds them in what they stand for."""
    lowest, highest = found.codes.amin(1), found.codes.amax(1)
    below = (lowest == 0) | (found.zero == 0)
    return below & ((highest == _top(bits)) | (found.zero == _top(bits)))


def _coded(rows: Tensor, scale: Tensor, lowest: Tensor, bits: int) -> AsymmetricCodes:
    """Codes under ``scale`` with the level 0 as near to ``lowest``, not above zero, as whole zero points come."""
    zero = (-lowest / scale.to(torch.float64) + 0.5).floor().clamp(0, _top(bits))
    return _under(rows, scale, zero, bits)


def _under(rows: Tensor, scale: Tensor, zero: Tensor, bits: int) -> AsymmetricCodes:
    """The nearest codes; a tie goes away from zero, with which both ends of a range are reached, halves included."""
    ratio = rows / scale.to(torch.float64)[:, None]
    codes = (ratio.abs() + 0.5).floor_().copysign_(ratio) + zero.to(torch.float64)[:, None]
    return AsymmetricCodes(codes.clamp_(0, _top(bits)).to(torch.uint8), scale, zero.to(torch.uint8))


def _errors(rows: Tensor, found: AsymmetricCodes) -> Tensor:
    multiples = found.codes.to(torch.float64) - found.zero.to(torch.float64)[:, None]
    return (rows - multiples * found.scale.to(torch.float64)[:, None]).square_().sum(1)


def _range(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows.amin(1).clamp(max=0.0), rows.amax(1).clamp(min=0.0)


def _shorter(scale: Tensor, bits: int) -> Tensor:
    """``scale`` (rows,) cut to `MANTISSA` bits: a normal float32 number under which all levels are finite."""
    info, dropped = torch.finfo(torch.float32), 53 - MANTISSA
    pattern = scale.clamp(info.tiny, info.max / _top(bits)).view(torch.int64)
    return (pattern >> dropped << dropped).view(torch.float64).to(torch.float32)


def _top(bits: int) -> int:
    return (1 << bits) - 1
