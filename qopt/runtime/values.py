"""Constants as ONNX values."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


def constant(name: str, array: NDArray[Any] | np.generic) -> ir.Value:
    """A value called ``name`` that always holds ``array``; to be registered as an initializer."""
    tensor = ir.tensor(np.asarray(array), name=name)
    return ir.Value(
        name=name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor
    )  # fmt: skip
