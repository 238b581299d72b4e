"""A quantized weight whose output channels have formats of their own: one part for each format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, cast, final

import torch
from torch import Tensor

from qopt.errors import VerificationError
from qopt.quant.quantized import QuantizedWeight
from qopt.spec import Grid, WeightSpec


@final
@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """One weight tensor in codes of several formats, as the emitted file holds it.

    Attributes:
        spec: the format, of kind ``rows``.
        parts: for each format of ``spec.row_counts`` the codes and scales of its channels, along ``axis``.
        members: of each part the channels it holds, int64, ascending; every channel is in one of them.
        axis: the axis of the weight that counts channels, 0 or larger.

    Raises:
        VerificationError: where parts or members are not those of ``spec``.
    """

    spec: WeightSpec
    parts: tuple[QuantizedWeight, ...]
    members: tuple[Tensor, ...]
    axis: int

    def __post_init__(self) -> None:
        expected = self.spec.row_members
        found = {part.spec: chosen.tolist() for part, chosen in zip(self.parts, self.members, strict=True)}
        if not found or list(found.items()) != list(expected.items()):
            raise VerificationError("rows that are not those of the format", expected=str(self.spec), got=str(found))
        shapes = {(part.axis, part.shape[: self.axis], part.shape[self.axis + 1 :]) for part in self.parts}
        counts = [part.shape[self.axis] for part in self.parts]
        if len(shapes) > 1 or self.parts[0].axis != self.axis or counts != [len(m) for m in self.members]:
            got = " and ".join(str(tuple(part.shape)) for part in self.parts)
            raise VerificationError("parts that do not make up one weight", expected=f"{counts} channels", got=got)

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        first = self.parts[0].shape
        return torch.Size((*first[: self.axis], self.spec.channels, *first[self.axis + 1 :]))

    @property
    def scale(self) -> Tensor:
        """The scale of each channel, float32 (channels,)."""
        return torch.cat([part.scale for part in self.parts])[self.order]

    @property
    def order(self) -> Tensor:
        """Where each channel is when the parts lie one behind the other, int64 (channels,)."""
        behind = torch.cat(self.members)
        return torch.empty_like(behind).scatter_(0, behind, torch.arange(len(behind)))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Which grid each part took."""
        return tuple(part.grid for part in self.parts)

    def dequantize(self) -> Tensor:
        """The weight in float32, in its own shape; see `QuantizedWeight.dequantize`."""
        return self.joined([part.dequantize() for part in self.parts])

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """One tensor from one for each part, each with the part's channels along ``axis``."""
        return torch.cat(list(tensors), self.axis).index_select(self.axis, self.order)


AnyWeight = QuantizedWeight | QuantizedRows
"""What a layer's weight becomes: codes of one format, or of one for each output channel."""

Weight = TypeVar("Weight", bound=AnyWeight)
"""The one of the two that comes in and goes out."""


def parts_of(weight: AnyWeight) -> list[tuple[QuantizedWeight, Tensor]]:
    """Every part with the channels it holds, int64; a weight of one format is one part."""
    if isinstance(weight, QuantizedRows):
        return list(zip(weight.parts, weight.members, strict=True))
    return [(weight, torch.arange(weight.shape[weight.axis]))]


def with_parts(weight: Weight, parts: Sequence[QuantizedWeight]) -> Weight:
    """``weight`` with other codes and scales, in the order of `parts_of`."""
    return cast(Weight, replace(weight, parts=tuple(parts)) if isinstance(weight, QuantizedRows) else parts[0])
