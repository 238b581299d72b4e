"""Intervals of spectral norms at a fraction of their cost: float32 arithmetic, its rounding accounted for.

With u = 2^-24 a sum of n products in float32, in any order, is off by at most ``n u / (1 - n u)`` of the sum of their
magnitudes (Higham 2002, equation 3.1); each bound adds some units for the steps around it. Gershgorin's discs, the row
sums of the whole Gram matrix, are left out: they come after most of the work of its eigenvalues and are never tighter.
Products are numpy's: those of torch may be told to round more coarsely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from qopt.errors import CorruptModelError
from qopt.lipschitz.spectral import top_eigenvalues

UNIT = 2.0**-24
"""Of float32's rounding."""

SPARE = 64
"""Units beside those of the longest sum."""

STEPS = 4
"""Steps of the power method."""

HOPELESS = 2.0
"""After two steps a threshold so many times above what was found is not reached."""

LONGEST = 1 << 20
"""Rows and columns up to which the units of a sum are no more than a tenth short of the bound."""

CHUNK = 512
"""Columns of a product in float32; products of chunks add up in float64, which keeps the Gram matrix to 1 in 30000."""

BLOCK = 64
"""Rows of a block."""

SAFE = (2.0**-20, 2.0**20)
"""Largest entries between which no square of a square leaves float32."""


@final
@dataclass(frozen=True)
class Coarse:
    """Matrices in float32, no more rows than columns, each entry off by at most one unit of it.

    Attributes:
        matrices: (groups, rows, columns).
        scale: the power of two that they were divided by.
    """

    matrices: Tensor
    scale: float

    @staticmethod
    def of(weight: Tensor, other: Tensor | None, where: str) -> Coarse:
        """``weight - other`` in float32; raises CorruptModelError for entries that are not finite."""
        single = weight.dtype == torch.float32 and (other is None or other.dtype == torch.float32)
        if other is None:
            matrices = weight.detach()
        else:
            matrices = weight.detach() - other if single else weight.detach().double() - other
        least, most = torch.aminmax(matrices)
        largest = max(-float(least), float(most))
        if not (math.isfinite(float(least)) and largest <= torch.finfo(torch.float32).max):
            raise CorruptModelError("entries that are not finite float32 numbers", where=where)
        scale = 1.0
        if largest and not SAFE[0] < largest < SAFE[1]:
            exponent = math.frexp(largest)[1]
            half, scale = exponent // 2, 2.0**exponent
            matrices = matrices.double() * 2.0**-half * 2.0 ** (half - exponent)
        matrices = matrices.float()
        return Coarse(matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT.contiguous(), scale)

    @cached_property
    def _lengths(self) -> Tensor:
        lengths: Tensor = torch.linalg.vector_norm(self.matrices, dim=2)
        return lengths.double()

    def frobenius(self) -> float:
        """The largest Frobenius norm from above."""
        return self.scale * self._frobenius

    @cached_property
    def _frobenius(self) -> float:
        return float(self._lengths.square().sum(dim=1).max().sqrt()) * (1 + self._slack)

    @property
    def _slack(self) -> float:
        return 1.1 * (self.matrices.shape[2] + self.matrices.shape[1] + SPARE) * UNIT

    def schur(self) -> float:
        """``sqrt(||A||_1 ||A||_inf)`` from above, at least the spectral norm."""
        magnitudes = self.matrices.abs()
        rows, columns = magnitudes.sum(dim=2).amax(dim=1).double(), magnitudes.sum(dim=1).amax(dim=1).double()
        return self.scale * float((rows * columns).max().sqrt()) * (1 + self._slack)

    def stretch(self, threshold: float) -> float:
        """The largest ``||A v|| / ||v||`` from below, v a few steps of the power method from the longest rows.

        Ends once it is above ``threshold``, or hopelessly below.
        """
        matrices = self.matrices.numpy()
        vectors = matrices[np.arange(len(matrices)), self._lengths.argmax(dim=1).numpy()]
        best, wanted = 0.0, threshold / self.scale
        for step in range(STEPS):
            lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
            images = matrices @ vectors[:, :, None]
            lengths = np.maximum(np.linalg.norm(vectors.astype(np.float64), axis=1), 0.5)
            found = float((np.linalg.norm(images[:, :, 0].astype(np.float64), axis=1) / lengths).max())
            best = max(best, found * (1 - SPARE * UNIT) - self._slack * self._frobenius)
            if best > wanted or (step and found * HOPELESS < wanted):
                break
            vectors = (images.swapaxes(1, 2) @ matrices)[:, 0]
        return self.scale * best

    def blocks_may_tell(self, lower: float, threshold: float) -> bool:
        """Whether bounds from blocks of rows of a matrix with a flat spectrum could be as low as the threshold.

        With b blocks they are near ``sqrt(b)`` times ``(1 + sqrt(r / n)) / (1 + sqrt(m / n))`` of the norm, the norms
        of independent entries in r and in all m of n columns.
        """
        _, rows, columns = self.matrices.shape
        if rows < 2 * BLOCK:
            return False
        part = (1 + math.sqrt(BLOCK / columns)) / (1 + math.sqrt(rows / columns))
        return lower * math.sqrt(rows / BLOCK) * part <= threshold

    def blocks(self) -> float:
        """``sqrt(sum ||A_i||^2)`` over blocks of rows from above, by their Gram matrices."""
        _, rows, columns = self.matrices.shape
        total = np.zeros(len(self.matrices))
        for first in range(0, rows, BLOCK):
            part = self.matrices[:, first : first + BLOCK].numpy()
            squares = self._lengths[:, first : first + BLOCK].square().sum(dim=1).numpy()
            grams = (part @ part.swapaxes(1, 2)).astype(np.float64)
            total += np.maximum(np.linalg.eigvalsh(grams)[:, -1], 0.0)
            total += 1.1 * (columns + SPARE) * UNIT * squares * (1 + self._slack) ** 2
        return self.scale * math.sqrt(float(total.max())) * (1 + (rows + SPARE) * UNIT)

    def gram(self) -> tuple[float, float]:
        """Both ends from the eigenvalues of the whole Gram matrices; nothing where float64 costs no more."""
        _, rows, columns = self.matrices.shape
        if rows < 2 * BLOCK:
            return 0.0, math.inf
        low = high = 0.0
        for matrix, lengths in zip(self.matrices.numpy(), self._lengths, strict=True):
            total = np.zeros((rows, rows))
            for first in range(0, columns, CHUNK):
                part = matrix[:, first : first + CHUNK]
                total += part @ part.T
            value = top_eigenvalues(torch.from_numpy(total)[None])[0]
            slack = 1.1 * (CHUNK + SPARE) * UNIT * float(lengths.square().sum()) * (1 + self._slack) ** 2
            low, high = max(low, value - slack), max(high, value + slack)
        spare = (rows + SPARE) * UNIT * 2.0**-20
        return self.scale * math.sqrt(low) * (1 - spare), self.scale * math.sqrt(high) * (1 + spare)
