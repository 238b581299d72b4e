"""From a float weight to codes: rounding to nearest under a max-abs or a mean-square-optimal scale."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.errors import CorruptModelError, UsageError
from qopt.quant.codebook import Codebook, codebook
from qopt.quant.quantized import QuantizedWeight
from qopt.quant.scales import max_abs_scale, mean_square_scale
from qopt.spec import WeightSpec


def quantize_weight(weight: Tensor, spec: WeightSpec, axis: int = 0, *, where: str = "weight") -> QuantizedWeight:
    """Quantize ``weight`` to ``spec``; computed in float64 on the CPU, where the result lives.

    Linear codes round to nearest (ties to even) and clip. Log codes round the exponent under a max-abs scale (Miyashita
    et al. 2016; no ratio of two float32 numbers is a tie there) and to the nearest level under a mean-square scale
    (ties away from zero). One bit is binary for both kinds: signs (zero counts as positive) times the mean magnitude.
    The squared error of ``mse`` is never above that of ``max``, and quantizing the result again changes no value.

    Args:
        weight: any shape with at least one axis and one element.
        spec: a linear or log format.
        axis: the axis that counts output channels; each gets its own scale where the granularity is ``channel``.
        where: the layer's name, for errors.

    Raises:
        CorruptModelError: for NaN, infinite or empty weights.
        UsageError: for a float format or an axis that the weight does not have.
    """
    _check(weight, spec, axis, where)
    axis %= weight.ndim
    moved = weight.detach().to("cpu", torch.float64).movedim(axis, 0)
    rows = moved.reshape(moved.shape[0] if spec.granularity == "channel" else 1, -1).contiguous()
    levels = None if spec.bits == 1 else codebook(spec)
    codes, scale = _binary(rows) if levels is None else _round(rows, spec, levels)
    return QuantizedWeight(
        spec=spec,
        codes=codes.reshape(moved.shape).movedim(0, axis).contiguous(),
        scale=scale if spec.granularity == "channel" else scale[0],
        axis=axis,
        table=None if levels is None else levels.table,
    )


def _check(weight: Tensor, spec: WeightSpec, axis: int, where: str) -> None:
    if spec.is_float:
        raise UsageError("a float format has no codes", where=where, expected="int1..int8 or log1..log8")
    if weight.ndim == 0 or not -weight.ndim <= axis < weight.ndim:
        raise UsageError("no such channel axis", where=where, got=f"axis {axis} of shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise CorruptModelError("an empty weight", where=where, got=f"shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight.to(torch.float32)).all()):
        raise CorruptModelError("weights that are not finite float32 numbers", where=where)


def _binary(rows: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.where(rows >= 0, 1, -1).to(torch.int8)
    return codes, rows.abs().mean(dim=1).to(torch.float32)


def _round(rows: Tensor, spec: WeightSpec, levels: Codebook) -> tuple[Tensor, Tensor]:
    largest = max_abs_scale(rows, levels)
    if spec.scale == "max":
        return _encode(rows, largest, levels, levels.logarithmic), largest
    scale = mean_square_scale(rows, levels)
    # what counts is the float32 product that the file computes, so the last comparison is made on it
    worse = _error(rows, scale, levels) >= _error(rows, largest, levels)
    scale = torch.where(worse, largest, scale)
    return _encode(rows, scale, levels, levels.nearest), scale


def _error(rows: Tensor, scale: Tensor, levels: Codebook) -> Tensor:
    codes = _encode(rows, scale, levels, levels.nearest)
    values = codes if levels.table is None else levels.table[codes.to(torch.int32)]
    return (rows - values.to(torch.float32) * scale[:, None]).square_().sum(dim=1)


def _encode(rows: Tensor, scale: Tensor, levels: Codebook, thresholds: Tensor | None) -> Tensor:
    """Codes of (rows, n) magnitudes: signed integers where the format has no table, else indices into the table."""
    ratio = rows / scale.to(torch.float64)[:, None]
    if levels.table is None or thresholds is None:
        return ratio.round_().clamp_(-levels.top, levels.top).to(torch.int8)
    count = len(levels.levels)
    index = torch.bucketize(ratio.abs(), thresholds, right=True, out_int32=True)
    positive = torch.cat([torch.zeros(1, dtype=torch.uint8), torch.arange(count, 0, -1).to(torch.uint8)])
    negative = torch.where(positive > 0, positive + count, 0).to(torch.uint8)
    return torch.cat([positive, negative])[index + (ratio < 0) * (count + 1)]
