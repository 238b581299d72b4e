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
            1 bit. With a table uint8, an index into it. Asymmetric uint8, 0 to 2**bits - 1.
        scale: float32; shape () per tensor, (channels,), or (channels, blocks) for consecutive blocks of ``spec.block``
            weights of a channel. Positive; negative where the full range's longer side is turned to the positive
            weights; zero only for a channel or block of zeros in a format that has no level there.
        axis: the axis of the weight that counts channels, 0 or larger.
        table: log, mid-rise and plugins: shape (spec.packing.base,), the multiples of the scale that the codes select.
            Up to 4 bits int8, so that an integer kernel takes them (log: 64 for the largest level, which is therefore
            ``64 * scale``); above 4 bits float32, with 1 for the largest level. None for all others.
        zero: asymmetric: uint8, shape of ``scale``, the code that stands for zero. None for all others.

    Raises:
        VerificationError: where dtypes or shapes break these rules.
    """

    spec: WeightSpec
    codes: Tensor
    scale: Tensor
    axis: int
    table: Tensor | None
    zero: Tensor | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.axis < self.codes.ndim:
            raise VerificationError("channel axis out of range", got=f"{self.axis} for {self.codes.ndim} axes")
        shape = self._scale_shape()
        if tuple(self.scale.shape) != shape or self.scale.dtype != torch.float32:
            got = f"{self.scale.dtype} {tuple(self.scale.shape)}"
            raise VerificationError("scales that do not fit the weight", expected=f"float32 {shape}", got=got)
        dtype = torch.int8 if self.table is None and self.zero is None else torch.uint8
        if self.codes.dtype != dtype:
            raise VerificationError("codes of a wrong type", expected=str(dtype), got=str(self.codes.dtype))
        if self.table is not None:
            self._check_table(self.table)
        if self.zero is not None or self.spec.asymmetric:
            self._check_zero()

    def _scale_shape(self) -> tuple[int, ...]:
        if self.spec.granularity == "tensor":
            return ()
        channels = self.codes.shape[self.axis]
        if self.spec.granularity == "channel":
            return (channels,)
        columns = self.codes.numel() // max(channels, 1)
        if columns % self.spec.block:
            got = f"{columns} weights per channel"
            raise VerificationError("blocks that do not fill the channels", expected=str(self.spec), got=got)
        return (channels, columns // self.spec.block)

    def _check_zero(self) -> None:
        zero, largest = self.zero, (1 << self.spec.bits) - 1
        fits = zero is not None and zero.dtype == torch.uint8 and zero.shape == self.scale.shape
        if zero is None or not fits or not self.spec.asymmetric or self.table is not None:
            got = "none" if zero is None else f"{zero.dtype} {tuple(zero.shape)}"
            expected = f"uint8 {tuple(self.scale.shape)} for asymmetric formats, none for all others"
            raise VerificationError(f"zero points that do not fit {self.spec}", expected=expected, got=got)
        if max(int(zero.max()), int(self.codes.max())) > largest:
            raise VerificationError(f"codes or zero points that {self.spec} does not have", expected=f"0..{largest}")

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
        if self.zero is not None:
            return "asym"
        return "mid" if self.table is not None else "full" if self.spec.full_range else "narrow"

    def dequantize(self) -> Tensor:
        """The weight in float32, rounded once, as the file computes.

        It is ``codes * scale``, ``table[codes] * scale`` or ``(codes - zero) * scale``.
        """
        if self.zero is not None:
            levels = self.codes.to(torch.int16) - self.spread(self.zero.to(torch.int16))
        else:
            levels = self.codes if self.table is None else self.table[self.codes.to(torch.int32)]
        return levels.to(torch.float32) * self.spread(self.scale)

    def levels(self) -> tuple[Tensor, Tensor]:
        """The multiples of the scale that a code can select, float64 (n,), ascending, and the code of each, (n,).

        What any rounding method needs to know of a format, whatever its codes look like. They multiply the signed
        scale: the nearest level of a weight is that of ``weight / scale``; of asymmetric formats, whose levels count
        from the zero point, that of ``weight / scale + zero``.
        """
        if self.zero is not None:
            codes = torch.arange(1 << self.spec.bits)
            return codes.to(torch.float64), codes.to(torch.uint8)
        if self.table is not None:
            multiples, first = np.unique(self.table.numpy().astype(np.float64), return_index=True)
            return torch.from_numpy(multiples), torch.from_numpy(first).to(self.codes.dtype)
        top = 1 if self.spec.bits == 1 else (1 << (self.spec.bits - 1)) - 1
        lowest = -top - 1 if self.spec.full_range else -top
        codes = torch.arange(lowest, top + 1, 2 if self.spec.bits == 1 else 1)
        return codes.to(torch.float64), codes.to(self.codes.dtype)

    def spread(self, values: Tensor) -> Tensor:
        """One of ``values`` for each weight: what has the shape of ``scale``, in a shape that goes with the codes."""
        if values.ndim == 0:
            return values
        if values.ndim == 1:
            return values.view([-1 if axis == self.axis else 1 for axis in range(self.codes.ndim)])
        moved = self.codes.movedim(self.axis, 0).shape
        return values.repeat_interleave(self.spec.block, 1).reshape(moved).movedim(0, self.axis)
