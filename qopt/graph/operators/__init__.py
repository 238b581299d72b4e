"""The importer's operator table: one handler per ONNX operator, grouped by kind."""

from __future__ import annotations

from qopt.graph.operators import (
    activation,
    arithmetic,
    convolution,
    normalisation,
    pooling,
    reduction,
    shape,
)
from qopt.graph.operators.registry import TABLE, Call, Op

__all__ = [
    "TABLE",
    "Call",
    "Op",
    "activation",
    "arithmetic",
    "convolution",
    "normalisation",
    "pooling",
    "reduction",
    "shape",
]
