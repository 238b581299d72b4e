"""The importer's operator table: one handler per ONNX operator, grouped by kind."""

from __future__ import annotations

from qopt.graph.operators import (
    activation,
    along_axis,
    arithmetic,
    attention,
    convolution,
    indexing,
    matrix,
    normalisation,
    packed_product,
    pooling,
    quantization,
    quantized_layers,
    reduction,
    resampling,
    shape,
    types,
)
from qopt.graph.operators.registry import TABLE, Call, Op
from qopt.graph.operators.types import carried

__all__ = [
    "TABLE",
    "Call",
    "Op",
    "activation",
    "along_axis",
    "arithmetic",
    "attention",
    "carried",
    "convolution",
    "indexing",
    "matrix",
    "normalisation",
    "packed_product",
    "pooling",
    "quantization",
    "quantized_layers",
    "reduction",
    "resampling",
    "shape",
    "types",
]
