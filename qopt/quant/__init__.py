"""Quantizers as pure numerics: weights to codes and back, activation ranges and their simulation, bias, packing."""

from __future__ import annotations

from qopt.quant.activations import GRADIENTS, ActivationQuantizer, AffineRange, Gradient
from qopt.quant.bias import corrected_bias
from qopt.quant.codebook import Codebook, codebook
from qopt.quant.observer import RangeObserver
from qopt.quant.packing import pack, powers, unpack
from qopt.quant.quantized import QuantizedWeight
from qopt.quant.quantizer import Quantizer, Rows
from qopt.quant.ranges import calibrated_bounds
from qopt.quant.rows import AnyWeight, QuantizedRows, parts_of, with_parts
from qopt.quant.weights import quantize_weight, quantize_whole

__all__ = [
    "GRADIENTS",
    "ActivationQuantizer",
    "AffineRange",
    "AnyWeight",
    "Codebook",
    "Gradient",
    "QuantizedRows",
    "QuantizedWeight",
    "Quantizer",
    "RangeObserver",
    "Rows",
    "calibrated_bounds",
    "codebook",
    "corrected_bias",
    "pack",
    "parts_of",
    "powers",
    "quantize_weight",
    "quantize_whole",
    "unpack",
    "with_parts",
]
