"""Log formats: powers of two under one scale per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from qopt.quant.codebook import codebook
from qopt.quant.nearest import best_scale, encode
from qopt.quant.quantized import QuantizedWeight
from qopt.quant.quantizer import Rows
from qopt.quant.scales import max_abs_scale, mean_square_scale
from qopt.spec import WeightSpec


@final
@dataclass(frozen=True)
class Logarithmic:
    """Codes of ``log2`` to ``log8``.

    The exponent is rounded under a max-abs scale (Miyashita et al. 2016; no ratio of two float32 numbers is a tie
    there), and the nearest level taken under a mean-square scale (ties away from zero).
    """

    name: str = "log"

    def quantize(self, weight: Tensor, spec: WeightSpec, axis: int) -> QuantizedWeight:
        """Quantize along ``axis``; see `quantize_weight`."""
        rows, levels = Rows.of(weight, spec, axis), codebook(spec)
        scale = max_abs_scale(rows.values, levels)
        if spec.scale == "max":
            return rows.assemble(encode(rows.values, scale, levels, levels.logarithmic), scale, levels.table)
        best = mean_square_scale(rows.values, levels, blocks=spec.block > 0)
        scale, _ = best_scale(rows.values, [best, scale], levels)
        return rows.assemble(encode(rows.values, scale, levels), scale, levels.table)
