"""Codes of the output and behind a Relu or Clip."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qopt.emit.c.steps import Code
from qopt.emit.c.values import constant, refuse
from qopt.errors import UnsupportedModelError

WIDE = 1 << 23
"""The largest magnitude of an output code that is not quantized: float32 holds every such integer."""

TINY = 1e-20
"""Outputs that are always smaller are zero."""


def wide(largest: float) -> Code:
    """Codes of 32 bits for numbers up to ``largest`` in magnitude."""
    scale = float(np.float32(max(largest, TINY) / WIDE))
    return Code(scale, 0, -2 * WIDE, 2 * WIDE, wide=True)


def clipped(code: Code, node: ir.Node) -> Code:
    """The codes that a Relu or Clip leaves; ONNX: the upper bound wins."""
    if node.op_type == "Relu":
        return replace(code, low=max(code.low, code.zero_point))
    low, high = constant(node, 1), constant(node, 2)
    if low is None or high is None:
        raise refuse(node, "with computed bounds is not in C code")
    ends = [_code(bound[0], code) if bound else other for bound, other in ((low, code.low), (high, code.high))]
    high_code = min(max(ends[1], code.low), code.high)
    return replace(code, low=min(max(ends[0], code.low), high_code), high=high_code)


def _code(bound: float, code: Code) -> int:
    if not math.isfinite(bound) or abs(bound / code.scale) > 2 * WIDE:
        return code.low if bound < 0 else code.high
    return round(bound / code.scale) + code.zero_point


def not_quantized(name: str) -> UnsupportedModelError:
    """The error that names a tensor."""
    return UnsupportedModelError(
        "the activation is not quantized, and C code has integers only", where=f"tensor {name!r}",
        fix="quantize activations: int8, or a plan that names it",
    )  # fmt: skip
