"""A quantized weight: codes, scales, and the one rule that turns them back into numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from torch import Tensor

from qopt.errors import VerificationError
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight tensor in codes, as the emitted file holds it.

    Attributes:
        spec: the format.
        codes: shape of the weight. Linear, and every 1-bit format: int8, the signed integer itself, in [-q, q] with
            q = 2**(bits-1) - 1, or -1 and 1 for 1 bit. Log of 2 bits and more: uint8, an index into ``table``.
        scale: float32, positive (zero only for a 1-bit channel of zeros); shape () per tensor or (channels,).
        axis: the axis of the weight that counts channels, 0 or larger.
        table: log of 2 bits and more: shape (2**container_bits,), the multiples of the scale that the codes select.
            Up to 4 bits int8, with 64 for the largest level (which is therefore ``64 * scale``), so that an integer
            kernel takes them; above 4 bits float32, with 1 for the largest level. None otherwise.

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
        if self.table is not None and tuple(self.table.shape) != (2**self.spec.container_bits,):
            raise VerificationError(
                "a table that does not cover every code", expected=str(2**self.spec.container_bits),
                got=str(tuple(self.table.shape)),
            )  # fmt: skip

    def dequantize(self) -> Tensor:
        """The weight in float32: ``codes * scale`` or ``table[codes] * scale``, rounded once, as the file computes."""
        levels = self.codes if self.table is None else self.table[self.codes.to(torch.int32)]
        return levels.to(torch.float32) * self._broadcast_scale()

    def levels(self) -> tuple[Tensor, Tensor]:
        """The multiples of the scale that a code can select, float64 (n,), ascending, and the code of each, (n,).

        What any rounding method needs to know of a format, whatever its codes look like.
        """
        if self.table is not None:
            multiples, first = np.unique(self.table.numpy().astype(np.float64), return_index=True)
            return torch.from_numpy(multiples), torch.from_numpy(first).to(self.codes.dtype)
        top = 1 if self.spec.bits == 1 else (1 << (self.spec.bits - 1)) - 1
        codes = torch.arange(-top, top + 1, 2 if self.spec.bits == 1 else 1)
        return codes.to(torch.float64), codes.to(self.codes.dtype)

    def _broadcast_scale(self) -> Tensor:
        if self.scale.ndim == 0:
            return self.scale
        return self.scale.view([-1 if axis == self.axis else 1 for axis in range(self.codes.ndim)])
