"""Lower bounds of a convolution's spectral norm: how far it stretches an image that was sought for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from qopt.lipschitz.operator import Axis
from qopt.lipschitz.spectral import EPS

STEPS = 30
"""Most steps of the search, each one convolution and one transposed convolution."""

SETTLED = 1e-5
"""The search ends when three steps in a row lengthen the image by no more than this part."""


@final
@dataclass(frozen=True)
class Convolution:
    """A convolution over two axes as a linear map of one image, and its adjoint.

    Attributes:
        weight: float64, (out, in / groups, kernel height, kernel width).
        axes: height and width; their sizes must be known.
        groups: blocks of channels.
    """

    weight: Tensor
    axes: tuple[Axis, Axis]
    groups: int

    @property
    def image(self) -> tuple[int, ...]:
        """Shape of the input, without a batch axis."""
        return (self.weight.shape[1] * self.groups, *(axis.size or 0 for axis in self.axes))

    def __call__(self, image: Tensor) -> Tensor:
        """The output, (1, out, height, width), for an image of the input's shape with a batch axis of 1."""
        for dim, axis in enumerate(self.axes, start=2):
            image = _pad(image, axis, dim)
        strides, dilations = self._strides()
        output = functional.conv2d(image, self.weight, None, strides, 0, dilations, self.groups)
        return output[:, :, : self.axes[0].outputs, : self.axes[1].outputs]

    def adjoint(self, output: Tensor) -> Tensor:
        """The transpose applied to an output: an image."""
        strides, dilations = self._strides()
        rest = [unread(axis) for axis in self.axes]
        image = functional.conv_transpose2d(output, self.weight, None, strides, 0, rest, self.groups, dilations)
        for dim, axis in enumerate(self.axes, start=2):
            image = _crop(image, axis, dim)
        return image

    def _strides(self) -> tuple[list[int], list[int]]:
        return [axis.stride for axis in self.axes], [axis.dilation for axis in self.axes]


def unread(axis: Axis) -> int:
    """Pixels at the end of the padded image that no output reads: the adjoint's output padding."""
    assert axis.size is not None
    assert axis.outputs is not None
    return axis.size + axis.before + axis.after - (axis.outputs - 1) * axis.stride - axis.extent


def stretch(convolution: Convolution, slack: float) -> float:
    """A lower bound of the spectral norm: ``||K x|| / ||x||`` for the best x found, less ``slack``.

    x is sought by locally optimal conjugate gradients (Knyazev 2001) from a random image: every step takes the best of
    the plane of x, its residual and the last direction. It converges like the root of the power method's rate.

    Args:
        convolution: of entries near 1, sizes known.
        slack: at most how much ``||K x||`` is off by rounding, for ``||x|| = 1``.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, *convolution.image, generator=generator, dtype=torch.float64)
    image = start / start.norm()
    output = convolution(image)
    basis, images = [image], [output]
    length, settled = float(output.norm()), 0
    for _ in range(STEPS):
        residual = convolution.adjoint(images[0]) - length**2 * basis[0]
        for _ in range(2):
            for vector in basis:
                residual = residual - (vector * residual).sum() * vector
        size = float(residual.norm())
        if not size > 1e-14 * length**2:
            break
        direction = residual / size
        basis, images = _best([*basis, direction], [*images, convolution(direction)])
        previous, length = length, float(images[0].norm())
        settled = settled + 1 if length <= previous * (1 + SETTLED) else 0
        if settled == 3:
            break
    found = convolution(basis[0])
    ratio = float(found.norm()) / float(basis[0].norm())
    return max(0.0, ratio * (1 - 4 * math.sqrt(found.numel() + start.numel()) * EPS) - slack)


def _best(basis: list[Tensor], images: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The unit vector of the span whose image is longest, and the direction it moved in; with their images."""
    stacked = torch.stack([image.flatten() for image in images])
    weights = torch.linalg.eigh(stacked @ stacked.mT).eigenvectors[:, -1].tolist()
    moved = [0.0, *weights[1:]]
    # orthogonal to the new vector: what is left of the move
    share = sum(m * w for m, w in zip(moved, weights, strict=True))
    moved = [m - share * w for m, w in zip(moved, weights, strict=True)]
    size = math.hypot(*moved)
    kept = [weights] if size < 1e-8 else [weights, [m / size for m in moved]]
    return [_combine(basis, w) for w in kept], [_combine(images, w) for w in kept]


def _combine(vectors: list[Tensor], weights: list[float]) -> Tensor:
    total = vectors[0] * weights[0]
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        total = total + vector * weight
    return total


def _pad(image: Tensor, axis: Axis, dim: int) -> Tensor:
    if axis.before + axis.after == 0:
        return image
    if axis.mode == "zeros":
        ends = (axis.before, axis.after)
        return functional.pad(image, (0, 0, *ends) if dim == 2 else ends)
    return image.index_select(dim, torch.tensor(axis.pixels()))


def _crop(padded: Tensor, axis: Axis, dim: int) -> Tensor:
    """The adjoint of `_pad`: what several places show of one pixel adds up."""
    assert axis.size is not None
    if axis.before + axis.after == 0:
        return padded
    if axis.mode == "zeros":
        return padded.narrow(dim, axis.before, axis.size)
    shape = list(padded.shape)
    shape[dim] = axis.size
    return padded.new_zeros(shape).index_add_(dim, torch.tensor(axis.pixels()), padded)
