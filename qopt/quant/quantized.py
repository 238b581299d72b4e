"""A quantized weight: codes, scales, and the one rule that turns them back into numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from qopt.errors import VerificationError
from qopt.spec import Grid, WeightSpec


@final
@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight tensor in codes, as the emitted file holds it.

    Attributes:
        spec: the format.
        codes: shape of the weight. Without a table int8, the multiple of the scale itself: in [-q, q] with
            q = 2**(bits-1) - 1, also -q - 1 where the format has the full range, -1, 0 and 1 for ternary, -1 and 1 for
            1 bit. With a table uint8, an index into it.
        scale: float32; shape () per tensor or (channels,). Positive; negative where the full range's longer side is
            turned to the positive weights; zero only for a channel of zeros in a format that has no level there.
        axis: the axis of the weight that counts channels, 0 or larger.
        table: log, mid-rise and plugins: shape (spec.packing.base,), the multiples of the scale that the codes select.
            Up to 4 bits int8, so that an integer kernel takes them (log: 64 for the largest level, which is therefore
            ``64 * scale``); above 4 bits float32, with 1 for the largest level. None for all others.

    Raises:
        VerificationError: where dtypes or shapes break these rules.
    """

    spec: WeightSpec
    codes: Tensor
    scale: Tensor
    axis: int
    table: Tensor | None

    def __post_init__(self) -> None:
        if not 0 <= self.axis < self.codes.ndim:
            raise VerificationError("channel axis out of range", got=f"{self.axis} for {self.codes.ndim} axes")
        shape = (self.codes.shape[self.axis],) if self.spec.granularity == "channel" else ()
        if tuple(self.scale.shape) != shape or self.scale.dtype != torch.float32:
            got = f"{self.scale.dtype} {tuple(self.scale.shape)}"
            raise VerificationError("scales that do not fit the weight", expected=f"float32 {shape}", got=got)
        dtype = torch.int8 if self.table is None else torch.uint8
        if self.codes.dtype != dtype:
            raise VerificationError("codes of a wrong type", expected=str(dtype), got=str(self.codes.dtype))
        if self.table is not None:
            self._check_table(self.table)

    def _check_table(self, table: Tensor) -> None:
        kind = torch.int8 if self.spec.bits <= 4 else torch.float32
        if table.dtype != kind or tuple(table.shape) != (self.spec.packing.base,):
            raise VerificationError(
                "a table that does not cover every code", expected=f"{kind} ({self.spec.packing.base},)",
                got=f"{table.dtype} {tuple(table.shape)}",
            )  # fmt: skip

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def grid(self) -> Grid:
        """Which grid a linear format took; ``auto`` for formats that have no choice."""
        if self.spec.quantizer != "linear":
            return "auto"
        return "mid" if self.table is not None else "full" if self.spec.full_range else "narrow"

    def dequantize(self) -> Tensor:
        """The weight in float32: ``codes * scale`` or ``table[codes] * scale``, rounded once, as the file computes."""
        levels = self.codes if self.table is None else self.table[self.codes.to(torch.int32)]
        return levels.to(torch.float32) * self._broadcast_scale()

    def levels(self) -> tuple[Tensor, Tensor]:
        """The multiples of the scale that a code can select, float64 (n,), ascending, and the code of each, (n,).

        What any rounding method needs to know of a format, whatever its codes look like. They multiply the signed
        scale: the nearest level of a weight is that of ``weight / scale``.
        """
        if self.table is not None:
            multiples, first = np.unique(self.table.numpy().astype(np.float64), return_index=True)
            return torch.from_numpy(multiples), torch.from_numpy(first).to(self.codes.dtype)
        top = 1 if self.spec.bits == 1 else (1 << (self.spec.bits - 1)) - 1
        lowest = -top - 1 if self.spec.full_range else -top
        codes = torch.arange(lowest, top + 1, 2 if self.spec.bits == 1 else 1)
        return codes.to(torch.float64), codes.to(self.codes.dtype)

    def _broadcast_scale(self) -> Tensor:
        if self.scale.ndim == 0:
            return self.scale
        return self.scale.view([-1 if axis == self.axis else 1 for axis in range(self.codes.ndim)])
