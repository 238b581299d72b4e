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
        """Bytes of codes and scales; tables of levels are shared by all tensors of a format: see `table_bytes`."""
        if self.spec.is_float:
            return self.code_bytes
        return self.code_bytes + (self.channels if self.spec.granularity == "channel" else 1) * SCALE_BYTES


def table_bytes(spec: WeightSpec) -> int:
    """Bytes of the table that turns a format's codes into levels: int8, or float32 for log formats above 4 bits."""
    if spec.is_float or (spec.kind == "int" and spec.container_bits != 2):
        return 0
    if spec.container_bits == 2:
        return 256 * 4
    return (1 << spec.container_bits) * (1 if spec.bits <= 4 else 4)


def stored_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of all codes, scales and tables of a network; weights have no zero points.

    The shapes that a file spells out as integers beside them are structure, as strides are, and not counted.
    """
    items = list(tensors)
    tables = {_table(t.spec): table_bytes(t.spec) for t in items}
    return sum((t.bytes for t in items), 0) + sum(tables.values())


def _table(spec: WeightSpec) -> tuple[str, int]:
    """What tells the tables of a file apart: codes of one bit are signs in a 2-bit container, whatever their kind."""
    if spec.container_bits == 2:
        return ("int" if spec.bits == 1 else spec.kind), 2
    return spec.kind, spec.bits


def code_bits(tensors: Iterable[Stored]) -> float:
    """Container bits of the codes per weight, averaged over the network: what ``--limit "bits<=..."`` means."""
    items = list(tensors)
    total = sum(t.weights for t in items)
    return sum(t.weights * t.spec.container_bits for t in items) / total if total else 0.0


def stored_bits(tensors: Iterable[Stored]) -> float:
    """``8 * bytes(codes + scales + zero points + tables) / number of weights``: what the file costs."""
    items = list(tensors)
    total = sum(t.weights for t in items)
    return 8 * stored_bytes(items) / total if total else 0.0
