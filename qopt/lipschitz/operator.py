"""What a layer does with its weight: the linear map whose norm is asked for, and its geometry axis by axis."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NoReturn, final

from qopt.errors import UsageError

Kind = Literal["linear", "convolution", "transposed", "embedding"]
PaddingMode = Literal["zeros", "reflect", "circular"]


@final
@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution; of a transposed one, of the convolution that it is the adjoint of.

    Attributes:
        kernel: taps along the axis.
        stride: pixels from one output to the next.
        dilation: pixels from one tap to the next.
        before: padded pixels before the image; ``after``: behind it.
        mode: what the padding holds.
        size: pixels of the convolution's input, without padding; None for any.
        outputs: pixels of the convolution's output; None where ``size`` is.
    """

    kernel: int
    stride: int
    dilation: int
    before: int
    after: int
    mode: PaddingMode
    size: int | None
    outputs: int | None

    @property
    def extent(self) -> int:
        """Pixels from the first to the last tap, both included."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def phases(self) -> int:
        """Residues of pixels modulo the stride that the taps fall on."""
        return self.stride // math.gcd(self.stride, self.dilation)

    @property
    def taps(self) -> int:
        """Most taps on one residue: the length of the kernel that each phase of the image meets."""
        return -(-self.kernel // self.phases)

    @property
    def copies(self) -> int:
        """How often padding by reflection or wrapping may show one pixel; 1 for zeros."""
        if self.mode == "zeros" or self.before + self.after == 0:
            return 1
        if self.size is None:
            return 1 + (self.before > 0) + (self.after > 0)
        shown = [0] * self.size
        for pixel in self.pixels():
            shown[pixel] += 1
        return max(shown)

    def padded(self) -> Axis:
        """The axis without its padding, over the padded image; with zeros as they are."""
        if self.mode == "zeros":
            return self
        size = None if self.size is None else self.size + self.before + self.after
        return replace(self, before=0, after=0, mode="zeros", size=size)

    def pixels(self) -> list[int]:
        """The pixel that each place of the padded image shows, -1 for a zero; ``size`` must be known."""
        assert self.size is not None
        places = range(-self.before, self.size + self.after)
        if self.mode == "zeros":
            return [p if 0 <= p < self.size else -1 for p in places]
        if self.mode == "circular":
            return [p % self.size for p in places]
        last = self.size - 1
        return [last - abs(last - abs(p)) for p in places]


@final
@dataclass(frozen=True)
class Operator:
    """How a layer applies its weight to one image, vector or word.

    Attributes:
        kind: ``linear`` (weight (out, in), or (in, out) with ``axis`` 1), ``convolution`` (out, in / groups, *kernel)
            over one or two axes, ``transposed`` (in, out / groups, *kernel), ``embedding`` (words, width).
        axis: the axis of a linear layer's weight that counts outputs.
        groups: independent blocks of channels.
        stride, dilation, output_padding: one number per spatial axis; empty for 1, 1 and 0.
        padding: (before, after) per spatial axis, empty for none; a transposed convolution crops by it.
        padding_mode: what the padding holds; a transposed convolution has zeros only.
        size: spatial size of the layer's input; None for the supremum over all sizes.

    Raises:
        UsageError: for numbers out of range.
    """

    kind: Kind = "linear"
    axis: int = 0
    groups: int = 1
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    output_padding: tuple[int, ...] = ()
    padding_mode: PaddingMode = "zeros"
    size: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        least_one = (self.groups, *self.stride, *self.dilation, *(self.size or ()))
        least_zero = (*self.output_padding, *(p for pair in self.padding for p in pair))
        if min(least_one) < 1 or min(least_zero, default=0) < 0 or self.axis not in (0, 1):
            raise UsageError("an operator with numbers out of range", got=str(self))
        if self.kind == "transposed" and self.padding_mode != "zeros":
            raise UsageError("a transposed convolution pads with zeros only", got=self.padding_mode)
        if self.output_padding and self.kind != "transposed":
            raise UsageError("only a transposed convolution has an output padding", got=self.kind)

    @property
    def is_convolution(self) -> bool:
        """Whether the weight has spatial axes."""
        return self.kind in ("convolution", "transposed")

    def axes(self, shape: tuple[int, ...], *, where: str = "weight") -> tuple[Axis, Axis]:
        """The two spatial axes of a convolution's weight of ``shape``; one axis becomes the second of two.

        Raises:
            UsageError: for a weight that the operator does not fit, and an image too small for it.
        """
        spatial = len(shape) - 2
        facts = (self.stride, self.dilation, self.padding, self.output_padding, self.size or ())
        if spatial not in (1, 2) or any(fact and len(fact) != spatial for fact in facts):
            _refuse("an operator whose axes are not those of the weight", self, shape, where)
        if shape[0] % self.groups:
            _refuse("groups that do not divide the channels", self, shape, where)
        axes = tuple(self._axis(index, kernel, shape, where) for index, kernel in enumerate(shape[2:]))
        return (Axis(1, 1, 1, 0, 0, "zeros", 1, 1), axes[0]) if spatial == 1 else (axes[0], axes[1])

    def _axis(self, index: int, kernel: int, shape: tuple[int, ...], where: str) -> Axis:
        stride = self.stride[index] if self.stride else 1
        dilation = self.dilation[index] if self.dilation else 1
        before, after = self.padding[index] if self.padding else (0, 0)
        extra = self.output_padding[index] if self.output_padding else 0
        if extra >= max(stride, dilation):
            _refuse("an output padding that reaches stride and dilation", self, shape, where)
        if self.size is None:
            return Axis(kernel, stride, dilation, before, after, self.padding_mode, None, None)
        size, extent = self.size[index], dilation * (kernel - 1) + 1
        if self.kind == "transposed":
            size, outputs = (size - 1) * stride + extent + extra - before - after, size
        else:
            outputs = (size + before + after - extent) // stride + 1
        most = {"zeros": math.inf, "reflect": size - 1, "circular": size}[self.padding_mode]
        if size < 1 or outputs < 1 or max(before, after) > most:
            _refuse("an image too small for the layer", self, shape, where)
        return Axis(kernel, stride, dilation, before, after, self.padding_mode, size, outputs)


def _refuse(what: str, operator: Operator, shape: tuple[int, ...], where: str) -> NoReturn:
    raise UsageError(what, where=where, got=f"weight {shape} in {operator}")
