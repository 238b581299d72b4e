"""From a float weight to codes, by the quantizer that the format names."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.errors import CorruptModelError, UsageError
from qopt.quant.quantized import QuantizedWeight
from qopt.quant.quantizer import quantizer
from qopt.spec import WeightSpec


def quantize_weight(weight: Tensor, spec: WeightSpec, axis: int = 0, *, where: str = "weight") -> QuantizedWeight:
    """Quantize ``weight`` to ``spec``; computed in float64 on the CPU, where the result lives.

    Every weight is rounded to nearest; `Linear`, `Logarithmic`, `Binary` and `Ternary` say on which levels. The squared
    error of ``mse`` is never above that of ``max``, that of ``auto`` never above that of any grid, and quantizing the
    result again changes no value.

    Args:
        weight: any shape with at least one axis and one element.
        spec: any format but float.
        axis: the axis that counts output channels; each gets its own scale where the granularity is ``channel``.
        where: the layer's name, for errors.

    Raises:
        CorruptModelError: for NaN, infinite or empty weights.
        UsageError: for a float format, an unknown quantizer or an axis that the weight does not have.
    """
    _check(weight, spec, axis, where)
    return quantizer(spec.quantizer).quantize(weight, spec, axis % weight.ndim)


def _check(weight: Tensor, spec: WeightSpec, axis: int, where: str) -> None:
    if spec.is_float:
        raise UsageError("a float format has no codes", where=where, expected="int1..int8, log1..log8 or ternary")
    if weight.ndim == 0 or not -weight.ndim <= axis < weight.ndim:
        raise UsageError("no such channel axis", where=where, got=f"axis {axis} of shape {tuple(weight.shape)}")
    if weight.numel() == 0:
        raise CorruptModelError("an empty weight", where=where, got=f"shape {tuple(weight.shape)}")
    if not bool(torch.isfinite(weight.to(torch.float32)).all()):
        raise CorruptModelError("weights that are not finite float32 numbers", where=where)
