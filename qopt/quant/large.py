"""Codes of large weights, some channels at a time: the search for scales needs many times the memory of its rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from qopt.quant.linear import DEAD
from qopt.quant.quantized import QuantizedWeight
from qopt.quant.rows import AnyWeight
from qopt.quant.weights import quantize_weight, quantize_whole
from qopt.spec import WeightSpec

LARGE: Final = 1 << 20
"""Weights from which on a weight is quantized in parts."""

PART: Final = 1 << 18
"""Weights in a part, as far as whole channels allow."""

_BY_ROWS: Final = frozenset({"binary", "linear", "log", "ternary"})
"""Quantizers that look at one row of a weight at a time, but for the grid that ``auto`` takes."""


def quantize_large(weight: Tensor, spec: WeightSpec, axis: int = 0, *, where: str = "weight") -> AnyWeight:
    """What `quantize_weight` returns, up to the last bit of a scale, with the memory of a part of the weight.

    Formats with one scale per tensor, with rows of several formats and of plugins are quantized as a whole. Arguments
    and errors are those of `quantize_weight`.
    """
    parts = spec.granularity != "tensor" and not spec.rows and spec.quantizer in _BY_ROWS
    if (
        not parts
        or spec.is_float
        or weight.ndim == 0
        or weight.numel() < LARGE
        or not -weight.ndim <= axis < weight.ndim
    ):
        return quantize_weight(weight, spec, axis, where=where)
    axis %= weight.ndim
    if not (spec.quantizer == "linear" and spec.scale == "mse" and spec.grid == "auto"):
        return _joined(_quantized(weight, spec, axis, where), spec, axis)
    full, error = _with_error(weight, replace(spec, grid="full"), axis, where)
    if spec.bits <= 4 and (spec.block or not _has_dead_channel(weight, axis)):
        mid, mid_error = _with_error(weight, replace(spec, grid="mid"), axis, where)
        full = mid if mid_error < error else full
    return replace(full, spec=spec)


def _with_error(weight: Tensor, spec: WeightSpec, axis: int, where: str) -> tuple[QuantizedWeight, float]:
    found, error = [], 0.0
    for chosen, part in zip(_split(weight, axis), _quantized(weight, spec, axis, where), strict=True):
        found.append(part)
        error += float((chosen.double() - part.dequantize()).square_().sum())
    return _joined(found, spec, axis), error


def _quantized(weight: Tensor, spec: WeightSpec, axis: int, where: str) -> list[QuantizedWeight]:
    return [quantize_whole(part, spec, axis, where=where) for part in _split(weight, axis)]


def _split(weight: Tensor, axis: int) -> tuple[Tensor, ...]:
    channels = weight.shape[axis]
    return torch.split(weight.detach(), max(1, PART * channels // weight.numel()), axis)


def _joined(parts: list[QuantizedWeight], spec: WeightSpec, axis: int) -> QuantizedWeight:
    zeros = [part.zero for part in parts if part.zero is not None]
    return QuantizedWeight(
        spec, torch.cat([part.codes for part in parts], axis), torch.cat([part.scale for part in parts]), axis,
        parts[0].table, torch.cat(zeros) if zeros else None,
    )  # fmt: skip


def _has_dead_channel(weight: Tensor, axis: int) -> bool:
    largest = torch.cat([part.movedim(axis, 0).flatten(1).abs().amax(1) for part in _split(weight, axis)]).double()
    return not bool((largest > DEAD * largest.max()).all())
