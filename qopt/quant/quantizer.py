"""What a weight quantizer is: one object in the table `qopt.quantizers`, and the rows it works on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol, cast, final

import torch
from torch import Tensor

from qopt.plugins import load
from qopt.quant.quantized import QuantizedWeight
from qopt.spec import WeightSpec

GROUP = "qopt.quantizers"


class Quantizer(Protocol):
    """Turns float weights into codes. A plugin registers a class, made without arguments, under its ``name``.

    What it returns must quantize to itself, keep zero channels zero, and have the same table for the same ``spec``
    where it has one (tensors of a file share it). Formats ``name@1`` to ``name@8`` select it.
    """

    @property
    def name(self) -> str:
        """Its name in the table."""
        ...

    def quantize(self, weight: Tensor, spec: WeightSpec, axis: int) -> QuantizedWeight:
        """The codes of ``weight``: finite, with at least one element; ``axis`` is 0 or larger."""
        ...


@cache
def quantizer(name: str) -> Quantizer:
    """The quantizer called ``name``; raises UsageError that offers the nearest names."""
    return cast(Quantizer, load(GROUP, name, "weight format")())


@final
@dataclass(frozen=True, eq=False)
class Rows:
    """A weight as one row per scale.

    Attributes:
        values: float64 (scales, weights per scale), contiguous, on the CPU.
    """

    values: Tensor
    _moved: torch.Size
    _spec: WeightSpec
    _axis: int

    @staticmethod
    def of(weight: Tensor, spec: WeightSpec, axis: int) -> Rows:
        """The channels of ``weight`` along ``axis``, their blocks, or the whole as one row, as ``spec`` asks."""
        moved = weight.detach().to("cpu", torch.float64).movedim(axis, 0)
        count = {"channel": moved.shape[0], "tensor": 1, "block": moved.numel() // max(spec.block, 1)}
        values = moved.reshape(count[spec.granularity], -1).contiguous()
        return Rows(values, moved.shape, spec, axis)

    def assemble(
        self, codes: Tensor, scale: Tensor, table: Tensor | None = None, zero: Tensor | None = None
    ) -> QuantizedWeight:
        """The weight with ``codes``, in the shape of ``values``, the scales and the zero points, (scales,) each."""
        return QuantizedWeight(
            spec=self._spec,
            codes=codes.reshape(self._moved).movedim(0, self._axis).contiguous(),
            scale=self._by_channel(scale),
            axis=self._axis,
            table=table,
            zero=None if zero is None else self._by_channel(zero),
        )

    def _by_channel(self, values: Tensor) -> Tensor:
        if self._spec.granularity == "tensor":
            return values[0]
        return values if self._spec.granularity == "channel" else values.reshape(self._moved[0], -1)
