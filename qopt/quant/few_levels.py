"""Formats of two and three levels: signs, and signs with a zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from qopt.quant.codebook import codebook
from qopt.quant.nearest import best_scale, encode
from qopt.quant.quantized import QuantizedWeight
from qopt.quant.quantizer import Rows
from qopt.quant.scales import max_abs_scale, mean_square_scale
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class Binary:
    """Codes of ``int1`` and ``log1``: signs (zero counts as positive) times the mean magnitude, whatever the scale."""

    name: str = "binary"

    def quantize(self, weight: Tensor, spec: WeightSpec, axis: int) -> QuantizedWeight:
        """Quantize along ``axis``; see `quantize_weight`."""
        rows = Rows.of(weight, spec, axis)
        codes = torch.where(rows.values >= 0, 1, -1).to(torch.int8)
        return rows.assemble(codes, rows.values.abs().mean(dim=1).to(torch.float32))


@final
@dataclass(frozen=True)
class Ternary:
    """Codes of ``ternary``: -1, 0 and 1. The mean-square scale is the exact optimum (Li and Liu 2016)."""

    name: str = "ternary"

    def quantize(self, weight: Tensor, spec: WeightSpec, axis: int) -> QuantizedWeight:
        """Quantize along ``axis``; see `quantize_weight`."""
        rows, levels = Rows.of(weight, spec, axis), codebook(spec)
        scale = max_abs_scale(rows.values, levels)
        if spec.scale == "mse":
            best = mean_square_scale(rows.values, levels, blocks=spec.block > 0)
            scale, _ = best_scale(rows.values, [best, scale], levels)
        return rows.assemble(encode(rows.values, scale, levels), scale)
