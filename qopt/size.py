"""The two measures of size that every part of qopt shares: ``code_bits`` and ``stored_bits``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import final

from qopt.spec import WeightSpec

SCALE_BYTES = 4
"""A scale is one float32."""


@final
@dataclass(frozen=True)
class Stored:
    """One weight tensor as the file holds it: its number of weights, its output channels and its format."""

    weights: int
    channels: int
    spec: WeightSpec

    @property
    def code_bytes(self) -> int:
        """Bytes of the packed codes, in the container that the format occupies."""
        return ceil(self.weights * self.spec.container_bits / 8)

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales and, for log formats, the table of levels; zero points are not stored for weights."""
        if self.spec.is_float:
            return self.code_bytes
        scales = self.channels if self.spec.granularity == "channel" else 1
        table = 0 if self.spec.kind == "int" else 2**self.spec.container_bits * (1 if self.spec.bits <= 4 else 4)
        return self.code_bytes + scales * SCALE_BYTES + table


def code_bits(tensors: Iterable[Stored]) -> float:
    """Container bits of the codes per weight, averaged over the network: what ``--limit "bits<=..."`` means."""
    items = list(tensors)
    total = sum(t.weights for t in items)
    return sum(t.weights * t.spec.container_bits for t in items) / total if total else 0.0


def stored_bits(tensors: Iterable[Stored]) -> float:
    """``8 * bytes(codes + scales + zero points + tables) / number of weights``: what the file costs."""
    items = list(tensors)
    total = sum(t.weights for t in items)
    return 8 * sum(t.bytes for t in items) / total if total else 0.0
