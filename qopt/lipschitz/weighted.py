"""The activation-aware norm of a weight error: spectral norms weighted by the second moment of the layer's inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.lipschitz.bound import NormBound
from qopt.lipschitz.reshaped import as_matrix
from qopt.lipschitz.spectral import finite, spectral_norms


def moment_root(moment: Tensor) -> Tensor:
    """``R`` with ``R R^T = C`` for a second moment C (groups, columns, columns), positive semidefinite.

    Cholesky's factor, of C with the least on its diagonal that lets it succeed: nothing, or ``columns eps`` of its
    trace and where need be a hundred times as much, up to the rounding of a moment of fewer positions than columns
    whose products were summed in float32.
    """
    moment = moment.double()
    trace = moment.diagonal(dim1=1, dim2=2).sum(1)
    least = moment.shape[1] * torch.finfo(torch.float64).eps * trace
    for share in (0.0, 1.0, 1e2, 1e4, 1e6):
        shifted = moment + torch.diag_embed((share * least)[:, None].expand(moment.shape[:2])) if share else moment
        root: Tensor
        root, failed = torch.linalg.cholesky_ex(shifted)
        if not failed.any():
            return root
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(0.0).sqrt()[:, None, :]
    return root


def weighted_l2(weight: Tensor, root: Tensor, axis: int = 0, groups: int = 1, *, where: str = "weight") -> NormBound:
    """``||W R||_2 = ||W C^(1/2)||_2``: the largest root-mean-square output of the layer along one direction.

    Args:
        weight: as `as_matrix` takes it.
        root: of the second moment of the layer's inputs, float64 (groups, columns, columns), from `moment_root`.
        axis: the axis that counts output channels.
        groups: convolution groups.
        where: the layer's name, for errors.

    The bound is sound for ``root`` as given; the moment itself is a statistic.
    """
    rows = finite(as_matrix(weight, axis, groups, where=where), where) @ root
    return NormBound.largest(spectral_norms(rows, where=where))


def ratio(error: NormBound, norm: NormBound) -> NormBound:
    """``error / norm`` as a bound; 0 where both are zero. A zero norm with an error counts as a ratio of 1."""
    if norm.lower <= 0:
        worst = 0.0 if error.upper == 0 else 1.0
        return NormBound(worst, worst, f"{error.method} ratio")
    return NormBound(error.lower / norm.upper, error.upper / norm.lower, f"{error.method} ratio")
