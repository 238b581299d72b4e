"""From a float weight to codes, by the quantizer that the format names."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qopt.errors import CorruptModelError, PlanError, UsageError
from qopt.quant.linear import DEAD
from qopt.quant.quantized import QuantizedWeight
from qopt.quant.quantizer import quantizer
from qopt.quant.rows import AnyWeight, QuantizedRows
from qopt.spec import LARGEST_BLOCK, SMALLEST_BLOCK, WeightSpec


def quantize_weight(weight: Tensor, spec: WeightSpec, axis: int = 0, *, where: str = "weight") -> AnyWeight:
    """Quantize ``weight`` to ``spec``; computed in float64 on the CPU, where the result lives.

    Every weight is rounded to nearest; `Linear`, `Logarithmic`, `Binary` and `Ternary` say on which levels. The squared
    error of ``mse`` is never above that of ``max``, that of ``auto`` never above that of any grid, and quantizing the
    result again changes no value. The channels that have one of the formats of ``rows`` are quantized as a weight of
    their own.

    Args:
        weight: any shape with at least one axis and one element.
        spec: any format but float.
        axis: the axis that counts output channels; each gets its own scale where the granularity is ``channel``, and
            one for each of its blocks where it is ``block``.
        where: the layer's name, for errors.

    Raises:
        CorruptModelError: for NaN, infinite or empty weights.
        PlanError: for rows of more or fewer channels than the weight has, and blocks that do not fill a channel.
        UsageError: for a float format, an unknown quantizer or an axis that the weight does not have.
    """
    _check(weight, spec, axis, where)
    if spec.granularity == "block":
        _check_blocks(weight.numel() // weight.shape[axis], spec, where)
    if spec.rows:
        return _quantize_rows(weight, spec, axis % weight.ndim, where)
    return quantizer(spec.quantizer).quantize(weight, spec, axis % weight.ndim)


def quantize_whole(weight: Tensor, spec: WeightSpec, axis: int = 0, *, where: str = "weight") -> QuantizedWeight:
    """`quantize_weight` for the one format that all channels have; UsageError for ``rows``."""
    quantized = quantize_weight(weight, spec, axis, where=where)
    if isinstance(quantized, QuantizedRows):
        raise UsageError("rows of several formats", where=where, expected="one format", got=str(spec))
    return quantized


def _quantize_rows(weight: Tensor, spec: WeightSpec, axis: int, where: str) -> QuantizedRows:
    channels = weight.shape[axis]
    if spec.channels != channels:
        raise PlanError(
            "a format with another number of rows than the layer has output channels", where=where,
            expected=str(channels), got=f"{spec.channels} in {spec}",
        )  # fmt: skip
    dead = _dead_channels(weight, axis)
    members = {row: torch.tensor(chosen) for row, chosen in spec.row_members.items()}
    parts = [
        _quantize_part(weight.index_select(axis, chosen.to(weight.device)), row, axis, bool(dead[chosen].any()))
        for row, chosen in members.items()
    ]
    return QuantizedRows(spec, tuple(parts), tuple(members.values()), axis)


def _quantize_part(weight: Tensor, spec: WeightSpec, axis: int, dead: bool) -> QuantizedWeight:
    """The channels of one format; where one is dead beside the whole weight, ``auto`` is not mid-rise (`Linear`)."""
    if not (dead and spec.quantizer == "linear" and spec.scale == "mse" and spec.grid == "auto"):
        return quantizer(spec.quantizer).quantize(weight, spec, axis)
    return replace(quantizer("linear").quantize(weight, replace(spec, grid="full"), axis), spec=spec)


def _dead_channels(weight: Tensor, axis: int) -> Tensor:
    largest = weight.detach().to("cpu", torch.float64).movedim(axis, 0).flatten(1).abs().amax(1)
    return largest <= DEAD * largest.max()


def _check(weight: Tensor, spec: WeightSpec, axis: int, where: str) -> None:
    if spec.is_float:
        raise UsageError("a float format has no codes", where=where, expected="int1..int8, log1..log8 or ternary")
    if weight.ndim == 0 or not -weight.ndim <= axis < weight.ndim:
        raise UsageError("no such channel axis", where=where, got=f"axis {axis} of shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise CorruptModelError("an empty weight", where=where, got=f"shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight.to(torch.float32)).all()):
        raise CorruptModelError("weights that are not finite float32 numbers", where=where)


def _check_blocks(columns: int, spec: WeightSpec, where: str) -> None:
    if columns % spec.block == 0:
        return
    fits = [n for n in range(SMALLEST_BLOCK, LARGEST_BLOCK + 1) if columns % n == 0]
    best = min(fits, key=lambda n: abs(n - spec.block), default=0)
    other = f":block{best}, or a scale per channel" if best else "a scale per channel"
    raise PlanError(
        "blocks that do not fill a channel", where=where, expected="a divisor of the number of weights per channel",
        got=f"{spec} for {columns} weights per channel", fix=f"give the layer {other}",
    )  # fmt: skip
