"""Affine maps of one image: what interval and backward bounds need to know of a convolution, a product, a pool.

Every map takes a batch (n, *source shape). Rounding is counted in `terms`: in float32, whatever the order of the sum,
a computed output is off by at most ``gamma(terms) (|W| |x| + |b|)`` with ``gamma(k) = k u / (1 - k u)``, u = 2**-24
(Higham 2002, section 3.1). The reverse product A W, in float32 as well, is off by ``gamma(back_terms) |A| |W|``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Protocol, Self, final

import torch
from torch import Tensor
from torch.nn.grad import conv1d_input, conv2d_input, conv3d_input

Shape = tuple[int, ...]

_CONV: Final[dict[int, Any]] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
_CONV_INPUT: Final[dict[int, Any]] = {1: conv1d_input, 2: conv2d_input, 3: conv3d_input}


class Map(Protocol):
    """``y = W x + b`` with a linear W that is never written down."""

    @property
    def offset(self) -> Tensor | None:
        """b in float64, of a shape that broadcasts to one image's output; None for zero."""
        ...

    @property
    def terms(self) -> int:
        """Roundings of one output in float32; 0 where elements only move."""
        ...

    @property
    def back_terms(self) -> int:
        """Roundings of one element of A W."""
        ...

    def product(self, x: Tensor) -> Tensor:
        """W x of (n, *source), in the type of ``x``."""
        ...

    def adjoint(self, rows: Tensor) -> Tensor:
        """A W of rows (n, *output): (n, *source), in the type of ``rows``."""
        ...

    def magnitude(self) -> Self:
        """The map with every entry of W replaced by its size and no offset."""
        ...


def image(map_: Map, x: Tensor) -> Tensor:
    """``W x + b`` of (n, *source)."""
    y = map_.product(x)
    return y if map_.offset is None else y + map_.offset.to(y.dtype)


