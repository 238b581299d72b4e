"""Affine activation codes: the range, and the module that simulates QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn

from qopt.errors import DataError, UsageError

Gradient = Literal["ste", "bpda", "plain"]
"""What the backward pass sees: ``ste`` 1 inside the range and 0 outside, ``bpda`` 1 everywhere, ``plain`` the 0 that
rounding really has."""

GRADIENTS: tuple[Gradient, ...] = ("ste", "bpda", "plain")


@final
@dataclass(frozen=True)
class AffineRange:
    """Unsigned affine codes: ``x ~ (code - zero_point) * scale``, codes 0..2**bits - 1, stored in uint8.

    Attributes:
        scale: positive, a float32 number.
        zero_point: the code of 0.0, in 0..2**bits - 1.
        bits: 1 to 8.
    """

    scale: float
    zero_point: int
    bits: int

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UsageError("activation bits out of range", expected="1 to 8", got=str(self.bits))
        if not 0 <= self.zero_point <= self.largest_code:
            expected = f"0 to {self.largest_code}"
            raise UsageError("zero point out of range", expected=expected, got=str(self.zero_point))
        if not (math.isfinite(self.scale) and self.scale > 0 and _float32(self.scale) == self.scale):
            raise UsageError("not an activation scale", expected="a positive float32 number", got=repr(self.scale))

    @staticmethod
    def from_bounds(low: float, high: float, bits: int) -> AffineRange:
        """The range that covers [low, high] and 0; where nothing is below 0 the zero point is 0, so that ReLU fuses.

        A range of zero width (all zeros) gets scale 1. Raises DataError for bounds that are not finite float32 numbers
        in order.
        """
        limit = torch.finfo(torch.float32).max
        if not -limit <= low <= high <= limit:
            raise DataError("activation bounds must be finite and in order", got=f"[{low}, {high}]")
        if not 1 <= bits <= 8:
            raise UsageError("activation bits out of range", expected="1 to 8", got=str(bits))
        low, high = min(low, 0.0), max(high, 0.0)
        codes = 2**bits - 1
        width = (high - low) / codes
        scale = max(_float32(width), torch.finfo(torch.float32).tiny) if width > 0 else 1.0
        return AffineRange(scale, min(codes, round(-low / scale)), bits)

    @property
    def largest_code(self) -> int:
        """2**bits - 1."""
        return (1 << self.bits) - 1

    @property
    def low(self) -> float:
        """The smallest number that has a code, at most 0."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The largest number that has a code, at least 0."""
        return (self.largest_code - self.zero_point) * self.scale

    def quantize(self, values: Tensor) -> Tensor:
        """uint8 codes of ``values`` (float32, any shape): divide, round half to even, shift, clip."""
        return self._codes(values).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """float32 values of ``codes``."""
        return (codes.to(torch.float32) - self.zero_point) * self.scale

    def _codes(self, values: Tensor) -> Tensor:
        return (torch.round(values / self.scale) + self.zero_point).clamp(0, self.largest_code)


@final
class ActivationQuantizer(nn.Module):
    """Quantize and dequantize in float32, bit for bit as ONNX QuantizeLinear and DequantizeLinear; no parameters.

    Buffers ``scale`` (float32) and ``zero_point`` (int32), both of shape (). ``gradient`` may be changed at any time;
    ``ste`` counts a value as inside the range where its rounded code is, so the two ends themselves are inside.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, affine: AffineRange, gradient: Gradient = "ste") -> None:
        super().__init__()
        self.bits = affine.bits
        self.gradient: Gradient = gradient
        self.register_buffer("scale", torch.tensor(affine.scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(affine.zero_point, dtype=torch.int32))

    @property
    def affine(self) -> AffineRange:
        """The range that the buffers hold."""
        return AffineRange(float(self.scale), int(self.zero_point), self.bits)

    def forward(self, values: Tensor) -> Tensor:
        """Fake-quantized ``values``, same shape, float32; raises UsageError where ``gradient`` is no known mode."""
        largest = (1 << self.bits) - 1
        if self.gradient == "plain":
            return _simulate(values, self.scale, self.zero_point, largest)[0]
        if self.gradient not in GRADIENTS:
            raise UsageError("unknown gradient", expected=", ".join(GRADIENTS), got=repr(self.gradient))
        clipped = self.gradient == "ste"
        output, _inside = _StraightThrough.apply(values, self.scale, self.zero_point, largest, clipped)  # type: ignore[no-untyped-call]
        return cast(Tensor, output)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"bits={self.bits}, scale={float(self.scale):g}, zero_point={int(self.zero_point)}, {self.gradient}"


def _simulate(values: Tensor, scale: Tensor, zero_point: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    shifted = (values / scale).round_().add_(zero_point)  # in place: new pages cost more than the arithmetic
    codes = shifted.clamp(0, largest)
    inside = shifted == codes
    return codes.sub_(zero_point).mul_(scale), inside


class _StraightThrough(torch.autograd.Function):
    """The staircase forward; backward the identity, within the range only where ``clipped``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        values: Tensor, scale: Tensor, zero_point: Tensor, largest: int, clipped: bool
    ) -> tuple[Tensor, Tensor]:
        return _simulate(values, scale, zero_point, largest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.clipped = inputs[4]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _inside: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside if ctx.clipped else gradient, None, None, None, None


def _float32(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32))
