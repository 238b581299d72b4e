"""The two measures of size that every part of qopt shares: ``code_bits`` and ``stored_bits``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import final

from qopt.spec import Grid, WeightSpec

SCALE_BYTES = 4
"""A scale is one float32."""

ZERO_BYTES = 1
"""A zero point, of asymmetric weights alone, is one uint8."""


@final
@dataclass(frozen=True)
class Stored:
    """One weight tensor as the file holds it.

    Attributes:
        weights: number of weights.
        channels: number of output channels.
        spec: the format.
        grid: which grid an ``auto`` format took; ``auto`` while that is open, which counts the tables of all of them.
        order_bytes: of one part of a weight with rows: what the order of the channels takes, told of the first part.
    """

    weights: int
    channels: int
    spec: WeightSpec
    grid: Grid = "auto"
    order_bytes: int = 0

    @property
    def parts(self) -> tuple[Stored, ...]:
        """What is packed by itself: of a format with rows all channels of one format, else the weight as it is."""
        if not self.spec.rows:
            return (self,)
        total, counts = self.spec.channels, self.spec.row_counts
        order = self.channels * order_width(self.channels) if len(self.spec.rows) > len(counts) else 0
        return tuple(
            Stored(self.weights * count // total, self.channels * count // total, spec, order_bytes=0 if i else order)
            for i, (spec, count) in enumerate(counts.items())
        )

    @property
    def code_bytes(self) -> int:
        """Bytes of the packed codes, in the container that the format occupies."""
        if self.spec.rows:
            return sum(part.code_bytes for part in self.parts)
        packing = self.spec.packing
        return ceil(self.weights / packing.codes) * packing.bytes

    @property
    def code_bits(self) -> float:
        """Container bits of all codes, before the last byte is filled up."""
        return sum((part.weights * part.spec.container_bits for part in self.parts), 0)

    @property
    def bytes(self) -> int:
        """Bytes of codes, scales, zero points and the order of rows; `table_bytes` has the tables, which all share."""
        if self.spec.rows:
            return sum(part.bytes for part in self.parts)
        if self.spec.is_float:
            return self.code_bytes
        each = SCALE_BYTES + (ZERO_BYTES if self.spec.asymmetric else 0)
        return self.code_bytes + self.scales * each + self.order_bytes

    @property
    def scales(self) -> int:
        """How many scales a weight with codes of one format has."""
        if self.spec.granularity == "block":
            return ceil(self.weights / self.spec.block)
        return self.channels if self.spec.granularity == "channel" else 1


def order_width(channels: int) -> int:
    """Bytes of one number in the order of ``channels`` channels: uint8, uint16 or int32."""
    return 1 if channels <= 1 << 8 else 2 if channels <= 1 << 16 else 4


def tables(spec: WeightSpec, grid: Grid = "auto") -> dict[str, int]:
    """Name to bytes of the constants that turn a format's codes into levels; tensors share those of equal names.

    Codes that share bytes in other ways than ONNX knows need the powers of their base to be taken apart. Codes that
    are no levels themselves need a table: int8, or float32 for log formats and plugins above 4 bits.
    """
    if spec.rows:
        return {name: size for row in spec.row_counts for name, size in tables(row).items()}
    if spec.is_float:
        return {}
    base, codes, size = spec.packing
    found = {f"base{base}": 4 * (1 + codes) + (4 * size if size > 1 else 0)} if base <= 8 else {}
    return found | dict.fromkeys(_level_tables(spec, grid), base * (1 if base <= 16 else 4))


def table_bytes(spec: WeightSpec, grid: Grid = "auto") -> int:
    """Bytes of all `tables` of one format."""
    return sum(tables(spec, grid).values())


def stored_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of all codes, scales, zero points and tables of a network.

    The shapes that a file spells out as integers beside them are structure, as strides are, and not counted.
    """
    items = [part for tensor in tensors for part in tensor.parts]
    shared = {name: size for item in items for name, size in tables(item.spec, item.grid).items()}
    return sum((t.bytes for t in items), 0) + sum(shared.values())


def _level_tables(spec: WeightSpec, grid: Grid) -> list[str]:
    if spec.quantizer in ("binary", "ternary"):
        return [spec.quantizer]
    if spec.quantizer != "linear":
        return [spec.short]
    chosen = spec.grid if spec.grid != "auto" else "narrow" if spec.scale == "max" else grid
    linear = [spec.short] if spec.bits <= 3 and chosen not in ("mid", "asym") else []
    return linear + ([f"mid{spec.bits}"] if spec.bits <= 4 and chosen in ("mid", "auto") else [])


def code_bits(tensors: Iterable[Stored]) -> float:
    """Container bits of the codes per weight, averaged over the network: what ``--limit "bits<=..."`` means."""
    items = list(tensors)
    total = sum(t.weights for t in items)
    return sum(t.code_bits for t in items) / total if total else 0.0


def stored_bits(tensors: Iterable[Stored]) -> float:
    """``8 * bytes(codes + scales + zero points + tables) / number of weights``: what the file costs."""
    items = list(tensors)
    total = sum(t.weights for t in items)
    return 8 * stored_bytes(items) / total if total else 0.0
