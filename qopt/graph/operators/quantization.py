"""Codes: QuantizeLinear, DequantizeLinear, DynamicQuantizeLinear.

Codes that are computed are carried as whole numbers in float, so that a gradient passes through the pair as it does
through `qopt.quant.ActivationQuantizer`: straight through within the range of the codes, nothing outside it.
"""

from __future__ import annotations

from typing import Any, cast

import onnx_ir as ir
import torch
from torch import Tensor

from qopt.graph.operators.registry import Call, Op, operator
from qopt.graph.operators.types import CARRIERS, code_range
from qopt.quant import Gradient


class _StraightThrough(torch.autograd.Function):
    """Divide, round half to even, shift, clip; backward as if only divided, within the range only where ``clipped``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        values: Tensor, scale: Tensor, zero: Tensor, low: int, high: int, clipped: bool
    ) -> tuple[Tensor, Tensor]:
        shifted = torch.round(values / scale) + zero
        codes = shifted.clamp(low, high)
        return codes, shifted == codes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.clipped = inputs[5]
        ctx.save_for_backward(inputs[1], output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _inside: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        scale, inside = ctx.saved_tensors
        return (gradient * inside if ctx.clipped else gradient) / scale, None, None, None, None, None


def codes_of(
    values: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int, gradient: Gradient = "ste"
) -> Tensor:
    """Whole numbers in ``low..high`` in the type of ``values``; ``scale`` and ``zero`` broadcast to them.

    ``gradient`` as of `qopt.passes.insert_activation_quantizers.InsertActivationQuantizers`.
    """
    shift = torch.zeros((), dtype=values.dtype, device=values.device) if zero is None else zero.to(values.dtype)
    if gradient == "plain":
        return (torch.round(values / scale.detach()) + shift.detach()).clamp(low, high)
    clipped = gradient == "ste"
    codes, _inside = _StraightThrough.apply(values, scale.detach(), shift.detach(), low, high, clipped)  # type: ignore[no-untyped-call]
    return cast("Tensor", codes)


def beside(values: Tensor, codes: Tensor, axis: int, block: int = 0) -> Tensor:
    """Scales or zero points in a shape that goes with ``codes``, of any rank.

    One number goes with all of it, a vector with ``axis``, a number for each ``block`` places is repeated along it.
    """
    if values.ndim == 0 or (values.ndim == 1 and values.numel() == 1):
        return values.reshape(())
    if block:
        return values.repeat_interleave(block, axis).narrow(axis, 0, codes.shape[axis])
    if values.ndim > 1:
        return values
    shape = [1] * codes.ndim
    shape[axis] = -1
    return values.reshape(shape)


@operator("QuantizeLinear")
def quantize_linear(op: Op) -> Call:
    """To codes per tensor, per place of an axis or per block, of 2 to 16 bits."""
    low, high = code_range(_code_type(op))
    axis, block = op.integer("axis", 1), op.integer("block_size", 0)
    return Call(quantized, (op.arg(0), op.arg(1), op.optional(2), low, high, axis, block))


def _code_type(op: Op) -> ir.DataType:
    written = ir.DataType(op.integer("output_dtype", 0))
    found = op.type(2) if op.given(2) else (written or ir.DataType.UINT8)
    if found is None or not found.is_integer() or found not in CARRIERS:
        raise op.refuse(f"to codes of type {found}")
    return found


def quantized(
    x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int, axis: int, block: int,
    gradient: Gradient = "ste",
) -> Tensor:  # fmt: skip
    """Codes of ``x`` in float: ``round(x / scale) + zero``, clipped to ``low..high``."""
    values = x if x.dtype == torch.float64 else x.to(torch.float32)
    steps = beside(scale, x, axis, block).to(values.dtype)
    shift = None if zero is None else beside(zero, x, axis, block)
    return codes_of(values, steps, shift, low, high, gradient)


@operator("DequantizeLinear")
def dequantize_linear(op: Op) -> Call:
    """From codes per tensor, per place of an axis or per block."""
    found = op.type(0)
    if found is not None and found not in CARRIERS:
        raise op.refuse(f"of codes of type {found}")
    wanted = ir.DataType(op.integer("output_dtype", 0))
    if wanted and wanted not in CARRIERS:
        raise op.refuse(f"to {wanted}")
    axis, block = op.integer("axis", 1), op.integer("block_size", 0)
    dtype = CARRIERS[wanted] if wanted else None
    return Call(dequantized, (op.arg(0), op.arg(1), op.optional(2), axis, block, dtype))


def dequantized(
    codes: Tensor, scale: Tensor, zero: Tensor | None, axis: int, block: int, dtype: torch.dtype | None
) -> Tensor:
    """``(codes - zero) * scale`` in the type of the scale, or in ``dtype``."""
    kind = torch.float64 if scale.dtype == torch.float64 else torch.float32
    values = codes.to(kind)
    if zero is not None:
        values = values - beside(zero, codes, axis, block).to(kind)
    return (values * beside(scale, codes, axis, block).to(kind)).to(dtype or scale.dtype)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(op: Op) -> Call:
    """uint8 codes of the range that the tensor itself has, its scale and its zero point."""
    return Call(quantized_by_own_range, (op.arg(0),), parts=True)


def quantized_by_own_range(x: Tensor, gradient: Gradient = "ste") -> tuple[Tensor, Tensor, Tensor]:
    """Codes in float, scale and zero point of ``x``; the latter two pass no gradient."""
    low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
    width = (high - low) / 255
    scale = torch.where(width > 0, width, torch.ones_like(width))
    zero = torch.round((-low / scale).clamp(0, 255))
    return codes_of(x, scale, zero, 0, 255, gradient), scale, zero.to(torch.uint8)
