"""What the C program computes: tensors of integer codes and the steps between them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray

from qopt.quant import AffineRange

Rows = Literal["int8", "digits", "ternary", "log", "log8", "signs", "xnor"]
"""How the rows of a weight are stored and multiplied; `qopt.emit.c.weights` has the table."""


@final
@dataclass(frozen=True)
class Code:
    """Integer codes of a tensor: ``x ~ (code - zero_point) * scale``.

    Attributes:
        scale: positive float32 number.
        zero_point: the code of 0.0.
        low: the smallest code; ``high``: the largest; 0 to 255 where ``wide`` is false, else within +-2**24.
        wide: int32 codes, which only the network's output has.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    wide: bool = False

    @staticmethod
    def of(affine: AffineRange) -> Code:
        """The codes of a quantized activation."""
        return Code(affine.scale, affine.zero_point, 0, affine.largest_code)

    @property
    def bits(self) -> int:
        """Bits that the largest code needs, the one of zero included."""
        return max(self.high, self.zero_point, 1).bit_length()

    def within(self, other: Code) -> bool:
        """Whether every code is one of ``other`` and means the same there."""
        same = (self.scale, self.zero_point) == (other.scale, other.zero_point)
        return same and other.low <= self.low and self.high <= other.high

    @property
    def largest(self) -> float:
        """The largest magnitude of a number that has a code."""
        return max(self.high - self.zero_point, self.zero_point - self.low) * self.scale

    def __str__(self) -> str:
        kind = "int32" if self.wide else f"{self.bits} bits"
        return f"{kind}, scale {self.scale:.9g}, zero point {self.zero_point}"


@final
@dataclass(frozen=True)
class Tensor:
    """One tensor of one image.

    Attributes:
        name: of the ONNX value; ``shape``: without the batch axis.
        code: what its codes mean.
        root: name of the tensor whose memory it is; its own name where it is no view.
    """

    name: str
    shape: tuple[int, ...]
    code: Code
    root: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@final
@dataclass(frozen=True)
class Window:
    """Windows over planes (channels, height, width); one axis counts as height 1."""

    channels: int
    height: int
    width: int
    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_height: int = 1
    stride_width: int = 1
    dilation_height: int = 1
    dilation_width: int = 1
    pad_top: int = 0
    pad_left: int = 0

    @property
    def pixels(self) -> int:
        """Output positions."""
        return self.out_height * self.out_width


@final
@dataclass(frozen=True, eq=False)
class Part:
    """Output channels of one format.

    Attributes:
        format: the weight format, for people.
        rows: how they are stored.
        channels: int64 (rows,), the output channel of each row, ascending.
        levels: int64 (rows, taps), the integers that multiply the codes.
        packed: (rows, bytes), int8 where ``rows`` is ``int8`` or ``log8``, else uint8.
        table: int8, what a digit stands for, or None where codes are not looked up.
        bits: bits of a digit, 0 for ternary and where nothing is unpacked.
        bias: int64 (rows,) within int32, with the zero point of the input folded in.
        mantissa: the same, of the multiplier; ``shift``: int64 (rows,), 1 to 62.
    """

    format: str
    rows: Rows
    channels: NDArray[np.int64]
    levels: NDArray[np.int64]
    packed: NDArray[Any]
    table: NDArray[np.int8] | None
    bits: int
    bias: NDArray[np.int64]
    mantissa: NDArray[np.int64]
    shift: NDArray[np.int64]


@final
@dataclass(frozen=True, eq=False)
class LayerStep:
    """A convolution or a matrix product.

    Attributes:
        name: the layer; ``op``: its ONNX operator; ``groups``: of a convolution.
        window: of one group's input; None for products, whose columns are the rows of the input.
        taps: weights of one output channel.
        pixels: output positions; ``tile`` of them are worked on at a time.
        channel_stride: distance of two channels in the output; ``pixel_stride``: of two positions.
        macs: multiply-accumulates.
    """

    name: str
    op: str
    source: Tensor
    target: Tensor
    parts: tuple[Part, ...]
    window: Window | None
    groups: int
    taps: int
    pixels: int
    tile: int
    channel_stride: int
    pixel_stride: int
    macs: int

    @property
    def channels(self) -> int:
        """Output channels."""
        return sum(len(part.channels) for part in self.parts)

    @property
    def column_bytes(self) -> int:
        """Scratch for the columns of one tile."""
        return self.tile * self.taps if self.window else 0

    @property
    def bit_bytes(self) -> int:
        """Scratch for the same columns in bits, where a part multiplies by counting bits."""
        return self.tile * 4 * -(-self.taps // 32) if any(part.rows == "xnor" for part in self.parts) else 0

    @property
    def row_bytes(self) -> int:
        """Scratch for one unpacked row."""
        return self.taps if any(part.table is not None for part in self.parts) else 0

    @property
    def scratch(self) -> int:
        """Bytes of scratch memory."""
        return self.column_bytes + self.bit_bytes + self.row_bytes


@final
@dataclass(frozen=True)
class AddStep:
    """``target = round(((a - zero_a) * mantissa_a + (b - zero_b) * mantissa_b) / 2**shift) + zero``."""

    a: Tensor
    b: Tensor
    target: Tensor
    mantissas: tuple[int, int]
    shift: int


@final
@dataclass(frozen=True)
class MaxStep:
    """The largest code of each window."""

    source: Tensor
    target: Tensor
    window: Window


@final
@dataclass(frozen=True)
class AverageStep:
    """The mean of each window.

    Attributes:
        multipliers: (mantissa, shift) for each number of elements in a window from 1 on, or one for all windows.
    """

    source: Tensor
    target: Tensor
    window: Window
    multipliers: tuple[tuple[int, int], ...]


@final
@dataclass(frozen=True)
class RescaleStep:
    """The same numbers, or those within bounds, in other codes."""

    source: Tensor
    target: Tensor
    mantissa: int
    shift: int


@final
@dataclass(frozen=True)
class MoveStep:
    """Codes that lie elsewhere: a slice, or zeros around. Three axes, the first ones of length 1 where there are fewer.

    The output at i is the source at ``starts + i * steps``, or the zero point where that is outside.
    """

    source: Tensor
    target: Tensor
    starts: tuple[int, int, int]
    steps: tuple[int, int, int]

    @property
    def boxes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The three sizes of source and target."""
        source, target = ((1,) * (3 - len(t.shape)) + t.shape for t in (self.source, self.target))
        return source, target


@final
@dataclass(frozen=True)
class ConcatStep:
    """Tensors one behind the other along an axis: of each, ``blocks`` runs of equal size, brought to one code."""

    sources: tuple[Tensor, ...]
    target: Tensor
    blocks: int
    multipliers: tuple[tuple[int, int], ...]


Step = LayerStep | AddStep | MaxStep | AverageStep | RescaleStep | MoveStep | ConcatStep


def sources_of(step: Step) -> tuple[Tensor, ...]:
    """What a step reads."""
    if isinstance(step, AddStep):
        return (step.a, step.b)
    return step.sources if isinstance(step, ConcatStep) else (step.source,)


@final
@dataclass(frozen=True)
class Normalise:
    """``x sign number`` in float32, the number by channel; the sign is ``+``, ``-``, ``*`` or ``/``."""

    sign: str
    numbers: tuple[float, ...]


@final
@dataclass(frozen=True, eq=False)
class Network:
    """A network in integers: steps in the order of their execution, from ``input`` to ``output``.

    ``normalisation`` is done in float before numbers become codes of ``input``.
    """

    input: Tensor
    output: Tensor
    steps: tuple[Step, ...]
    normalisation: tuple[Normalise, ...] = ()
