"""Bias correction: the bias absorbs the mean shift that quantized weights cause (Nagel et al. 2019, section 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from qopt.errors import DataError, UsageError


def corrected_bias(bias: Tensor | None, float_mean: Tensor, quantized_mean: Tensor) -> Tensor:
    """``bias + float_mean - quantized_mean`` in float32, shape (channels,); a missing bias counts as zeros.

    Args:
        bias: shape (channels,), the bias that both means were measured with, or None.
        float_mean: mean pre-activation of each output channel in the float network, over images and positions.
        quantized_mean: the same with quantized weights (and whatever precedes the layer as it will run).

    Raises:
        UsageError: for shapes that differ.
        DataError: for means that are not finite.
    """
    start = torch.zeros_like(float_mean) if bias is None else bias
    shapes = {tuple(tensor.shape) for tensor in (start, float_mean, quantized_mean)}
    if len(shapes) > 1 or float_mean.ndim != 1:
        raise UsageError("bias and means must have one value per channel", got=" and ".join(map(str, sorted(shapes))))
    corrected = start.to(torch.float64) + float_mean.to(torch.float64) - quantized_mean.to(torch.float64)
    if not bool(torch.isfinite(corrected).all()):
        raise DataError("mean pre-activations that are not finite", fix="check the model and its data")
    return corrected.to(torch.float32)
