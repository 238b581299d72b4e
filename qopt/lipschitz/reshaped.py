"""Norms of a layer's weight as a matrix, the way the papers take them (Cisse et al. 2017).

A convolution becomes the matrix (output channels) x (inputs * kernel height * kernel width). Its spectral norm is a
*lower* bound of the convolution's Lipschitz constant, up to 3 times low for a 3 x 3 kernel; it is exact for a linear
layer, for 1 x 1 kernels and where patches do not overlap.
"""

from __future__ import annotations

from torch import Tensor

from qopt.errors import UsageError
from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.spectral import EPS, finite, spectral_norms


def as_matrix(weight: Tensor, axis: int = 0, groups: int = 1, *, where: str = "weight") -> Tensor:
    """One matrix per group, shape (groups, rows, columns): a row holds all weights that reach one output channel.

    Args:
        weight: Conv (out, in/groups, *kernel) or Gemm (out, in) with axis 0; ConvTranspose (in, out/groups, *kernel) or
            MatMul (in, out) with axis 1; with one group any axis.
        axis: the axis that counts output channels.
        groups: convolution groups: independent blocks, split along the first axis of the weight.
        where: the layer's name, for errors.

    Raises:
        UsageError: for an axis that the weight does not have, an empty weight, or groups that do not divide it.
    """
    if weight.ndim == 0 or not -weight.ndim <= axis < weight.ndim or weight.numel() == 0:
        raise UsageError("no such channel axis", where=where, got=f"axis {axis} of shape {tuple(weight.shape)}")
    axis %= weight.ndim
    if groups == 1:
        return weight.movedim(axis, 0).reshape(1, weight.shape[axis], -1)
    if groups < 1 or axis > 1 or weight.shape[0] % groups:
        got = f"{groups} groups on axis {axis} of shape {tuple(weight.shape)}"
        raise UsageError("groups that do not divide the weight", where=where, got=got)
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    blocks = blocks if axis == 0 else blocks.movedim(2, 1)
    return blocks.reshape(groups, blocks.shape[1], -1)


def reshaped_l2(weight: Tensor, axis: int = 0, groups: int = 1, *, where: str = "weight") -> NormBound:
    """The spectral norm of the reshaped weight, which the papers' thresholds use: the maximum over groups.

    Raises what `as_matrix` and `spectral_norm` raise.
    """
    return NormBound.largest(spectral_norms(as_matrix(weight, axis, groups, where=where), where=where))


def max_row_sum(weight: Tensor, axis: int = 0, groups: int = 1, *, where: str = "weight") -> NormBound:
    """The linf norm of the reshaped weight: the maximum over output channels of the sum of magnitudes.

    An upper bound of the layer's linf operator norm, and equal to it where one full patch fits inside the unpadded
    image (for a transposed convolution: where stride is 1 as well). Raises what `as_matrix` raises, and
    CorruptModelError for NaN or infinite weights.
    """
    rows = finite(as_matrix(weight, axis, groups, where=where), where)
    norm = float(rows.abs().sum(dim=2).max())
    slack = rows.shape[2] * EPS  # a sum of n terms of one sign is off by at most n eps / 2 of itself
    return NormBound(norm * (1 - slack), norm * (1 + slack), "row-sum")
