"""The weight that makes up for inputs that are off already, the target of cross-layer rounding (Li et al. 2025, GPTAQ).

Rounding a layer against its own inputs keeps the errors of the layers before it. Against the float network's outputs
on the float network's inputs v, the best weight on the inputs u that the layer will really get is the least-squares
one, and ``E ||W v - W' u||^2`` of any other weight exceeds its own by ``tr(dW H dW^T)``: rounding goes on from there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.errors import UsageError
from qopt.quant.gptq import as_rows, as_stored


def retargeted(weight: Tensor, axis: int, moment: Tensor, cross: Tensor, *, ridge: float = 0.3) -> Tensor:
    """``W' = W (C + r)(H + r)^-1``, which minimises ``E ||W v - W' u||^2 + r ||W - W'||^2``: float64, as ``weight``.

    Args:
        weight: W, float, any shape with at least one axis.
        axis: the axis that counts output channels.
        moment: H = E[u u^T], or the covariance, (groups, columns, columns), symmetric positive semidefinite.
        cross: C = E[v u^T], or the covariance, of the same shape; equal to ``moment`` it changes nothing.
        ridge: r in parts of the mean of H's diagonal; how strongly W' is held to W where the inputs say little.

    Raises:
        UsageError: for a ridge that is not positive, or moments of different shapes.
    """
    if not ridge > 0 or moment.shape != cross.shape:
        got = f"ridge {ridge}, moments {tuple(moment.shape)} and {tuple(cross.shape)}"
        raise UsageError("no least-squares weight", expected="a positive ridge and moments of one shape", got=got)
    mean = moment.diagonal(dim1=1, dim2=2).mean(1, keepdim=True)
    held = torch.where(mean > 0, ridge * mean, 1.0)
    damped = moment.clone()
    damped.diagonal(dim1=1, dim2=2).add_(held)
    rows = as_rows(weight.to(torch.float64), axis, len(moment))
    solved: Tensor = torch.linalg.solve(damped, (rows @ cross + rows * held[:, :, None]).mT)  # damped is symmetric
    return as_stored(solved.mT, weight.shape, axis)