@final
@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution with zero padding, the same at both ends of an axis; weight float64 (out, in/groups, *kernel)."""

    weight: Tensor
    offset: Tensor | None
    source: Shape
    stride: Shape
    padding: Shape
    dilation: Shape
    groups: int

    @property
    def terms(self) -> int:
        """One per weight that reaches an output channel, and the bias."""
        return prod(self.weight.shape[1:]) + 1

    @property
    def back_terms(self) -> int:
        """One per weight that an input channel meets."""
        return prod(self.weight.shape[2:]) * self.weight.shape[0] // self.groups

    def product(self, x: Tensor) -> Tensor:
        """The convolution without its bias."""
        weight, axes = self.weight.to(x.dtype), len(self.stride)
        result: Tensor = _CONV[axes](x, weight, None, self.stride, self.padding, self.dilation, self.groups)
        return result

    def adjoint(self, rows: Tensor) -> Tensor:
        """The transposed convolution."""
        size, weight = (len(rows), *self.source), self.weight.to(rows.dtype)
        options = (self.stride, self.padding, self.dilation, self.groups)
        result: Tensor = _CONV_INPUT[len(self.stride)](size, weight, rows, *options)
        return result

    def magnitude(self) -> Convolution:
        """With ``|weight|``."""
        return self.with_weight(self.weight.abs())

    def with_weight(self, weight: Tensor) -> Convolution:
        """The same geometry with another weight and no bias."""
        return Convolution(weight, None, self.source, self.stride, self.padding, self.dilation, self.groups)


@final
@dataclass(frozen=True, eq=False)
class Product:
    """A matrix, float64 (outputs, inputs), on the last axis."""

    weight: Tensor
    offset: Tensor | None

    @property
    def terms(self) -> int:
        """One per input, and the bias."""
        return self.weight.shape[1] + 1

    @property
    def back_terms(self) -> int:
        """One per output."""
        return self.weight.shape[0]

    def product(self, x: Tensor) -> Tensor:
        """``x @ weight.T``."""
        return x @ self.weight.to(x.dtype).T

    def adjoint(self, rows: Tensor) -> Tensor:
        """``rows @ weight``."""
        return rows @ self.weight.to(rows.dtype)

    def magnitude(self) -> Product:
        """With ``|weight|``."""
        return self.with_weight(self.weight.abs())

    def with_weight(self, weight: Tensor) -> Product:
        """Another matrix, no bias."""
        return Product(weight, None)


@final
@dataclass(frozen=True, eq=False)
class Scaling:
    """``factor * x + offset`` element by element; both float64 and broadcast to one image, None for 1 and 0.

    ``terms`` is what the operator rounds: 1 for a sum or a product, more for a batch norm.
    """

    factor: Tensor | None
    offset: Tensor | None
    terms: int = 1

    back_terms = 1

    def product(self, x: Tensor) -> Tensor:
        """``factor * x``."""
        return x if self.factor is None else x * self.factor.to(x.dtype)

    def adjoint(self, rows: Tensor) -> Tensor:
        """The matrix is diagonal."""
        return self.product(rows)

    def magnitude(self) -> Scaling:
        """With ``|factor|``."""
        return self.with_weight(self.factor.abs()) if self.factor is not None else Scaling(None, None, self.terms)

    def with_weight(self, weight: Tensor | None) -> Scaling:
        """Another factor, no offset."""
        return Scaling(weight, None, self.terms)


@final
@dataclass(frozen=True, eq=False)
class Average:
    """A linear function whose entries are zero or larger: average pooling, means and sums over axes."""

    function: Callable[[Tensor], Tensor]
    source: Shape
    terms: int

    offset = None

    @property
    def back_terms(self) -> int:
        """An element may be in as many windows as a window has elements."""
        return self.terms

    def product(self, x: Tensor) -> Tensor:
        """The function itself."""
        return self.function(x)

    def adjoint(self, rows: Tensor) -> Tensor:
        """By automatic differentiation."""
        with torch.enable_grad():
            start = rows.new_zeros((len(rows), *self.source), requires_grad=True)
            (found,) = torch.autograd.grad(self.function(start), start, rows)
        return found

    def magnitude(self) -> Average:
        """Itself."""
        return self


@final
@dataclass(frozen=True, eq=False)
class Pick:
    """Every output element is one input element, or a constant: reshape, slice, pad, permute, gather, expand.

    Attributes:
        index: int64, the output's shape: which element of the flattened source; -1 for a constant.
        offset: the constants, float32 numbers (0 elsewhere), None where there are none.
        source: the source's shape.
    """

    index: Tensor
    offset: Tensor | None
    source: Shape

    terms = 0

    @property
    def back_terms(self) -> int:
        """How often an element is picked."""
        counts = torch.bincount(self.index.flatten()[self.index.flatten() >= 0], minlength=1)
        return int(counts.max()) - 1

    @property
    def moves_nothing(self) -> bool:
        """Whether only the shape changes."""
        return self.index.numel() == prod(self.source) and bool(
            (self.index.flatten() == torch.arange(self.index.numel())).all()
        )

    def product(self, x: Tensor) -> Tensor:
        """The elements, 0 for constants."""
        flat, index = x.flatten(1), self.index.flatten()
        if self.moves_nothing:
            return flat.reshape(len(x), *self.index.shape)
        found = flat[:, index.clamp(min=0)] * (index >= 0)
        return found.reshape(len(x), *self.index.shape)

    def adjoint(self, rows: Tensor) -> Tensor:
        """Every row back where it came from."""
        index, flat = self.index.flatten(), rows.flatten(1)
        if not self.moves_nothing:
            kept = index >= 0
            flat = rows.new_zeros(len(rows), prod(self.source)).index_add_(1, index[kept], flat[:, kept])
        return flat.reshape(len(rows), *self.source)

    def magnitude(self) -> Pick:
        """Itself without the constants."""
        return Pick(self.index, None, self.source)


def picked(function: Callable[[Tensor], Tensor], source: Shape) -> Pick:
    """What ``function``, which only moves elements of one image (1, *source), does.

    Raises:
        ValueError: the batch axis does not stay in front.
    """
    count = prod(source)
    places = torch.arange(1, count + 1, dtype=torch.float64).reshape(1, *source)
    zeros = function(torch.zeros_like(places))
    if zeros.ndim == 0 or zeros.shape[0] != 1:
        raise ValueError("the batch axis does not stay in front")
    index = (function(places) - zeros)[0].round().to(torch.int64) - 1
    return Pick(index, zeros[0].float().double() if bool(zeros.any()) else None, source)
